"""Rewards of the text itself: exact_match, format, length."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from pydantic import Field, model_validator

from megatron_sftrl.errors import UserError
from megatron_sftrl.rl.rewards.registry import (
    Canary,
    Json,
    RewardConfig,
    RewardInputs,
    RewardOutput,
    register_reward,
)

# exact_match: the text behind a marker is the answer, up to spaces and capitals.
#
#     reward  = 1 if the text behind the last marker, up to the line's end, is row["answer"], else 0
#     lenient = reward, or 1 if the last line of the response is
#
# row["answer"] is one answer or a list of accepted ones.


class ExactMatchConfig(RewardConfig):
    marker: str | None = "Answer:"
    """Text before the answer, found as written; null: the whole response is the answer."""
    ignore_case: bool = True
    """Capital and small letters are the same."""


def exact_match_examples(config: ExactMatchConfig) -> Sequence[Canary]:
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

    UserError for another kind of value, no answer, or an empty one, which no answer at all would match.
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
    canaries=exact_match_examples,
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
        answer=None if written is None else normal(written, ignore_case=config.ignore_case),
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


# format: 1 if a regular expression matches the whole response, else 0. The default is the format of
# DeepSeek-R1 (arXiv:2501.12948, table 1): one block of thinking, one of answer.

THINK_THEN_ANSWER = (
    r"\s*<think>(?:(?!</?think>|</?answer>).)*</think>"
    r"\s*<answer>(?:(?!</?think>|</?answer>).)*</answer>\s*"
)


class FormatConfig(RewardConfig):
    pattern: str = THINK_THEN_ANSWER
    """Python regular expression for the response from its first to its last character; a dot matches the
    ends of lines too."""
    example: str = "<think>\n1 + 1 = 2\n</think>\n<answer>2</answer>"
    """A response that has the format; it must match, which is checked before the run."""

    @model_validator(mode="after")
    def _example_matches(self) -> FormatConfig:
        try:
            pattern = re.compile(self.pattern, re.DOTALL)
        except re.error as error:
            raise UserError(f"pattern {self.pattern!r} is no regular expression: {error}") from None
        if not pattern.fullmatch(self.example):
            raise UserError(
                f"pattern {self.pattern!r} does not match the example {self.example!r}; give as `example` "
                "a response that it should match, or correct the pattern"
            )
        return self


def format_examples(config: FormatConfig) -> Sequence[Canary]:
    """The user's example, and texts that no format worth a reward has."""
    wrong = ("", "I am fairly sure that it is 2.", config.example * 2)
    return [Canary(response=config.example, is_right=True)] + [
        Canary(response=response, is_right=False) for response in wrong
    ]


@register_reward("format", config=FormatConfig, canaries=format_examples)
def format(inputs: RewardInputs, config: FormatConfig) -> RewardOutput:
    """1 if the whole response matches, else 0."""
    return RewardOutput(reward=float(bool(re.fullmatch(config.pattern, inputs.response, re.DOTALL))))


# length: DAPO's soft punishment of long responses (arXiv:2503.14476, equation 13), in tokens.
#
#     R(y) = 0                                  |y| <= max_tokens - cache
#            (max_tokens - cache - |y|) / cache  in between
#            -1                                 |y| > max_tokens
#
# |y| counts the end token. A rollout that stops at max_tokens never exceeds it, and gets -1 there as well:
# the middle line ends at -1.


class LengthConfig(RewardConfig):
    max_tokens: int = Field(ge=1)
    """Longest response, in tokens: the most that the rollout generates."""
    cache: int = Field(ge=1)
    """The last tokens before max_tokens, over which the punishment rises from 0 to 1."""

    @model_validator(mode="after")
    def _cache_fits(self) -> LengthConfig:
        if self.cache > self.max_tokens:
            raise UserError(f"cache {self.cache} is above max_tokens {self.max_tokens}; lower cache")
        return self


def length_examples(config: LengthConfig) -> Sequence[Canary]:
    """The longest length without punishment, and the two ends of it."""
    free = config.max_tokens - config.cache
    return [
        Canary(response="", num_response_tokens=tokens, is_right=tokens <= free)
        for tokens in (free, free + 1, config.max_tokens, config.max_tokens + 1)
    ]


@register_reward("length", config=LengthConfig, canaries=length_examples)
def length(inputs: RewardInputs, config: LengthConfig) -> RewardOutput:
    """Between 0 (short enough) and -1 (longer than the limit)."""
    overlong = inputs.num_response_tokens - (config.max_tokens - config.cache)
    return RewardOutput(reward=0.0 - min(max(overlong / config.cache, 0.0), 1.0))
