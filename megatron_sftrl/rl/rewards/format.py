"""format: 1 if a regular expression matches the whole response, else 0.

The default is the format of DeepSeek-R1 (arXiv:2501.12948, table 1): one block of thinking, one of answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from pydantic import model_validator

from megatron_sftrl.errors import UserError
from megatron_sftrl.rl.rewards.api import Canary, RewardConfig, RewardInputs, RewardOutput
from megatron_sftrl.rl.rewards.registry import register_reward

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


def examples(config: FormatConfig) -> Sequence[Canary]:
    """The user's example, and texts that no format worth a reward has."""
    wrong = ("", "I am fairly sure that it is 2.", config.example * 2)
    return [Canary(response=config.example, is_right=True)] + [
        Canary(response=response, is_right=False) for response in wrong
    ]


@register_reward("format", config=FormatConfig, canaries=examples)
def format(inputs: RewardInputs, config: FormatConfig) -> RewardOutput:
    """1 if the whole response matches, else 0."""
    return RewardOutput(reward=float(bool(re.fullmatch(config.pattern, inputs.response, re.DOTALL))))
