"""What watches a run: where its seconds and bytes go, which rank is late, and whether anything moves."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

# Ends a process in which nothing moves any more, and shows where each of its threads stood.


_SECONDS_TO_SPEAK = 1.0


class HangWatch:
    """Writes the stacks of all threads to standard error and ends the process with code 1 when time is up.

    A rank that waits for a dead or stopped peer may wait for ever, and in a call that holds Python's lock:
    faulthandler's watchdog is a thread of C that needs no lock. Exit code 1 makes torchrun restart all. Time
    is `minutes` between two calls of moved(); 0 never ends anything.
    """

    # moved() may be called for every token: the watchdog is wound up once in this share of its time.
    _FINENESS = 0.01

    def __init__(self, minutes: float) -> None:
        self._seconds = minutes * 60
        self._last, self._is_watched = time.monotonic(), False
        self._ended = threading.Event()

    def __enter__(self) -> HangWatch:
        if self._seconds > 0:
            self._wind_up()
            threading.Thread(target=self._explain, name="hang-watch", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        faulthandler.cancel_dump_traceback_later()

    def moved(self) -> None:
        """Something was finished: count from now on; nothing outside `with`."""
        is_watched = self._is_watched and not self._ended.is_set()
        if is_watched and time.monotonic() - self._last >= self._FINENESS * self._seconds:
            self._wind_up()

    def _wind_up(self) -> None:
        self._last, self._is_watched = time.monotonic(), True
        assert sys.__stderr__ is not None
        faulthandler.dump_traceback_later(self._seconds + _SECONDS_TO_SPEAK, exit=True, file=sys.__stderr__)

    def _explain(self) -> None:
        """Say in words what the watchdog is about to show, if Python's lock can be had."""
        while not self._ended.wait(max(self._last + self._seconds - time.monotonic(), 0.01)):
            if time.monotonic() >= self._last + self._seconds:
                print(
                    f"nothing was finished for {self._seconds / 60:g} minutes (train.hang_minutes): this "
                    "process shows where it stands and ends. A rank that shows nothing is stopped or gone",
                    file=sys.__stderr__,
                    flush=True,
                )
                return


# Where a step's seconds go: named phases, summed until they are collected.


class Timers:
    """Wall-clock seconds per phase: `with timers("forward_backward"): ...`.

    A phase entered several times adds up. Phases that contain each other are each counted in full.

    Args:
        synchronize: called when a phase ends, before its clock stops; `torch.cuda.synchronize` makes work
            that was only queued count for the phase that queued it. None on the CPU. It runs at ends only:
            phases that follow each other then start on an idle device anyway.
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
        """Seconds of each phase since the last call, in the order of first entry."""
        seconds, self._seconds = self._seconds, {}
        return seconds


# Which rank the others wait for, step after step.


SLOWDOWN = 1.5
STEPS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A rank's node and pipeline stage; stages begin and end a step at different times."""

    host: str
    stage: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Slowest:
    """The rank that took `slowdown` times the median of the other ranks of its stage."""

    rank: int
    seconds: float
    slowdown: float


class StragglerWatch:
    """Notes each step's slowest rank and speaks when the same one is it for STEPS steps by SLOWDOWN.

    One slow step is no straggler: a rank's share of a batch may be longer than the others'.
    """

    def __init__(self, places: Sequence[Place]) -> None:
        self._places = tuple(places)
        self._rank = -1
        self._num_steps = 0

    def note(self, seconds: Sequence[float]) -> tuple[Slowest | None, str | None]:
        """From one step's seconds by rank: its slowest rank (None: no rank has a peer), and a line if due."""
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


# The most memory a process has held.


_M_MMAP_THRESHOLD = -3  # malloc.h


def peak_memory_bytes(device: torch.device) -> int:
    """Most bytes of tensors on CUDA since the last `take_device_peak`; on the CPU, peak resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB


def take_device_peak(device: torch.device) -> int:
    """Most bytes of a CUDA device in use since the last call, other processes' included.

    Between calls only torch's allocator may take memory and give it back. What others hold (contexts, NCCL,
    the share of a sleeping engine that torch still counts as taken) is counted as it is now.
    """
    free, total = torch.cuda.mem_get_info(device)
    beyond_now = torch.cuda.max_memory_reserved(device) - torch.cuda.memory_reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    return total - free + beyond_now


def return_freed_memory() -> None:
    """Let glibc, where it is there, give freed tensors back to the system at once.

    It keeps blocks below 32 MiB otherwise, and a tool that goes through a model tensor by tensor would hold
    some hundred megabytes that it does not use.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 2**20)
