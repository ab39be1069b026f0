"""Long phases in which ranks do shares of their own: who is done first sees that the others still move."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from megatron_sftrl.engine.parallel import ParallelContext
from megatron_sftrl.engine.together import on_rank_zero

T = TypeVar("T")

_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.001, 0.25
"""Seconds between two looks of a rank that waits: thousands of ranks ask one store."""


class SharedProgress:
    """Movement of any rank, seen by all of them; construction is collective.

    In a collective a rank sees nothing but its timeout. Here it waits at the job's store instead.

    Args:
        parallel: this rank's place.
        on_move: called when this rank moves and, while it waits, when another one does.
        seconds: at least, between two reports of a rank; at most, between two looks of one that waits.
    """

    def __init__(
        self, parallel: ParallelContext, on_move: Callable[[], None], *, seconds: float = 1.0
    ) -> None:
        self._world_size, self._on_move, self._seconds = parallel.world_size, on_move, seconds
        self._told = float("-inf")
        self._number = 0
        # A restarted job may meet the store of the one before: a name of its own.
        name = on_rank_zero(lambda: secrets.token_hex(8))
        self._store = dist.PrefixStore(name, dist.distributed_c10d._get_default_store())

    def moved(self) -> None:
        """A part of this rank's share was finished; cheap enough for every token and micro-batch."""
        now = time.monotonic()
        if now - self._told < self._seconds:
            return
        self._told = now
        self._on_move()
        if self._world_size > 1:
            self._store.add("moves", 1)

    def together(self, action: Callable[[], T]) -> T:
        """Do this rank's share, and wait for everyone; also when it raises, since the others wait, too."""
        try:
            result = action()
        except Exception:
            self.everyone()
            raise
        self.everyone()
        return result

    def everyone(self) -> None:
        """Wait until every rank has come here."""
        self._on_move()
        if self._world_size == 1:
            return
        arrived, number = f"arrived/{self._number}", self._number
        self._number += 1
        if self._store.add(arrived, 1) == self._world_size:
            self._store.set(f"all/{number}", "")
        before, pause = 0, _SHORTEST_PAUSE
        while not self._store.check([f"all/{number}"]):
            moves = self._store.add("moves", 0) + self._store.add(arrived, 0)
            if moves != before:
                before = moves
                self._on_move()
            time.sleep(pause)
            pause = min(1.5 * pause, _LONGEST_PAUSE, self._seconds)
