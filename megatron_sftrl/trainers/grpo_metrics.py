"""The numbers of one GRPO step that its responses alone decide."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_sftrl.rl.rewards import reward_metrics
from megatron_sftrl.rl.statistics import logprob_mismatch, mean_pass_at_k, reward_statistics
from megatron_sftrl.trainers.experience import Response, grouped
from megatron_sftrl.trainers.rollouts import Collected

SUCCESS = 0.5
"""A response succeeds when the first reward of the run gives it at least this, before its weight."""

HELD_OUT = tuple(
    f"valid/{name}"
    for name in ("reward/mean", "reward/lenient_mean", "reward/pass_at_1", "rollout/response_tokens")
)
"""What an evaluation on held-out prompts measures."""


def response_metrics(collected: Collected) -> dict[str, float]:
    """Rewards, pass@k and lengths over everything that was generated, left-out groups included."""
    responses = collected.generated
    groups = grouped(responses)
    statistics = reward_statistics(
        {group: [each.scored.reward for each in members] for group, members in groups.items()}
    )
    successes = {
        group: [each.scored.parts[0].reward >= SUCCESS for each in members]
        for group, members in groups.items()
    }
    size = min(map(len, groups.values()))
    lengths = [len(each.rollout.response_tokens) for each in responses]
    return {
        "reward/std": statistics.std,
        "reward/zero_variance_groups": statistics.num_zero_variance_groups / statistics.num_groups,
        "reward/pass_at_1": mean_pass_at_k(successes, 1),
        f"reward/pass_at_{size}": mean_pass_at_k(successes, size),
        **reward_metrics([each.scored for each in responses]),
        "rollout/prompts": collected.num_prompts,
        "rollout/trained_responses": len(collected.responses),
        "rollout/response_tokens": sum(lengths) / len(lengths),
        "rollout/longest_response": max(lengths),
        "rollout/truncated": sum(not each.rollout.is_finished for each in responses) / len(responses),
    }


def mismatch_metrics(responses: Sequence[Response]) -> dict[str, float]:
    """How far the engine's log-probabilities are from the trainer's, over all generated tokens.

    Args:
        responses: with old_logprobs.
    """
    ours = torch.tensor([value for each in responses for value in each.old_logprobs])
    engine = torch.tensor([value for each in responses for value in each.rollout.logprobs])
    found = logprob_mismatch(ours, engine, torch.ones_like(ours, dtype=torch.bool))
    return {
        "mismatch/mean": found.mean,
        "mismatch/max": found.maximum,
        "mismatch/p999": found.percentile_999,
        "mismatch/multiplicative_error": found.multiplicative_error,
    }
