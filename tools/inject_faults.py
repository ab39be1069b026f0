"""Kills a run at random moments, half of them while a checkpoint is written, and counts what that costs.

    python tools/inject_faults.py run.yaml [key=value ...] --out DIR [--kills 30] [--ranks 2] [--seed 0]

run.yaml is a short run of `sftrl sft` or `sftrl grpo` with checkpoint.every > 0. It runs once undisturbed;
then it is started again and again, and one rank gets SIGKILL, the others after it as torchrun would do it,
until the kills are used up and the last run has finished. Reported: runs that did not end with the numbers of
the undisturbed one, checkpoints whose files are not what was written, and the steps that a kill repeated.
With checkpoint.async_save a kill may repeat more than one interval, since steps go on beside a save; without
the steps done since the save that it interrupted it may not. On the CPU: ranks are forked from one process
that has imported everything.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path

import megatron_sftrl.trainers.grpo
import megatron_sftrl.trainers.sft
from megatron_sftrl.cli import main as sftrl
from megatron_sftrl.config.load import load_any_config
from megatron_sftrl.engine.checkpoint.directory import complete_checkpoints, file_problem, read_record

TIMING = (
    "seconds/", "tokens_per_second", "peak_memory_bytes", "rollout/tokens", "reward/slowest_seconds",
    "checkpoint/", "ranks/",
)  # fmt: skip
IMPORTED_BEFORE_THE_FORKS = (megatron_sftrl.trainers.grpo, megatron_sftrl.trainers.sft)


@dataclass(frozen=True, slots=True)
class Job:
    """One command line on some ranks, forked from this process."""

    command: list[str]
    ranks: int
    log: Path
    run_dir: Path

    def start(self) -> list[int]:
        """Process ids by rank."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        return [self._fork(rank, port) for rank in range(self.ranks)]

    def _fork(self, rank: int, port: int) -> int:
        if child := os.fork():
            return child
        code = 1
        try:
            os.setpgid(0, 0)
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            places = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": self.ranks,
                "LOCAL_WORLD_SIZE": self.ranks,
            }
            os.environ.update({name: str(value) for name, value in places.items()})
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
            code = sftrl([*self.command, f"run_dir={self.run_dir}"])
        finally:
            os._exit(code)

    def steps(self) -> int:
        """Lines of metrics.jsonl."""
        path = self.run_dir / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def newest(self) -> int:
        """Step of the newest complete checkpoint."""
        found = complete_checkpoints(self.run_dir / "checkpoints")
        return int(found[-1].name.removeprefix("step-")) if found else 0

    def is_saving(self) -> bool:
        """A checkpoint is being written."""
        return any((self.run_dir / "checkpoints").glob(".step-*.tmp"))

    def damaged(self) -> int:
        """Complete checkpoints with a file that is not what was written."""
        return sum(
            any(file_problem(path / name, file) for name, file in read_record(path).files.items())
            for path in complete_checkpoints(self.run_dir / "checkpoints")
        )


@dataclass(slots=True)
class Outcome:
    """What the kills did."""

    kills: int = 0
    while_saving: int = 0
    finished_runs: int = 0
    lost_runs: int = 0
    damaged: int = 0
    repeated: list[int] = field(default_factory=list)
    repeated_before_the_save: list[int] = field(default_factory=list)


def steps_repeated(steps: int, newest: int, every: int) -> tuple[int, int]:
    """Steps that a kill repeats, and those of them that precede the save that it interrupted, if any.

    Args:
        steps: done.
        newest: step of the newest complete checkpoint.
        every: steps between checkpoints.
    """
    due = steps // every * every
    return steps - newest, due - newest if newest < due else steps - newest


def main() -> int:
    """1 when a run was lost, a checkpoint damaged, or a kill repeated more than one checkpoint interval."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--out", type=Path, required=True, help="directory for the runs; emptied first")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_intermixed_args()
    config = load_any_config(arguments.config, arguments.overrides)
    kind = "sft" if config.grpo is None else "grpo"
    command = [kind, arguments.config, *arguments.overrides]
    shutil.rmtree(arguments.out, ignore_errors=True)
    arguments.out.mkdir(parents=True)

    whole = Job(command, arguments.ranks, arguments.out / "whole.log", arguments.out / "whole")
    began = time.monotonic()
    if not _ends_well(whole.start()):
        raise SystemExit(f"the undisturbed run failed, see {whole.log}")
    draw, outcome = random.Random(arguments.seed), Outcome()
    seconds = time.monotonic() - began
    while outcome.kills < arguments.kills:
        number = outcome.finished_runs + outcome.lost_runs
        job = Job(command, arguments.ranks, arguments.out / f"{number}.log", arguments.out / str(number))
        _disturb(job, draw, outcome, arguments.kills, seconds, config.checkpoint.every)
        is_same = _numbers(job.run_dir) == _numbers(whole.run_dir)
        outcome.finished_runs += is_same
        outcome.lost_runs += not is_same
    print(f"{kind} on {arguments.ranks} ranks, {config.checkpoint}: {_summary(outcome)}")
    most = max(outcome.repeated_before_the_save, default=0)
    return int(outcome.lost_runs > 0 or outcome.damaged > 0 or most > config.checkpoint.every)


def _summary(outcome: Outcome) -> str:
    return (
        f"{outcome.kills} kills, {outcome.while_saving} of them while a checkpoint was written; "
        f"{outcome.finished_runs} runs ended with the undisturbed numbers, {outcome.lost_runs} did not; "
        f"{outcome.damaged} damaged checkpoints; steps repeated after a kill: at most "
        f"{max(outcome.repeated, default=0)}, of them before the interrupted save at most "
        f"{max(outcome.repeated_before_the_save, default=0)}"
    )


def _disturb(job: Job, draw: random.Random, outcome: Outcome, kills: int, seconds: float, every: int) -> None:
    """Start the run until it ends by itself; about one kill in two waits for a checkpoint."""
    while True:
        children = job.start()
        wants_saving = draw.random() < 0.5
        moment = time.monotonic() + draw.uniform(0.1, seconds)
        while outcome.kills < kills and _is_running(children[0]):
            if (wants_saving and job.is_saving()) or (not wants_saving and time.monotonic() > moment):
                time.sleep(draw.uniform(0, 0.05) if wants_saving else 0)
                _kill(children, draw, job, outcome, every)
                break
            time.sleep(0.002)
        else:
            _ends_well(children)
            return


def _kill(children: list[int], draw: random.Random, job: Job, outcome: Outcome, every: int) -> None:
    outcome.while_saving += job.is_saving()
    outcome.kills += 1
    victim = draw.choice(children)
    for child in [victim, *(child for child in children if child != victim)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    for child in children:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)
    repeated, before_the_save = steps_repeated(job.steps(), job.newest(), every)
    outcome.repeated.append(repeated)
    outcome.repeated_before_the_save.append(before_the_save)
    outcome.damaged += job.damaged()
    print(f"kill {outcome.kills} after step {job.steps()}, checkpoint {job.newest()}", flush=True)


def _is_running(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def _ends_well(children: list[int]) -> bool:
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return codes == [0] * len(children)


def _numbers(run_dir: Path) -> list[dict[str, float]]:
    """Every line of metrics.jsonl, without what depends on the machine."""
    path = run_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{name: row[name] for name in row if not name.startswith(TIMING)} for row in rows]


if __name__ == "__main__":
    raise SystemExit(main())
