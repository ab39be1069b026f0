"""Numbers that say how a batch of rollouts went: rewards, pass@k, and how far engine and trainer disagree."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from megatron_sftrl.errors import UserError
from megatron_sftrl.rl.advantages import check_rewards, is_uninformative

GroupT = TypeVar("GroupT", bound=Hashable)


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The probability that at least one of k responses is right, from n responses of which c are.

        1 - C(n - c, k) / C(n, k)          unbiased for every k <= n          (arXiv:2107.03374, eq. 1)

    Counted in integers: no cancellation and no overflow for any n.

    Args:
        num_samples: n.
        num_correct: c, in 0..n.
        k: in 1..n.
    Raises:
        UserError: k or c out of range.
    """
    if not (0 <= num_correct <= num_samples and 1 <= k <= num_samples):
        raise UserError(
            "pass_at_k: expected 0 <= correct <= samples and 1 <= k <= samples, got "
            f"{num_correct} correct of {num_samples}, k = {k}; generate at least k responses per prompt"
        )
    ways = math.comb(num_samples, k)
    return (ways - math.comb(num_samples - num_correct, k)) / ways


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardStatistics:
    """Of one batch of groups.

    Args:
        mean, std: over all responses; std of the sample (n - 1), 0 for one response.
        num_groups: groups in all.
        num_zero_variance_groups: groups whose rewards are all equal: they have no gradient.
    """

    mean: float
    std: float
    num_groups: int
    num_zero_variance_groups: int


def reward_statistics(groups: Mapping[GroupT, Sequence[float]]) -> RewardStatistics:
    """Summarise the rewards of a batch.

    Args:
        groups: rewards by group id.
    Raises:
        UserError: no groups, an empty group, a reward that is not finite.
    """
    check_rewards(groups)
    rewards = [reward for group in groups.values() for reward in group]
    mean = math.fsum(rewards) / len(rewards)
    variance = math.fsum((reward - mean) ** 2 for reward in rewards) / max(len(rewards) - 1, 1)
    return RewardStatistics(
        mean=mean,
        std=math.sqrt(variance),
        num_groups=len(groups),
        num_zero_variance_groups=sum(is_uninformative(group) for group in groups.values()),
    )


def mean_pass_at_k(groups: Mapping[GroupT, Sequence[bool]], k: int) -> float:
    """pass@k averaged over groups; every group counts once, whatever its size.

    Args:
        groups: by group id, whether each response is right.
        k: at most the size of the smallest group.
    Raises:
        UserError: no groups, or a group of fewer than k responses.
    """
    if not groups:
        raise UserError("mean_pass_at_k: expected at least one group, got none")
    values = [pass_at_k(len(group), sum(map(bool, group)), k) for group in groups.values()]
    return math.fsum(values) / len(values)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogprobMismatch:
    """How far two computations of the same log-probabilities are apart.

    Args:
        mean, maximum, percentile_999: of |difference|, nats; the 99.9th percentile is the smallest value
            that at least 99.9 % of the tokens do not exceed.
        multiplicative_error: mean of exp(|difference|), 1 when equal. NeMo-RL's token_mult_prob_error (its
            guide "Adding New Models"), which calls more than 1.05 a problem. It is the mean of the
            exponentials, at least exp(mean): few tokens far apart weigh more.
        num_tokens: compared.
    """

    mean: float
    maximum: float
    percentile_999: float
    multiplicative_error: float
    num_tokens: int


def logprob_mismatch(first: Tensor, second: Tensor, loss_mask: Tensor) -> LogprobMismatch:
    """Compare two [T] vectors of log-probabilities, nats, over the loss tokens.

    A NaN or infinity on a loss token is an infinite difference, so that a threshold sees it; equal
    infinities are no exception, since neither can be trained on. What stands at masked positions is not
    looked at.

    Args:
        first, second: [T] floating point; the order does not matter.
        loss_mask: [T] bool.
    Raises:
        UserError: shapes that differ, or no loss token.
    """
    if not first.shape == second.shape == loss_mask.shape:
        raise UserError(
            f"logprob_mismatch: expected three vectors of one shape, got {list(first.shape)}, "
            f"{list(second.shape)} and {list(loss_mask.shape)}"
        )
    apart = (first.detach().double() - second.detach().double()).abs()[loss_mask.bool()]
    if apart.numel() == 0:
        raise UserError("logprob_mismatch: expected at least one loss token, got none; check the loss masks")
    apart = apart.nan_to_num(nan=torch.inf, posinf=torch.inf).sort().values
    rank = math.ceil(0.999 * apart.numel()) - 1  # not torch.quantile: it refuses 2^24 values and more
    return LogprobMismatch(
        mean=apart.mean().item(),
        maximum=apart[-1].item(),
        percentile_999=apart[rank].item(),
        multiplicative_error=apart.exp().mean().item(),
        num_tokens=apart.numel(),
    )
