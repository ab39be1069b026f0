r"""math: the value of the final answer, compared symbolically by math-verify.

    reward  = 1 if the answer in \boxed{...} or behind #### equals row["answer"], else 0
    lenient = reward, or 1 if the last number of the response equals it, whatever the format

Of several answers the last counts, in either format; of a list, as many boxes as it has items. What stands
in <think> ... </think> is no answer. row["answer"] may be bare (`3/4`), a solution that ends in `#### 1,234`
as in GSM8K (arXiv:2110.14168), or one that holds a \boxed{...} as in MATH (arXiv:2103.03874). Equality is
math-verify's, and stricter where that is generous (math_answers.py): 1/2 = 0.5, sets without order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal

from pydantic import Field

from megatron_sftrl.errors import UserError
from megatron_sftrl.rl.rewards.math_answers import LONGEST_ANSWER, are_equal, num_items
from megatron_sftrl.rl.rewards.math_text import canonical, plain_words
from megatron_sftrl.rl.rewards.registry import (
    Canary,
    Json,
    RewardConfig,
    RewardInputs,
    RewardOutput,
    register_reward,
)

# Far enough back to hold the last number that a reader would call the answer.
TAIL = 4000
LONGEST_ENDING = 20_000
MOST_BOXES = 64
_MANY = MOST_BOXES + 1

_NUMBER = re.compile(r"(?<![\d.])-?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(?:/\d+)?")

_BARE_CONTENT = re.compile(r"\s*((?:\\[A-Za-z]+(?:\{[^{}]{0,99}\})*|[^\s$\\{}A-Za-z]|[A-Za-z](?![A-Za-z]))+)")
_OPENING = re.compile(r"\s*\{")
_ONLY_A_SEPARATOR = re.compile(
    r"[\s$]*(?:(?:,|;|\\text\s*\{\s*,?\s*(?:and|or)\s*\}|,?\s*(?:and|or))[\s$]*)(?:[A-Za-z]\s*=\s*)?",
    re.IGNORECASE,
)
_HASHES = re.compile(r"(?<!#)####(?!#)[ \t]*([^\n]*)")

Format = Literal["boxed", "hashes"]


class MathConfig(RewardConfig):
    formats: tuple[Format, ...] = Field(default=("boxed", "hashes"), min_length=1)
    r"""Where the strict reading looks for the answer: in \boxed{...}, or behind #### up to the line's end."""
    decimals: int = Field(default=6, ge=0, le=15)
    """Decimal places to which inexact numbers must agree; small ones, to half as many significant digits.
    Numbers written without a decimal point must be equal."""


def examples(config: MathConfig) -> Sequence[Canary]:
    """Answers in the chosen formats, right ones also where only the writing differs."""
    write = {"boxed": r"So it is $\boxed{%s}$.", "hashes": "So it is\n#### %s"}
    pairs = [("42", "42", "24"), (r"\frac{1}{2}", "0.5", "0.25"), ("7 + 7 = 14\n#### 1,234", "1234", "1,23")]
    return [
        Canary(response=write[name] % text, row={"answer": gold}, is_right=is_right)
        for name in config.formats
        for gold, right, wrong in pairs
        for text, is_right in ((right, True), (wrong, False))
    ] + [Canary(response="I do not know.", row={"answer": "42"}, is_right=False)]


def check_row(row: Mapping[str, Json], config: MathConfig) -> None:
    """As gold_answer."""
    gold_answer(row["answer"])


def solution(row: Mapping[str, Json], config: MathConfig) -> str:
    """The row's final answer in the first format."""
    write = {"boxed": r"\boxed{%s}", "hashes": "#### %s"}
    return write[config.formats[0]] % gold_answer(row["answer"])


@register_reward(
    "math",
    config=MathConfig,
    needs=("answer",),
    canaries=examples,
    imports=("math_verify",),
    check_row=check_row,
    solution=solution,
)
def math(inputs: RewardInputs, config: MathConfig) -> RewardOutput:
    """1 for an answer of the right value in the right format, else 0; lenient: for the last number."""
    gold = gold_answer(inputs.row["answer"])
    answer = written_answer(inputs.response, config.formats, num_boxes=num_items(gold))
    is_right = answer is not None and are_equal(gold, answer, decimals=config.decimals)
    number = last_number(inputs.response)
    is_right_number = is_right or (number is not None and are_equal(gold, number, decimals=config.decimals))
    return RewardOutput(
        reward=float(is_right),
        lenient=float(is_right_number),
        metrics={"answered": float(answer is not None)},
        answer=None if answer is None else re.sub(r"\s|(?<=\d),(?=\d{3}\b)", "", answer),
    )


def gold_answer(value: Json) -> str:
    r"""The final answer of a solution, or the whole text where it is only that; UserError if it is none."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(
            f"math: expected row.answer to be text or a number, got {type(value).__name__}; write the answer "
            "as text, several ones separated by commas"
        )
    text = str(value)
    found = written_answer(text, ("boxed", "hashes"), num_boxes=_MANY)
    answer = text.strip() if found is None else found
    if not answer:
        raise UserError("math: expected row.answer to hold an answer, got none")
    return answer


def written_answer(text: str, formats: Sequence[Format], *, num_boxes: int = 1) -> str | None:
    r"""The last answer in one of the formats; None when there is none, or it was cut off.

    Behind <think> ... </think> only what follows is the answer. A line behind #### that holds no number is a
    heading where there is another answer. The last `num_boxes` boxes are read as a list.
    """
    text = behind_thoughts(text)
    boxes = last_boxes(text) if "boxed" in formats else []
    if boxes is None:
        return None
    lines = _lines_behind_hashes(text) if "hashes" in formats else []
    values = [line for line in lines if _reads_as_value(line[1])]
    if boxes:
        last_box = boxes[-1][0]
        values = [line for line in values if line[0] > last_box and _is_last_or_bare(line, text)]
    if values:
        return values[-1][1]
    if boxes:
        return _joined(boxes, text, num_boxes)
    return lines[-1][1] if lines else None


def behind_thoughts(text: str) -> str:
    """What follows <think> ... </think>; nothing where the thoughts do not end."""
    closed = text.rfind("</think>")
    if text.rfind("<think>") > closed:
        return ""
    return text[closed + len("</think>") :] if closed >= 0 else text


def last_number(text: str) -> str | None:
    """The last number, such as -1,234.5 or 3/4."""
    numbers = _NUMBER.findall(text[-TAIL:])
    return numbers[-1] if numbers else None


def last_boxes(text: str) -> list[tuple[int, int, str]] | None:
    r"""Start, end and content of the last boxes that stand in no other; None if the last one was cut off."""
    found: list[tuple[int, int, str]] = []
    end = len(text)
    for _ in range(MOST_BOXES):
        start = max(text.rfind(r"\boxed", 0, end), text.rfind(r"\fbox", 0, end))
        if start < 0:
            break
        end = start
        content = _content(text, start + (6 if text.startswith(r"\boxed", start) else 5))
        if content is None and not found:
            return None
        if content is not None and content[1].strip(" .$") not in ("", r"\ldots", r"\dots"):
            found = [box for box in found if box[0] >= content[0]]
            found.insert(0, (start, *content))
    return found


def _content(text: str, begin: int) -> tuple[int, str] | None:
    """Where a box ends, and what it holds; None for one that does not end."""
    bare = _BARE_CONTENT.match(text, begin)
    if bare is not None:
        return bare.end(), bare[1].rstrip(".,;:!?)")
    opening = _OPENING.match(text, begin)
    if opening is None:
        return begin, ""
    depth = 0
    for place in range(opening.end(), min(len(text), opening.end() + LONGEST_ANSWER + 1)):
        if text[place] in "{}" and text[place - 1] != "\\":
            depth += 1 if text[place] == "{" else -1
            if depth < 0:
                return place + 1, text[opening.end() : place]
    return None


def _joined(boxes: Sequence[tuple[int, int, str]], text: str, num_boxes: int) -> str:
    """The content of the last box; of several that make one list, all, as a list."""
    between = [text[first[1] : second[0]] for first, second in pairwise(boxes)]
    start = len(boxes) - 1
    # What commas alone connect is one answer, whatever the question wants.
    while start > 0 and len(between[start - 1]) < 40 and _ONLY_A_SEPARATOR.fullmatch(between[start - 1]):
        start -= 1
    if "," not in boxes[-1][2] and num_boxes < _MANY:
        start = min(start, max(len(boxes) - num_boxes, 0))
    contents = [box[2].strip() for box in boxes[start:]]
    return ", ".join(dict.fromkeys(contents))


def _lines_behind_hashes(text: str) -> list[tuple[int, str]]:
    shift = max(len(text) - LONGEST_ENDING, 0)
    found = [(shift + line.start(), line[1].strip()) for line in _HASHES.finditer(text[shift:])]
    return [(place, line) for place, line in found if line][-MOST_BOXES:]


def _reads_as_value(line: str) -> bool:
    """A number first, perhaps behind a sign, a name and decoration; no numbered heading."""
    line = canonical(line[:LONGEST_ANSWER])
    if re.match(r"\d+(?:[.):]|\s*-)\s*[A-Za-z]{2}", line):
        return False
    return bool(
        re.match(r"(?:[A-Za-z]\w{0,2}(?:\(\w\))?\s*(?:=|\\in)\s*)?(?:\\?[^A-Za-z\d\\]|\\[A-Za-z]+)*\d", line)
    )


def _is_last_or_bare(line: tuple[int, str], text: str) -> bool:
    """Whether a line behind a box replaces its answer: it ends the text, or holds nothing but the number."""
    is_last = not text[line[0] :].strip().partition("\n")[2].strip()
    return is_last or not re.search("[A-Za-z]{2}", plain_words(canonical(line[1])))
