"""Seconds per phase, and the peak of memory."""

from __future__ import annotations

import pytest
import torch

from megatron_sftrl.observability.watch import Timers, peak_memory_bytes


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


def test_a_phase_entered_twice_adds_up_and_collecting_starts_anew() -> None:
    clock = Clock()
    timers = Timers(clock=clock)
    for seconds in (1.0, 2.0):
        with timers("forward_backward"):
            clock.wait(seconds)
        clock.wait(5.0)
    with timers("optimizer"):
        clock.wait(0.5)
    assert timers.collect() == {"forward_backward": 3.0, "optimizer": 0.5}
    assert timers.collect() == {}


def test_queued_work_counts_for_the_phase_that_queued_it() -> None:
    clock = Clock()
    timers = Timers(clock=clock, synchronize=lambda: clock.wait(4.0))
    with timers("step"):
        clock.wait(1.0)
    assert timers.collect() == {"step": 5.0}


def test_a_phase_that_raises_is_counted_and_the_error_passes() -> None:
    clock = Clock()
    timers = Timers(clock=clock)

    def broken() -> None:
        with timers("step"):
            clock.wait(2.0)
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        broken()
    assert timers.collect() == {"step": 2.0}


def test_the_cpu_peak_grows_by_what_is_allocated() -> None:
    before = peak_memory_bytes(torch.device("cpu"))
    wanted = before + 64 * 2**20  # more than the peak so far, whatever is resident now
    block = torch.ones(wanted, dtype=torch.uint8)
    after = peak_memory_bytes(torch.device("cpu"))
    assert int(block[-1]) == 1
    # Bytes, not KiB: the process held the block and everything else it needs.
    assert wanted <= after <= wanted + 2 * before + 2**30
