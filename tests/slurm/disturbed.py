"""Runs that are disturbed, told by the files they leave, and held against one that was not."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from tests.e2e.curves import unequal_tensors
from tests.e2e.project import Project, metrics_of, without_timing
from tests.slurm.cluster import Cluster, Job

NUM_STEPS, EVERY = 60, 10
TWO_NODES = ("--nodes=2", "--gpus-per-node=1")


def command(project: Project, run_dir: Path, *, hang_minutes: float = 0.5) -> list[str]:
    """dp = 2 with sharded optimizer state, and steps enough that a test can interrupt them."""
    return [
        f"run_dir={run_dir}", f"checkpoint.every={EVERY}", "parallel.distributed_optimizer=true",
        f"train={{steps: {NUM_STEPS}, eval_every: {NUM_STEPS}, hang_minutes: {hang_minutes}}}",
    ]  # fmt: skip


def submit(
    cluster: Cluster, project: Project, words: Sequence[str], *options: str, **environment: str
) -> Job:
    """sbatch of GIFT on two nodes with the words of `command`."""
    return cluster.submit(
        "gift_70b.sh", *words, options=[*TWO_NODES, *options], SFTRL_CONFIG=str(project.yaml), **environment
    )


def num_steps(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def reach(job: Job, run_dir: Path, step: int) -> None:
    job.wait_until(lambda: num_steps(run_dir) >= step, what=f"step {step}")
    assert num_steps(run_dir) < NUM_STEPS, "too late to disturb it: the test is blind"


def starts(job: Job) -> list[int]:
    """Of each step of the job (each srun), the checkpoint that it began from."""
    lines = (job.logs / "attempts").read_text().splitlines()
    return [int(line[-8:]) if line != "the beginning" else 0 for line in lines]


def started_again(job: Job, times: int) -> int:
    """The checkpoint that the job's last step began from, once there have been so many."""
    job.wait_until(lambda: len(starts(job)) == times, what=f"start {times}")
    return starts(job)[-1]


def stops(job: Job) -> list[int]:
    """The steps after which the ranks have heeded a request to stop, checkpoint included."""
    return [int(step) for step in re.findall(r"stopping after step (\d+) of", job.said())]


def assert_finished(job: Job, run_dir: Path, undisturbed: Path) -> None:
    assert job.ended() == ("COMPLETED", 0), job.said()
    # The same layout and operations: not a bit may differ.
    assert without_timing(metrics_of(run_dir)) == without_timing(metrics_of(undisturbed)), job.said()
    final = f"checkpoints/step-{NUM_STEPS:08d}"
    assert unequal_tensors(run_dir / final, undisturbed / final) == []
