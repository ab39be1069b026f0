"""The first thing that a newcomer runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_quick_start_trains_a_model_that_its_verifier_finds_better() -> None:
    # In this checkout and in the environment of the tests; runs/quickstart is made anew, as always.
    done = subprocess.run(
        ["bash", "examples/quickstart.sh"],
        cwd=ROOT,
        env={**os.environ, "SFTRL_VENV": sys.prefix},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
        check=False,
    )
    # The script fails by itself when accuracy does not rise by 10 points, greedy and sampled.
    assert done.returncode == 0, done.stdout[-4000:]
    assert (ROOT / "runs/quickstart/report.html").stat().st_size > 10_000
