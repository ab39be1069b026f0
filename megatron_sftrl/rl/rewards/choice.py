r"""multiple_choice: the letter of an option, as in MMLU-Pro, ARC and GPQA.

    reward  = 1 if the letter in \boxed{...} or behind "Answer:" is row["answer"], else 0
    lenient = 1 if it is, or where there is no such letter: the option whose text stands there instead, the
              letter behind "answer is", "option", ..., the option that the last line repeats, or the last
              letter that stands alone

Of several answers the last counts, in either format. What stands in <think> ... </think> is no answer.
row["options"], where the row has it, are the texts in the order of the letters: a letter beside the text of
another option is no answer.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence

from megatron_sftrl.errors import UserError
from megatron_sftrl.rl.rewards.math import LONGEST_ENDING, behind_thoughts, last_boxes, written_answer
from megatron_sftrl.rl.rewards.registry import (
    Canary,
    Json,
    RewardConfig,
    RewardInputs,
    RewardOutput,
    register_reward,
)
from megatron_sftrl.rl.rewards.text import normal

_MOST = 10
"""Letters of a row that does not name its options: A to J, as in MMLU-Pro."""

_DECORATION = re.compile(r"\\(?:boxed|fbox|textbf|text|mathbf|mathrm|rm|bf)\b|[$*_`{}]|\\[()\[\]]")
_MARKER = re.compile(r"\banswer\b[\s*_]*:[ \t]*([^\n]*)", re.IGNORECASE)
_LETTER = re.compile(r"\(?([A-Za-z])(?:\)|\b)[.:)]*(?:\s+(.*))?", re.DOTALL)
_BEHIND = r"(?![A-Za-z0-9'\u2019])"
_NAMED = re.compile(
    r"(?i:\b(?:answer|option|choice)(?:\s+(?:is|would be|must be|should be))?)[\s:]*\(?([A-Z])"
    + _BEHIND
    + r"(?!\)?\s*(?:,|/|or|and)\s*\(?[A-Z]\b)"
)
# "A" and "I" in front of a word are words themselves, mostly.
_LONE = re.compile(
    r"(?<![A-Za-z0-9'\u2019\\])([A-Z])" + _BEHIND + r"(?!(?<=[AI])\s+(?!is\b|because\b|since\b)[a-z])"
)


class MultipleChoiceConfig(RewardConfig):
    """Nothing to choose."""


def examples(config: MultipleChoiceConfig) -> Sequence[Canary]:
    """A letter in both formats, another one, and two at once."""
    row: dict[str, Json] = {"answer": "B", "options": ["Paris", "Rome", "a cat"]}
    written = {
        r"So \boxed{B}.": True,
        "Answer: B": True,
        r"\boxed{C}": False,
        r"\boxed{A, B}": False,
        "": False,
    }
    return [Canary(response=text, row=row, is_right=is_right) for text, is_right in written.items()]


def options_of(row: Mapping[str, Json]) -> list[str]:
    """Texts in the order of their letters; empty where the row has none.

    UserError for another kind of value, or an answer that is no letter of them.
    """
    answer, options = row["answer"], row.get("options") or []
    if not isinstance(options, list) or not all(isinstance(each, str) for each in options):
        raise UserError(f"expected `options` to be a list of texts, got {options!r}")
    letters = string.ascii_uppercase[: len(options) or _MOST]
    if not isinstance(answer, str) or len(answer) != 1 or answer not in letters:
        raise UserError(f"expected `answer` to be a letter from A to {letters[-1]}, got {answer!r}")
    return [str(each) for each in options]


def check_row(row: Mapping[str, Json], config: MultipleChoiceConfig) -> None:
    """As options_of."""
    options_of(row)


def solution(row: Mapping[str, Json], config: MultipleChoiceConfig) -> str:
    """The row's letter in a box."""
    return rf"\boxed{{{row['answer']}}}"


@register_reward(
    "multiple_choice",
    config=MultipleChoiceConfig,
    needs=("answer",),
    canaries=examples,
    check_row=check_row,
    solution=solution,
)
def multiple_choice(inputs: RewardInputs, config: MultipleChoiceConfig) -> RewardOutput:
    """1 for the right letter in a box or behind "Answer:", else 0; lenient: wherever the choice is made."""
    options = options_of(inputs.row)
    texts = [normal(_plain(each), ignore_case=True) for each in options]
    text = behind_thoughts(inputs.response)
    written = _written(text)
    strict = None if written is None else _letter(written, texts)
    lenient = strict or _lenient(text, written, texts)
    return RewardOutput(
        reward=float(strict == inputs.row["answer"]),
        lenient=float(lenient == inputs.row["answer"]),
        metrics={"answered": float(strict is not None)},
        answer=strict,
    )


def _plain(text: str) -> str:
    return _DECORATION.sub("", text).strip()


def _written(text: str) -> str | None:
    """What the last box or the last "Answer:" says, whichever comes later; None without either."""
    boxes = last_boxes(text)
    if boxes is None:
        return None  # the last box was cut off
    shift = max(len(text) - LONGEST_ENDING, 0)
    found = [(shift + each.start(), each[1]) for each in _MARKER.finditer(text[shift:]) if each[1].strip()]
    # Boxes that "or" connects are one answer. Of "Answer: \\boxed{B}" the box begins later.
    if boxes and (boxed := written_answer(text, ("boxed",))) is not None:
        found.append((boxes[-1][0], boxed))
    return _plain(max(found)[1]) if found else None


def _letter(written: str, texts: Sequence[str]) -> str | None:
    """`B`, `(B)`, `b.`, or the letter in front of its own option's text."""
    found = _LETTER.fullmatch(written)
    if found is None:
        return None
    letter, rest = found[1].upper(), normal(found[2] or "", ignore_case=True)
    place = string.ascii_uppercase.index(letter)
    if place >= (len(texts) or _MOST):
        return None
    if rest and (not texts or rest != texts[place]):
        return None
    return letter


def _lenient(text: str, written: str | None, texts: Sequence[str]) -> str | None:
    """The choice of a response that does not write it as it was asked to."""
    text = text[-LONGEST_ENDING:]
    letters = string.ascii_uppercase[: len(texts) or _MOST]
    lines = text.strip().splitlines()
    for said in (written, lines[-1] if lines else None):
        option = None if said is None else normal(_plain(said), ignore_case=True)
        if option and texts.count(option) == 1:
            return letters[texts.index(option)]
    for pattern in (_NAMED, _LONE):
        found = [each[1].upper() for each in pattern.finditer(_plain(text)) if each[1].upper() in letters]
        if found:
            return found[-1]
    return None
