"""Advantages: how much better a response was than the other responses to its prompt.

Groups are mappings from the group's id to its rewards, so that nothing depends on which responses stand next
to each other, on their order of arrival, or on groups being of one size. Sums are exact (math.fsum) and in
float64: a group whose rewards are all equal gets exactly 0, never rounding noise divided by rounding noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor

from megatron_sftrl.errors import UserError

GroupT = TypeVar("GroupT", bound=Hashable)
AdvantageEstimator = Literal["group_normalized", "dr_grpo", "leave_one_out"]

STD_EPS = 1e-6
"""Added to a group's standard deviation, in units of reward (arXiv:2402.03300 leaves it open)."""

LARGEST_REWARD = 1e32
"""Sums and squares of such rewards are finite, and so are advantages in fp32."""


def group_advantages(
    groups: Mapping[GroupT, Sequence[float]], estimator: AdvantageEstimator
) -> dict[GroupT, list[float]]:
    """The advantage of every response, by the estimator's name; 0 in groups of one or of equal rewards.

    Rewards have any unit and groups any size.

    Raises:
        UserError: no groups, a group without responses, a reward that is not finite, an unknown estimator.
    """
    functions: dict[str, Callable[[Sequence[float]], list[float]]] = {
        "group_normalized": group_normalized,
        "dr_grpo": dr_grpo,
        "leave_one_out": leave_one_out,
    }
    if estimator not in functions:
        raise UserError(f"advantages: expected one of {', '.join(functions)}, got {estimator!r}")
    check_rewards(groups)
    return {group: functions[estimator](rewards) for group, rewards in groups.items()}


def group_normalized(rewards: Sequence[float]) -> list[float]:
    """A_i = (r_i - mean) / (std + 1e-6)                                       (GRPO, arXiv:2402.03300)

    std is the sample standard deviation (n - 1), as in TRL, verl and OpenRLHF, which call torch.std; the
    paper does not say which. For 8 responses the population's would make advantages 7 % larger.
    """
    centered = dr_grpo(rewards)
    if not any(centered):
        return centered
    std = math.sqrt(math.fsum(value * value for value in centered) / (len(centered) - 1))
    return [value / (std + STD_EPS) for value in centered]


def dr_grpo(rewards: Sequence[float]) -> list[float]:
    """A_i = r_i - mean                                                    (Dr. GRPO, arXiv:2503.20783)

    Without the division by std, prompts that are nearly always or nearly never solved do not count more.
    """
    if is_uninformative(rewards):
        return [0.0] * len(rewards)
    mean = math.fsum(rewards) / len(rewards)
    return [reward - mean for reward in rewards]


def leave_one_out(rewards: Sequence[float]) -> list[float]:
    """A_i = r_i - mean of the others = n / (n - 1) (r_i - mean)                (RLOO, arXiv:2402.14740)

    The baseline does not contain the response itself, so that the gradient is unbiased.
    """
    scale = len(rewards) / max(len(rewards) - 1, 1)
    return [scale * value for value in dr_grpo(rewards)]


def is_uninformative(rewards: Sequence[float]) -> bool:
    """All rewards are equal: no response was better than another. True for one response and for none."""
    return len(rewards) < 2 or min(rewards) == max(rewards)


def check_rewards(groups: Mapping[GroupT, Sequence[float]]) -> None:
    """Refuse what no estimator can use.

    Raises:
        UserError: no groups, a group without responses, or a reward that is not finite or so large that its
            square is not, by its place.
    """
    if not groups:
        raise UserError("advantages: expected at least one group of responses, got none; check the prompts")
    for group, rewards in groups.items():
        if not rewards:
            raise UserError(
                f"advantages: group {group!r} has no responses; leave it out, or generate for its prompt "
                "again"
            )
        for sample, reward in enumerate(rewards):
            if not abs(reward) <= LARGEST_REWARD:
                raise UserError(
                    f"advantages: group {group!r}, sample {sample}: expected a finite reward of at most "
                    f"{LARGEST_REWARD:g} in size, got {reward}; leave a sample out that its verifier could "
                    "not judge"
                )


# Which groups of responses are trained on: those in which one was better than another. They are found by id,
# never by position: responses of one prompt may arrive apart from each other, late, or in part only.

ValueT = TypeVar("ValueT")


def by_group(group_ids: Sequence[GroupT], values: Sequence[ValueT]) -> dict[GroupT, list[ValueT]]:
    """The values of each group: groups by first appearance, values in the order given.

    Raises:
        UserError: not one value per id.
    """
    if len(group_ids) != len(values):
        raise UserError(
            f"by_group: expected one value per id, got {len(group_ids)} ids, {len(values)} values"
        )
    groups: dict[GroupT, list[ValueT]] = {}
    for group, value in zip(group_ids, values, strict=True):
        groups.setdefault(group, []).append(value)
    return groups


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSelection(Generic[GroupT]):
    """The outcome of dynamic sampling: ids of groups whose rewards differ, in their order, and of the others.

    With nothing kept there is nothing to learn: sample again, or skip the step.
    """

    kept: tuple[GroupT, ...]
    dropped: tuple[GroupT, ...]


def informative_groups(groups: Mapping[GroupT, Sequence[float]]) -> GroupSelection[GroupT]:
    """Keep the groups in which some response did better than another     (dynamic sampling, arXiv:2503.14476)

    The paper keeps a prompt when 0 < number correct < G; for rewards that are not 0 or 1 that is: when they
    are not all equal. [1, 0, 0, 0] is kept whatever the advantage estimator: its single success is what
    there is to learn. A group that came back in part and has one response is dropped.

    Raises:
        UserError: no groups, an empty group, a reward that is not finite.
    """
    check_rewards(groups)
    kept = tuple(group for group, rewards in groups.items() if not is_uninformative(rewards))
    dropped = tuple(group for group, rewards in groups.items() if is_uninformative(rewards))
    return GroupSelection(kept=kept, dropped=dropped)


# Numbers that say how a batch of rollouts went: rewards, pass@k, and how far engine and trainer disagree.


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The probability that at least one of k responses is right, from n responses of which c are.

        1 - C(n - c, k) / C(n, k)          unbiased for every k <= n          (arXiv:2107.03374, eq. 1)

    Counted in integers: no cancellation and no overflow for any n.

    Raises:
        UserError: k not in 1..n or c not in 0..n.
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
    """Of one batch; std of the sample (n - 1), 0 for one response; zero-variance groups have no gradient."""

    mean: float
    std: float
    num_groups: int
    num_zero_variance_groups: int


def reward_statistics(groups: Mapping[GroupT, Sequence[float]]) -> RewardStatistics:
    """Summarise the rewards of a batch.

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
    """pass@k averaged over groups of right or wrong responses; every group counts once, whatever its size.

    Raises:
        UserError: no groups, or a group of fewer than k responses.
    """
    if not groups:
        raise UserError("mean_pass_at_k: expected at least one group, got none")
    values = [pass_at_k(len(group), sum(map(bool, group)), k) for group in groups.values()]
    return math.fsum(values) / len(values)


def mean_of_top_fifth(entropies: Sequence[float]) -> float:
    """Mean of the highest fifth of them, rounded up to whole tokens: of the tokens that decide most.

    In RL with verifiable rewards nearly all of the gain comes from the fifth of the tokens with the highest
    entropy (arXiv:2506.01939, which takes them of a micro-batch; here they are of all that is given).
    """
    count = math.ceil(len(entropies) / 5)
    return float(torch.tensor(entropies, dtype=torch.float64).topk(count).values.mean())


@dataclass(frozen=True, slots=True, kw_only=True)
class LogprobMismatch:
    """How far two computations of the same log-probabilities are apart.

    Args:
        mean, maximum, percentile_999: of |difference|, nats; the 99.9th percentile is the smallest value
            that at least 99.9 % of the tokens do not exceed.
        multiplicative_error: mean of exp(|difference|), 1 when equal. NeMo-RL's token_mult_prob_error (its
            guide "Adding New Models"), which calls more than 1.05 a problem. It is the mean of the
            exponentials, at least exp(mean): few tokens far apart weigh more.
    """

    mean: float
    maximum: float
    percentile_999: float
    multiplicative_error: float
    num_tokens: int


def logprob_mismatch(first: Tensor, second: Tensor, loss_mask: Tensor) -> LogprobMismatch:
    """Compare two [T] vectors of log-probabilities, nats, over the loss tokens; their order does not matter.

    A NaN or infinity on a loss token is an infinite difference, so that a threshold sees it; equal
    infinities are no exception, since neither can be trained on. Masked positions are not looked at.

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
