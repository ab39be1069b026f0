"""length: DAPO's soft punishment of long responses (arXiv:2503.14476, equation 13), in tokens.

    R(y) = 0                                  |y| <= max_tokens - cache
           (max_tokens - cache - |y|) / cache  in between
           -1                                 |y| > max_tokens

|y| counts the end token. A rollout that stops at max_tokens never exceeds it, and gets -1 there as well: the
middle line ends at -1.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field, model_validator

from megatron_sftrl.errors import UserError
from megatron_sftrl.rl.rewards.api import Canary, RewardConfig, RewardInputs, RewardOutput
from megatron_sftrl.rl.rewards.registry import register_reward


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


def examples(config: LengthConfig) -> Sequence[Canary]:
    """The longest length without punishment, and the two ends of it."""
    free = config.max_tokens - config.cache
    return [
        Canary(response="", num_response_tokens=tokens, is_right=tokens <= free)
        for tokens in (free, free + 1, config.max_tokens, config.max_tokens + 1)
    ]


@register_reward("length", config=LengthConfig, canaries=examples)
def length(inputs: RewardInputs, config: LengthConfig) -> RewardOutput:
    """Between 0 (short enough) and -1 (longer than the limit)."""
    overlong = inputs.num_response_tokens - (config.max_tokens - config.cache)
    return RewardOutput(reward=0.0 - min(max(overlong / config.cache, 0.0), 1.0))
