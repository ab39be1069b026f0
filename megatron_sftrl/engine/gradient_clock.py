"""How long a rank takes to its own gradients, before it waits for those of others."""

from __future__ import annotations

import time

import torch


class GradientClock:
    """Seconds from the beginning of a forward to the end of this rank's backward, summed until collected.

    The reduction over data-parallel ranks, where the fast ones wait for the slow, is not in them. Waiting
    inside (tensor, context, expert and pipeline parallel) is: ranks that share a model copy look alike.

    Args:
        device: CUDA: events in its stream are timed, without waiting for it. CPU: the wall clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._started: float | torch.cuda.Event = 0.0
        self._spans: list[tuple[float | torch.cuda.Event, float | torch.cuda.Event]] = []

    def start(self) -> None:
        """A forward begins."""
        self._started = self._now()

    def stop(self) -> None:
        """The last backward of this rank has been done, or queued."""
        self._spans.append((self._started, self._now()))

    def collect(self) -> float:
        """Seconds since the last call; counting starts anew. The device has done what was queued."""
        spans, self._spans = self._spans, []
        return sum(_seconds(start, stop) for start, stop in spans)

    def _now(self) -> float | torch.cuda.Event:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds(start: float | torch.cuda.Event, stop: float | torch.cuda.Event) -> float:
    if isinstance(start, torch.cuda.Event) and isinstance(stop, torch.cuda.Event):
        return start.elapsed_time(stop) / 1e3
    assert isinstance(start, float) and isinstance(stop, float)
    return stop - start
