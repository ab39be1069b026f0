"""Advantages: how much better a response was than the other responses to its prompt.

Groups are mappings from the group's id to its rewards, so that nothing depends on which responses stand next
to each other, on their order of arrival, or on groups being of one size. Sums are exact (math.fsum) and in
float64: a group whose rewards are all equal gets exactly 0, never rounding noise divided by rounding noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Literal, TypeVar

from megatron_sftrl.errors import UserError

GroupT = TypeVar("GroupT", bound=Hashable)
AdvantageEstimator = Literal["group_normalized", "dr_grpo", "leave_one_out"]

STD_EPS = 1e-6
"""Added to a group's standard deviation, in units of reward (METHODS: arXiv:2402.03300 leaves it open)."""

LARGEST_REWARD = 1e32
"""Sums and squares of such rewards are finite, and so are advantages in fp32."""


def group_advantages(
    groups: Mapping[GroupT, Sequence[float]], estimator: AdvantageEstimator
) -> dict[GroupT, list[float]]:
    """The advantage of every response, by the estimator's name.

    Args:
        groups: rewards by group id, in any unit; sizes may differ.
        estimator: group_normalized, dr_grpo or leave_one_out.
    Returns:
        As `groups`; zeros for a group whose rewards are all equal and for a group of one response, which
        has nothing to be compared with.
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
