"""The first thing that a newcomer runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.grid import HOW_TO_RUN_ALL, is_full

ROOT = Path(__file__).resolve().parents[2]
MADE = ROOT / "runs/quickstart"


FULL = pytest.mark.skipif(not is_full(), reason=HOW_TO_RUN_ALL)


def quick_start(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The script in this checkout and in the environment of the tests; it makes runs/quickstart anew."""
    return subprocess.run(
        ["bash", "examples/quickstart.sh", *arguments],
        cwd=ROOT,
        env={**os.environ, "SFTRL_VENV": sys.prefix, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
        check=False,
    )


def test_the_quick_start_goes_through_all_stages_and_fails_when_the_reward_does_not_rise() -> None:
    """A base model of a few steps, and GRPO steps too small to change a verdict."""
    done = quick_start(
        "all", "optim.lr=1e-12", "optim.warmup_steps=0", "train.steps=2", "rollout.prompts_per_step=8",
        "batch.global_size=64", QUICKSTART_STEPS="20",
    )  # fmt: skip
    assert done.returncode == 1, done.stdout[-4000:]
    assert "transformers gives the same answers as the training engine" in done.stdout
    assert "Mean reward of grpo" in done.stdout
    assert "error: the reward did not rise" in done.stdout


def test_a_misspelt_stage_is_refused_before_anything_is_removed() -> None:
    MADE.mkdir(parents=True, exist_ok=True)
    kept = MADE / "kept"
    kept.write_text("")
    done = quick_start("gift")
    assert done.returncode == 2
    assert "got 'gift'" in done.stdout
    assert kept.exists()


@FULL
def test_the_quick_start_raises_accuracy_and_then_the_reward() -> None:
    """All stages as they are, two to four minutes.

    The script fails by itself when GRPO does not raise the held-out reward, or both stages the accuracy, by
    what report.py demands, and when transformers answers otherwise than the training engine.
    """
    done = quick_start()
    assert done.returncode == 0, done.stdout[-4000:]
    assert "transformers gives the same answers as the training engine" in done.stdout
    assert (MADE / "report.html").stat().st_size > 10_000
