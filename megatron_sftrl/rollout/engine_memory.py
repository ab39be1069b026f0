"""The memory of an engine that shares its GPU: gone while the trainer trains, back in parts for an update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

Part = Literal["weights", "kv_cache"]
"""What an engine wakes by itself: weights come first, since an update needs room for its messages, too."""


class EngineMemory:
    """Which parts of an engine's memory are there.

    Args:
        sleep: gives everything back; weights and cache are lost.
        wake: takes memory for one part.
        is_cuda: on the CPU no engine can give memory back, and neither is called.
    """

    def __init__(self, *, sleep: Callable[[], None], wake: Callable[[Part], object], is_cuda: bool) -> None:
        self._sleep, self._wake, self._is_cuda = sleep, wake, is_cuda
        self._asleep: set[Part] = set()

    def sleep(self) -> None:
        """Give everything back, whatever is there."""
        if self._is_cuda and len(self._asleep) < 2:
            self._sleep()
            self._asleep = {"weights", "kv_cache"}

    def wake(self, part: Part) -> None:
        """Take memory for a part that is asleep; its contents are arbitrary."""
        if part not in self._asleep:
            return
        assert part == "weights" or "weights" not in self._asleep, "weights wake before the cache"
        # The engine takes its memory from the driver, not from what torch keeps for the trainer's next step.
        torch.cuda.empty_cache()
        self._wake(part)
        self._asleep.remove(part)
