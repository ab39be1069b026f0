"""Which rank the others wait for, step after step."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

SLOWDOWN = 1.5
STEPS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a rank runs.

    Args:
        host: name of its node.
        stage: of the pipeline; stages begin and end a step at different times.
    """

    host: str
    stage: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Slowest:
    """The rank that is slowest beside its peers.

    Args:
        rank: in the whole job.
        seconds: that it took.
        slowdown: times the median of the other ranks of its stage.
    """

    rank: int
    seconds: float
    slowdown: float


class StragglerWatch:
    """Notes each step's slowest rank and speaks when the same one is it for STEPS steps by SLOWDOWN.

    One slow step is no straggler: a rank's share of a batch may be longer than the others'.

    Args:
        places: by rank.
    """

    def __init__(self, places: Sequence[Place]) -> None:
        self._places = tuple(places)
        self._rank = -1
        self._num_steps = 0

    def note(self, seconds: Sequence[float]) -> tuple[Slowest | None, str | None]:
        """The step's slowest rank, None where no rank has a peer, and a line to print when it is due.

        Args:
            seconds: of one step, by rank.
        """
        slowest = self._slowest(seconds)
        if slowest is None or slowest.slowdown <= SLOWDOWN:
            self._rank, self._num_steps = -1, 0
            return slowest, None
        self._num_steps = self._num_steps + 1 if slowest.rank == self._rank else 1
        self._rank = slowest.rank
        if self._num_steps != STEPS:
            return slowest, None
        return slowest, (
            f"straggler: rank {slowest.rank} on {self._places[slowest.rank].host} has been the slowest for "
            f"{STEPS} steps; its gradients of the last one took {slowest.seconds:.3g} s, "
            f"{slowest.slowdown:.2g} times as long as those of its peers (ranks of one model copy wait for "
            "each other: it may be a neighbour of the slow one)"
        )

    def _slowest(self, seconds: Sequence[float]) -> Slowest | None:
        found = [
            Slowest(rank=rank, seconds=own, slowdown=own / statistics.median(peers))
            for rank, own in enumerate(seconds)
            if (peers := self._peers(rank, seconds)) and statistics.median(peers) > 0
        ]
        return max(found, key=lambda each: each.slowdown, default=None)

    def _peers(self, rank: int, seconds: Sequence[float]) -> list[float]:
        stage = self._places[rank].stage
        others = enumerate(zip(self._places, seconds, strict=True))
        return [taken for other, (place, taken) in others if other != rank and place.stage == stage]
