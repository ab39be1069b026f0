"""A process in which nothing moves ends by itself and shows where it stood; one that moves does not."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_sftrl.observability.watch import Timers

ROOT = Path(__file__).resolve().parents[3]

PROGRAM = """
import ctypes, sys, time
from megatron_sftrl.observability.watch import HangWatch

def stand_still(how):
    if how == "waits":
        time.sleep(600)
    else:  # PyDLL keeps Python's lock, as a collective may that waits for a dead peer
        ctypes.PyDLL(None).sleep(600)

with HangWatch(float(sys.argv[2])) as watch:
    for _ in range(400):
        time.sleep(0.01)
        watch.moved()
    print("moved", flush=True)
    if sys.argv[1] != "ends":
        stand_still(sys.argv[1])
time.sleep(4)  # longer than the watch, which is over
"""


RUNS = {"waits": 3 / 60, "holds the lock": 3 / 60, "ends": 3 / 60, "ends, not watched": 0.0}


@pytest.fixture(scope="module")
def ended() -> dict[str, subprocess.CompletedProcess[str]]:
    """Of each of the runs, which mostly sleep: all at once."""

    def run(how: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", PROGRAM, how.partition(",")[0], str(RUNS[how])],
            capture_output=True, text=True, cwd=ROOT, timeout=300, check=False,
        )  # fmt: skip

    with ThreadPoolExecutor(len(RUNS)) as threads:
        return dict(zip(RUNS, threads.map(run, RUNS), strict=True))


@pytest.mark.parametrize("how", ["waits", "holds the lock"])
def test_a_process_that_stands_still_shows_its_stack_and_ends_with_code_1(
    how: str, ended: dict[str, subprocess.CompletedProcess[str]]
) -> None:
    done = ended[how]
    assert (done.returncode, done.stdout) == (1, "moved\n"), done.stderr
    assert "Timeout (0:00:04)!" in done.stderr
    assert "in stand_still" in done.stderr
    # Who holds the lock lets nobody speak; the stack is there all the same.
    assert ("train.hang_minutes" in done.stderr) == (how == "waits")


@pytest.mark.parametrize("how", ["ends", "ends, not watched"])
def test_a_process_that_moves_or_is_not_watched_goes_on(
    how: str, ended: dict[str, subprocess.CompletedProcess[str]]
) -> None:
    done = ended[how]
    assert (done.returncode, done.stdout, done.stderr) == (0, "moved\n", "")


def test_each_phase_that_ends_well_counts_as_movement() -> None:
    ends: list[str] = []
    timers = Timers(on_end=lambda: ends.append("end"))
    with timers("data"), timers("forward_backward"):
        assert ends == []
    assert ends == ["end", "end"]
    with pytest.raises(KeyError), timers("optimizer"):
        raise KeyError
    assert ends == ["end", "end"]
