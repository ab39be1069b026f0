"""How many prompts a step of dynamic sampling draws, and which of the useful groups it trains on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_MARGIN = 2.0
"""Standard deviations by which a draw is larger than what it takes on average: 98 of 100 draws suffice."""

_MOST_AT_ONCE = 4
"""Most prompts of one draw, in multiples of rollout.prompts_per_step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """What became of prompts that were drawn; of the last step it is the share that the next one counts on.

    Args:
        drawn: prompts that were answered.
        useful: of them, those whose responses were not all equally good.
    """

    drawn: int = 0
    useful: int = 0

    def __add__(self, other: Draws) -> Draws:
        return Draws(drawn=self.drawn + other.drawn, useful=self.useful + other.useful)


NO_DRAWS = Draws()


def num_to_draw(missing: int, *, seen: Draws, wanted: int) -> int:
    """Prompts to draw so that `missing` of them are useful, most probably.

    Until m useful ones are found at a useful share s it takes m / s draws on average, with a standard
    deviation of sqrt(m (1 - s)) / s (negative binomial distribution), so that

        n = (m + 2 sqrt(m (1 - s))) / s

    Args:
        missing: m, at least 1.
        seen: the last step's draws and this step's, from which s is taken.
        wanted: prompts of a full step: what is drawn while no share is known, and a quarter of the most.
    """
    if not seen.useful:
        return missing if not seen.drawn else wanted
    share = seen.useful / seen.drawn
    number = (missing + _MARGIN * math.sqrt(missing * (1 - share))) / share
    return min(math.ceil(number), _MOST_AT_ONCE * wanted)


@dataclass(frozen=True, slots=True, kw_only=True)
class Filling:
    """What a step takes of the groups that it found.

    Args:
        trained: ids of the groups that are trained on, whole mini-batches of them.
        num_prompts: how far the order of the data has moved. Useful groups beyond what is trained are put
            back: the next step draws their prompts again and answers them with its own policy.
    """

    trained: tuple[int, ...]
    num_prompts: int


def fill(useful: Sequence[int], *, first: int, drawn: int, wanted: int, multiple_of: int) -> Filling:
    """Choose the first `wanted` useful groups, or as many whole mini-batches as there are.

    An update of a part of a mini-batch would have the step size of a whole one. A search that found no whole
    one puts nothing back: the same policy would draw the same responses again.

    Args:
        useful: ids, which are places in the order of the data, ascending.
        first: place of the step's first prompt.
        drawn: prompts of the step.
        wanted: groups of a full step, a multiple of `multiple_of`.
        multiple_of: groups of the smallest number of whole mini-batches that ends with a group.
    """
    assert wanted % multiple_of == 0, "config.checks refuses mini-batches that do not divide a step"
    count = min(len(useful), wanted) // multiple_of * multiple_of
    is_put_back = 0 < count < len(useful)
    return Filling(trained=tuple(useful[:count]), num_prompts=useful[count] - first if is_put_back else drawn)
