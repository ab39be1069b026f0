"""exact_match: the text behind a marker is the answer, up to spaces and capitals.

    reward  = 1 if the text behind the last marker, up to the line's end, is row["answer"], else 0
    lenient = reward, or 1 if the last line of the response is

row["answer"] is one answer or a list of accepted ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_sftrl.errors import UserError
from megatron_sftrl.rl.rewards.api import Canary, Json, RewardConfig, RewardInputs, RewardOutput
from megatron_sftrl.rl.rewards.registry import register_reward


class ExactMatchConfig(RewardConfig):
    marker: str | None = "Answer:"
    """Text before the answer, found as written; null: the whole response is the answer."""
    ignore_case: bool = True
    """Capital and small letters are the same."""


def examples(config: ExactMatchConfig) -> Sequence[Canary]:
    """An answer with other spaces, and another answer."""
    marker = config.marker or ""
    row: dict[str, Json] = {"answer": "New York"}
    return [
        Canary(response=f"{marker} New  York.", row=row, is_right=True),
        Canary(response=f"{marker} New Jersey", row=row, is_right=False),
        Canary(response="", row=row, is_right=False),
    ]


def answers_of(row: Mapping[str, Json], config: ExactMatchConfig) -> list[str]:
    """The accepted texts; a whole number is its digits.

    Raises:
        UserError: another kind of value, no answer, or an empty one, which no answer at all would match.
    """
    answer = row["answer"]
    answers = answer if isinstance(answer, list) else [answer]
    for one in answers:
        if isinstance(one, bool) or not isinstance(one, str | int):
            raise UserError(
                f"expected `answer` to be text, a whole number or a list of them, got {one!r}; write it as "
                "the text that a response has to hold"
            )
    texts = [str(one) for one in answers]
    if not all(normal(text, ignore_case=config.ignore_case) for text in texts) or not texts:
        raise UserError(f"expected `answer` to hold a text, got {answer!r}; add it, or remove the row")
    return texts


def check_row(row: Mapping[str, Json], config: ExactMatchConfig) -> None:
    """As answers_of."""
    answers_of(row, config)


def solution(row: Mapping[str, Json], config: ExactMatchConfig) -> str:
    """The first answer, behind the marker."""
    return f"{config.marker or ''} {answers_of(row, config)[0]}".strip()


@register_reward(
    "exact_match",
    config=ExactMatchConfig,
    needs=("answer",),
    canaries=examples,
    check_row=check_row,
    solution=solution,
)
def exact_match(inputs: RewardInputs, config: ExactMatchConfig) -> RewardOutput:
    """1 for the right text behind the marker, else 0; lenient: in the last line."""
    accepted = {normal(text, ignore_case=config.ignore_case) for text in answers_of(inputs.row, config)}
    lines = inputs.response.strip().splitlines()
    last_line = normal(lines[-1], ignore_case=config.ignore_case) if lines else ""
    written = _written(inputs.response, config.marker)
    is_right = written is not None and normal(written, ignore_case=config.ignore_case) in accepted
    return RewardOutput(
        reward=float(is_right),
        lenient=float(is_right or last_line in accepted),
        metrics={"answered": float(bool(written))},
    )


def normal(text: str, *, ignore_case: bool) -> str:
    """One space between words, none around, no full stop at the end."""
    text = " ".join(text.split()).removesuffix(".").rstrip()
    return text.casefold() if ignore_case else text


def _written(response: str, marker: str | None) -> str | None:
    if not marker:
        return response
    _, found, after = response.rpartition(marker)
    lines = after.strip().splitlines()
    return (lines[0] if lines else "") if found else None
