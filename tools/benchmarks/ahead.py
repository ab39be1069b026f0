"""What rollout.ahead makes of a step whose verifier sleeps: max(generate + verify, train), or more?

    python -m tools.benchmarks.ahead [--steps 12] [--out FILE]

The quick start's GRPO from random weights, on two processes. In three placements a run in turns, which
generates, verifies and trains one behind the other, and one that is a step ahead:

  separate     one process trains, one generates; the verifier takes --sleep seconds
  short sleep  the same, and the verifier is faster than the trainer
  together     both processes do both, by turns, so that training hides behind the verifier alone

Of the run in turns a step's seconds are parted into those until every response has its reward and those of
training. A step ahead should take the longer of both. Numbers are medians of steps 3 and later without the
last: the first finds nothing asked ahead, and the last asks for nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VERIFIER = '''"""A verifier that sleeps."""

import time

from megatron_sftrl import RewardConfig, RewardInputs, RewardOutput, register_reward


class Sleeps(RewardConfig):
    for_seconds: float = 1.0
    """Of each response."""


@register_reward("sleeps", config=Sleeps)
def sleeps(inputs: RewardInputs, config: Sleeps) -> RewardOutput:
    """1 for an even number of characters."""
    time.sleep(config.for_seconds)
    return RewardOutput(reward=float(len(inputs.response) % 2 == 0))
'''
_WAITS = ("seconds/generate", "seconds/reward")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--sleep", type=float, default=3.0, help="seconds of a verifier that is slow (3)")
    parser.add_argument("--short-sleep", type=float, default=0.5)
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    arguments = parser.parse_args()
    placements = {
        "separate": (arguments.sleep, ["rollout.devices=1"]),
        "short sleep": (arguments.short_sleep, ["rollout.devices=1"]),
        "together": (arguments.sleep, []),
    }
    facts: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        here = Path(directory)
        prepare = ROOT / "examples" / "quickstart" / "prepare.py"
        subprocess.run(
            [sys.executable, str(prepare), "runs/quickstart/data"],
            cwd=here,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        (here / "verifier.py").write_text(VERIFIER)
        for name, (sleep, settings) in placements.items():
            facts[name] = _numbers(here, sleep, settings, arguments.steps)
    print(f"{'seconds a step':14}{'until rewards':>15}{'training':>10}{'ahead':>8}{'of the longer':>15}")
    for name, each in facts.items():
        print(
            f"{name:14}{each['until_rewards']:15.2f}{each['training']:10.2f}{each['ahead']:8.2f}"
            f"{each['ratio']:15.2f}"
        )
    if arguments.out is not None:
        temporary = arguments.out.with_name(arguments.out.name + ".tmp")
        temporary.write_text(
            json.dumps({**vars(arguments), "out": None, "placements": facts}, indent=2) + "\n"
        )
        temporary.replace(arguments.out)


def _numbers(here: Path, sleep: float, settings: list[str], steps: int) -> dict[str, float]:
    in_turns = _steps(here, sleep, settings, steps)
    ahead = _steps(here, sleep, [*settings, "rollout.ahead=1"], steps)
    until_rewards = statistics.median(sum(row[name] for name in _WAITS) for row in in_turns)
    training = statistics.median(row["whole"] for row in in_turns) - until_rewards
    seconds = statistics.median(row["whole"] for row in ahead)
    return {
        "sleep": sleep,
        "until_rewards": until_rewards,
        "training": training,
        "ahead": seconds,
        "ratio": seconds / max(until_rewards, training),
    }


def _steps(here: Path, sleep: float, settings: list[str], steps: int) -> list[dict[str, float]]:
    """The rows of a run with the `whole` seconds of each step, by the moments when rows were written."""
    run = here / "run"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "megatron_sftrl", "grpo", str(ROOT / "examples" / "quickstart" / "grpo.yaml")),
        *(f"run_dir={run}", "model.init_checkpoint=null", f"train.steps={steps}", "checkpoint.every=null"),
        # Of 512 responses 32 are judged one behind the other.
        f"rewards=[{{name: sleeps, modules: [{here / 'verifier.py'}], for_seconds: {sleep / 32}}}]",
        *("reward_workers.num_workers=16", *settings),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, cwd=here, env=environment, stdout=quiet, stderr=quiet)
    written, metrics = [], run / "metrics.jsonl"
    while process.poll() is None:
        num_rows = metrics.read_text().count("\n") if metrics.exists() else 0
        written += [time.monotonic()] * (num_rows - len(written))
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    shutil.rmtree(run)
    for row, start, end in zip(rows[1:], written[:-1], written[1:], strict=True):
        row["whole"] = end - start
    return [row for row in rows if 3 <= row["step"] < steps]


if __name__ == "__main__":
    main()
