"""Where a step's seconds go: named phases, summed until they are collected."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator


class Timers:
    """Wall-clock seconds per phase: `with timers("forward_backward"): ...`.

    A phase entered several times adds up. Phases that contain each other are each counted in full.

    Args:
        synchronize: called when a phase ends, before its clock stops; `torch.cuda.synchronize` makes work
            that was only queued count for the phase that queued it. None on the CPU. It runs at ends
            only: phases that follow each other then start on an idle device anyway.
        on_end: called when a phase has ended well.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        *,
        synchronize: Callable[[], None] | None = None,
        on_end: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._synchronize = synchronize
        self._on_end = on_end
        self._clock = clock
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the seconds of the block for `phase`, also when it raises."""
        start = self._clock()
        try:
            yield
            if self._synchronize is not None:
                self._synchronize()
            if self._on_end is not None:
                self._on_end()
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + self._clock() - start

    def collect(self) -> dict[str, float]:
        """Seconds of each phase since the last call, in the order of first entry; counting starts anew."""
        seconds, self._seconds = self._seconds, {}
        return seconds
