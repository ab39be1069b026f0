"""The first thing that a newcomer runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MADE = ROOT / "runs/quickstart"


def quick_start(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The script in this checkout and in the environment of the tests; it makes runs/quickstart anew."""
    return subprocess.run(
        ["bash", "examples/quickstart.sh", *arguments],
        cwd=ROOT,
        env={**os.environ, "SFTRL_VENV": sys.prefix},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
        check=False,
    )


@pytest.fixture(scope="module")
def whole() -> subprocess.CompletedProcess[str]:
    """All stages, once: two to four minutes."""
    return quick_start()


def test_the_quick_start_raises_accuracy_and_then_the_reward(
    whole: subprocess.CompletedProcess[str],
) -> None:
    # The script fails by itself when GRPO does not raise the held-out reward, or both stages the accuracy, by
    # what report.py demands, and when transformers answers otherwise than the training engine.
    assert whole.returncode == 0, whole.stdout[-4000:]
    assert "transformers gives the same answers as the training engine" in whole.stdout
    assert (MADE / "report.html").stat().st_size > 10_000


def test_the_quick_start_fails_when_the_reward_does_not_rise(
    whole: subprocess.CompletedProcess[str],
) -> None:
    """GRPO again from the same GIFT model, with steps too small to change a verdict."""
    assert whole.returncode == 0, whole.stdout[-4000:]
    done = quick_start(
        "grpo", "optim.lr=1e-12", "optim.warmup_steps=0", "train.steps=2", "rollout.prompts_per_step=8",
        "batch.global_size=64",
    )  # fmt: skip
    assert done.returncode == 1, done.stdout[-4000:]
    assert "error: the reward did not rise" in done.stdout
    assert "Mean reward of grpo" in done.stdout


def test_a_misspelt_stage_is_refused_before_anything_is_removed(
    whole: subprocess.CompletedProcess[str],
) -> None:
    done = quick_start("gift")
    assert done.returncode == 2
    assert "got 'gift'" in done.stdout
    assert whole.returncode == 0
    assert (MADE / "report.html").exists()
