"""The numbers of one GRPO step that its responses alone decide."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_sftrl.rl.advantages import logprob_mismatch, mean_pass_at_k, reward_statistics
from megatron_sftrl.rl.rewards import reward_metrics
from megatron_sftrl.trainers.experience import Response, first_rewards, grouped, known_rewards
from megatron_sftrl.trainers.rollouts import Collected

SUCCESS = 0.5
"""A response succeeds when the first reward of the run gives it at least this, before its weight."""

HELD_OUT = tuple(
    f"valid/{name}"
    for name in (
        "reward/mean",
        "reward/lenient_mean",
        "reward/pass_at_1",
        "reward/unscored",
        "rollout/response_tokens",
    )
)
"""What an evaluation on held-out prompts measures."""


def response_metrics(collected: Collected) -> dict[str, float]:
    """Rewards, pass@k and lengths over everything that was generated, left-out groups included.

    A response without a reward is neither right nor wrong. It is left out of every number about rewards but
    its own, reward/unscored, and pass@k is over the groups of which k responses have one. A number that no
    response is left for is not there.
    """
    responses = collected.generated
    lengths = [len(each.rollout.response_tokens) for each in responses]
    return {
        **_reward_numbers(responses),
        **reward_metrics([each.scored for each in responses]),
        "rollout/prompts": len(grouped(responses)),
        "rollout/trained_responses": sum(each.scored.reward is not None for each in collected.responses),
        "rollout/response_tokens": sum(lengths) / len(lengths),
        "rollout/longest_response": max(lengths),
        "rollout/truncated": sum(not each.rollout.is_finished for each in responses) / len(responses),
    }


def _reward_numbers(responses: Sequence[Response]) -> dict[str, float]:
    """Spread of the rewards, and how often the first one says that a response is right."""
    numbers: dict[str, float] = {}
    if rewards := known_rewards(responses):
        statistics = reward_statistics(rewards)
        numbers["reward/std"] = statistics.std
        numbers["reward/zero_variance_groups"] = statistics.num_zero_variance_groups / statistics.num_groups
    successes = {
        group: [reward >= SUCCESS for reward in rewards]
        for group, rewards in first_rewards(responses).items()
    }
    for k in {1, min(map(len, grouped(responses).values()))}:
        if large := {group: found for group, found in successes.items() if len(found) >= k}:
            numbers[f"reward/pass_at_{k}"] = mean_pass_at_k(large, k)
    return numbers


def filling_metrics(collected: Collected, *, wanted: int) -> dict[str, float]:
    """How dynamic sampling filled the step; nothing without it.

    Args:
        collected: of the step.
        wanted: groups of a full step.
    Returns:
        rollout/rounds of generation; rollout/useful_groups, the share of the groups whose first rewards
        differ; rollout/filled, groups that are trained on over `wanted`; rollout/put_back, prompts that the
        next step draws again.
    """
    if not collected.num_rounds:
        return {}
    draws = collected.draws
    return {
        "rollout/rounds": collected.num_rounds,
        "rollout/useful_groups": draws.useful / draws.drawn,
        "rollout/filled": len(grouped(collected.responses)) / wanted,
        "rollout/put_back": draws.drawn - collected.num_prompts,
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
