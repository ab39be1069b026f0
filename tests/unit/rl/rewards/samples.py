"""Samples to score, in one line."""

from __future__ import annotations

from megatron_sftrl.rl.rewards import RewardInputs
from megatron_sftrl.rl.rewards.registry import Json


def sample(response: str, *, tokens: int = 1, prompt: str = "", **row: Json) -> RewardInputs:
    """A finished response to a row with the given keys."""
    return RewardInputs(
        prompt=prompt, response=response, row=row, num_response_tokens=tokens, is_finished=True
    )
