"""The numbers of one GRPO step that its responses alone decide."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_sftrl.rl.advantages import (
    logprob_mismatch,
    mean_of_top_fifth,
    mean_pass_at_k,
    reward_statistics,
)
from megatron_sftrl.rl.rewards import reward_metrics
from megatron_sftrl.trainers.experience import Response, first_rewards, grouped, known_rewards, sampled
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

    Demonstrations are no responses of the policy: they count in reward/zero_variance_groups, whose groups
    they are members of, and their own mean reward is reward/demonstrations.

    A response without a reward is neither right nor wrong. It is left out of every number about rewards but
    its own, reward/unscored, and pass@k is over the groups of which k responses have one. A number that no
    response is left for is not there.
    """
    responses = sampled(collected.generated)
    lengths = [len(each.rollout.response_tokens) for each in responses]
    return {
        **_reward_numbers(collected.generated),
        **reward_metrics([each.scored for each in responses]),
        "rollout/prompts": len(grouped(responses)),
        "rollout/trained_responses": sum(
            each.scored.reward is not None for each in sampled(collected.responses)
        ),
        "rollout/response_tokens": sum(lengths) / len(lengths),
        "rollout/longest_response": max(lengths),
        "rollout/truncated": sum(not each.rollout.is_finished for each in responses) / len(responses),
    }


def _reward_numbers(members: Sequence[Response]) -> dict[str, float]:
    """Spread of the rewards, and how often the first one says that a response is right."""
    numbers: dict[str, float] = {}
    responses = sampled(members)
    if rewards := known_rewards(responses):
        numbers["reward/std"] = reward_statistics(rewards).std
    if rewards := known_rewards(members):
        whole = reward_statistics(rewards)
        numbers["reward/zero_variance_groups"] = whole.num_zero_variance_groups / whole.num_groups
    shown = [each.scored.reward for each in members if each.is_demonstration]
    if known := [reward for reward in shown if reward is not None]:
        numbers["reward/demonstrations"] = sum(known) / len(known)
    judged = [each.scored for each in responses if each.scored.first is not None]
    if judged:
        lenient = sum(each.parts[0].lenient >= SUCCESS for each in judged)
        strict = sum(each.parts[0].reward >= SUCCESS for each in judged)
        numbers["reward/format_loss"] = (lenient - strict) / len(judged)
    successes = {
        group: [reward >= SUCCESS for reward in rewards]
        for group, rewards in first_rewards(responses).items()
    }
    for k in {1, min(map(len, grouped(responses).values()))}:
        if large := {group: found for group, found in successes.items() if len(found) >= k}:
            numbers[f"reward/pass_at_{k}"] = mean_pass_at_k(large, k)
    return numbers


def filling_metrics(collected: Collected, *, wanted: int) -> dict[str, float]:
    """How dynamic sampling filled the step of `wanted` groups; nothing without it.

    rollout/rounds of generation; rollout/useful_groups, the share of the groups whose first rewards differ;
    rollout/filled, groups that are trained on over `wanted`; rollout/put_back, prompts that the next step
    draws again.
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


def uncertain_entropy(responses: Sequence[Response]) -> float:
    """rollout/entropy_top_fifth: mean over the fifth of a step's tokens with the highest entropy, in nats.

    Of the tokens that are learned, before the first update, at the sampling temperature.
    arXiv:2606.18487 speaks of worst-token entropy; that these tokens are meant is our reading.
    """
    return mean_of_top_fifth([value for each in responses for value in each.entropies])


def mismatch_metrics(responses: Sequence[Response]) -> dict[str, float]:
    """How far the engine's log-probabilities are from old_logprobs, over the tokens of these responses."""
    responses = sampled(responses)
    ours = torch.tensor([value for each in responses for value in each.old_logprobs])
    engine = torch.tensor([value for each in responses for value in each.rollout.logprobs])
    found = logprob_mismatch(ours, engine, torch.ones_like(ours, dtype=torch.bool))
    return {
        "mismatch/mean": found.mean,
        "mismatch/max": found.maximum,
        "mismatch/p999": found.percentile_999,
        "mismatch/multiplicative_error": found.multiplicative_error,
    }


def staleness(responses: Sequence[Response], *, step: int) -> float:
    """rollout/staleness: mean over the responses of the steps between the weights that sampled and `step`'s.

    Args:
        responses: at least one that the policy has sampled.
        step: steps behind the weights that are trained first.
    """
    behind = [step - each.version for each in sampled(responses)]
    return sum(behind) / len(behind)
