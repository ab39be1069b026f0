"""Which groups of responses are trained on: those in which one was better than another.

Groups are found by id, never by position: responses of one prompt may arrive apart from each other, late, or
in part only.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from megatron_sftrl.errors import UserError
from megatron_sftrl.rl.advantages import check_rewards, is_uninformative

GroupT = TypeVar("GroupT", bound=Hashable)
ValueT = TypeVar("ValueT")


def by_group(group_ids: Sequence[GroupT], values: Sequence[ValueT]) -> dict[GroupT, list[ValueT]]:
    """The values of each group: groups by first appearance, values in the order given.

    Args:
        group_ids: of each response.
        values: of each response: rewards, or places in a list.
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
    """The outcome of dynamic sampling.

    Args:
        kept: ids of groups whose rewards differ, in their order.
        dropped: ids of the others. With nothing kept there is nothing to learn: sample again, or skip the
            step.
    """

    kept: tuple[GroupT, ...]
    dropped: tuple[GroupT, ...]


def informative_groups(groups: Mapping[GroupT, Sequence[float]]) -> GroupSelection[GroupT]:
    """Keep the groups in which some response did better than another     (dynamic sampling, arXiv:2503.14476)

    The paper keeps a prompt when 0 < number correct < G; for rewards that are not 0 or 1 that is: when they
    are not all equal. [1, 0, 0, 0] is kept whatever the advantage estimator: its single success is what
    there is to learn. A group that came back in part and has one response is dropped.

    Args:
        groups: rewards by group id.
    Raises:
        UserError: no groups, an empty group, a reward that is not finite.
    """
    check_rewards(groups)
    kept = tuple(group for group, rewards in groups.items() if not is_uninformative(rewards))
    dropped = tuple(group for group, rewards in groups.items() if is_uninformative(rewards))
    return GroupSelection(kept=kept, dropped=dropped)
