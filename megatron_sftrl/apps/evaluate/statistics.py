"""Numbers of an evaluation with their intervals: what was drawn again are prompts, not responses.

Responses to one prompt are alike, so that an interval over responses would be too narrow by far.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_sftrl.errors import UserError
from megatron_sftrl.rl.advantages import mean_of_top_fifth, pass_at_k

_NUM_RESAMPLES = 2000
_AT_ONCE = 2**22
"""Drawn indices that are held at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over prompts and its interval of 95 % by the percentile bootstrap; None of one prompt alone."""

    value: float
    low: float | None
    high: float | None
    num_prompts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One response as it is counted.

    Args:
        is_right: by the first reward's strict reading; None where it could not be judged.
        is_right_leniently: by its lenient reading.
        answer: what the first reward read as the answer; None where it says none.
        entropies: of the policy at temperature 1 at each token, in nats; none of a greedy response.
    """

    is_right: bool | None
    is_right_leniently: bool | None
    answer: str | None
    rewards: Mapping[str, float | None]
    tokens: Sequence[int]
    entropies: Sequence[float]
    is_finished: bool


def estimate(values: Sequence[float], *, seed: int, weights: Sequence[int] | None = None) -> Estimate:
    """The mean of one value for each prompt, and where 95 % of the means of redrawn prompts lie.

    `weights` are how often each value counts: tokens of a row, where the values are means over them.

    Raises:
        UserError: no values.
    """
    if not values:
        raise UserError("estimate: expected a value for at least one prompt, got none")
    numbers = np.asarray(values, np.float64)
    counts = np.ones_like(numbers) if weights is None else np.asarray(weights, np.float64)
    low = high = None
    if len(numbers) > 1:
        means = _redrawn_means(numbers * counts, seed) / _redrawn_means(counts, seed)
        low, high = (float(each) for each in np.percentile(means, [2.5, 97.5]))
    value = math.fsum((numbers * counts).tolist()) / math.fsum(counts.tolist())
    return Estimate(value=value, low=low, high=high, num_prompts=len(values))


def _redrawn_means(values: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    generator = np.random.default_rng(seed)
    size = max(1, _AT_ONCE // len(values))
    means = []
    for start in range(0, _NUM_RESAMPLES, size):
        count = min(size, _NUM_RESAMPLES - start)
        means.append(values[generator.integers(len(values), size=(count, len(values)))].mean(axis=1))
    return np.concatenate(means)


def measure(answers: Sequence[Sequence[Answer]], *, ks: Sequence[int], seed: int) -> dict[str, Estimate]:
    """Every number of an evaluation with its interval, as per_prompt; one that no prompt has is left out."""
    found = {
        name: [value for value in values if value is not None]
        for name, values in per_prompt(answers, ks=ks).items()
    }
    return {name: estimate(values, seed=seed) for name, values in found.items() if values}


def per_prompt(answers: Sequence[Sequence[Answer]], *, ks: Sequence[int]) -> dict[str, list[float | None]]:
    """Every number of an evaluation, one value for each prompt; `answers` are those to each prompt.

        accuracy, lenient      share of right responses to a prompt, by the strict and the lenient reading
        pass@k                 E[1 - C(n - c, k) / C(n, k)], c right of n judged (arXiv:2107.03374)
        majority@n             share of prompts whose most frequent answer is right, ties counted by their
                               share; not there where the first reward names no answers
        reward/NAME            mean of each reward
        entropy                the policy's at temperature 1 where tokens were drawn, over the whole
                               vocabulary, in nats: mean over the tokens of all responses to the prompt
        entropy/top_fifth      mean over the fifth of them with the highest entropy (rl.advantages)
        tokens, finished       length with the end token, share that reached it
        repetition             share of a response's runs of four tokens that it has had before
        unjudged               share of responses that the first reward could not judge

    Responses that were not judged count in none of the first three. None where a prompt has no such number.

    Raises:
        UserError: a k above the number of responses to a prompt.
    """
    fewest = min(map(len, answers))
    if wrong := [k for k in ks if not 1 <= k <= fewest]:
        raise UserError(f"k: expected 1 to {fewest}, the responses to a prompt, got {wrong[0]}")
    found: dict[str, list[float | None]] = {
        "accuracy": [_share(group, lambda each: each.is_right) for group in answers],
        "lenient": [_share(group, lambda each: each.is_right_leniently) for group in answers],
    }
    for k in ks:
        found[f"pass@{k}"] = [_pass_at(group, k) for group in answers]
    if ks and any(each.answer is not None for group in answers for each in group):
        found[f"majority@{fewest}"] = [_majority(group) for group in answers]
    for name in answers[0][0].rewards:
        found[f"reward/{name}"] = [_share(group, lambda each, n=name: each.rewards[n]) for group in answers]
    drawn = [[value for each in group for value in each.entropies] for group in answers]
    found["entropy"] = [math.fsum(group) / len(group) if group else None for group in drawn]
    found["entropy/top_fifth"] = [mean_of_top_fifth(group) if group else None for group in drawn]
    found["tokens"] = [_share(group, lambda each: len(each.tokens)) for group in answers]
    found["finished"] = [_share(group, lambda each: each.is_finished) for group in answers]
    found["repetition"] = [_share(group, lambda each: repetition(each.tokens)) for group in answers]
    found["unjudged"] = [_share(group, lambda each: each.is_right is None) for group in answers]
    return found


def measure_demonstrations(
    logprobs: Sequence[Sequence[float]], kls: Sequence[Sequence[float]] = (), *, seed: int
) -> dict[str, Estimate]:
    """How likely held-out demonstrations are, and how far from a base the policy is on them.

    nll/token is the mean over all learned tokens, nll/sequence the mean over sequences of their sums;
    kl_to_base, where there is a base, the mean over all learned tokens of KL(policy || base), in nats.

    Args:
        logprobs, kls: nats of each sequence's learned tokens.
    """
    sums = [-math.fsum(each) for each in logprobs]
    lengths = [len(each) for each in logprobs]
    per_token = [total / length for total, length in zip(sums, lengths, strict=True)]
    found = {
        "nll/token": estimate(per_token, seed=seed, weights=lengths),
        "nll/sequence": estimate(sums, seed=seed),
    }
    if kls:
        means = [math.fsum(each) / len(each) for each in kls]
        found["kl_to_base"] = estimate(means, seed=seed, weights=lengths)
    return found


def _share(group: Sequence[Answer], of: Callable[[Answer], float | None]) -> float | None:
    """Mean over the responses to a prompt that have the number."""
    values = [float(value) for each in group if (value := of(each)) is not None]
    return math.fsum(values) / len(values) if values else None


def _pass_at(group: Sequence[Answer], k: int) -> float | None:
    judged = [each.is_right for each in group if each.is_right is not None]
    return pass_at_k(len(judged), sum(judged), k) if len(judged) >= k else None


def _majority(group: Sequence[Answer]) -> float | None:
    """Whether the answer that most responses give is right; of several such answers, their share that is.

    Responses without an answer do not vote. Where equal answers were judged differently, the share that is
    right counts.
    """
    judged = [each for each in group if each.is_right is not None]
    votes = Counter(each.answer for each in judged if each.answer is not None)
    if not votes:
        return 0.0 if judged else None
    first = [answer for answer, count in votes.items() if count == max(votes.values())]
    voters = [[each for each in judged if each.answer == answer] for answer in first]
    return math.fsum(sum(bool(each.is_right) for each in same) / len(same) for same in voters) / len(first)


def repetition(tokens: Sequence[int], length: int = 4) -> float:
    """The share of the runs of `length` tokens that stood in the response before; 0 of a shorter one."""
    runs = [tuple(tokens[start : start + length]) for start in range(len(tokens) - length + 1)]
    return 1.0 - len(set(runs)) / len(runs) if runs else 0.0
