"""A job that a cluster disturbs ends with the numbers of one that it leaves alone."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from tests.e2e.curves import unequal_tensors
from tests.e2e.product import sftrl
from tests.e2e.project import Project, metrics_of, without_timing
from tests.slurm.cluster import Cluster, Job

NUM_STEPS, EVERY = 60, 10
TWO_NODES = ("--nodes=2", "--gpus-per-node=1")


def command(project: Project, run_dir: Path) -> list[str]:
    """dp = 2 with sharded optimizer state, and steps enough that a test can interrupt them."""
    return [
        f"run_dir={run_dir}", f"train={{steps: {NUM_STEPS}, eval_every: {NUM_STEPS}, hang_minutes: 0.5}}",
        f"checkpoint.every={EVERY}", "parallel.distributed_optimizer=true",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def undisturbed(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run under two ranks that nobody disturbs: read, never written."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    sftrl("sft", str(project.yaml), *command(project, run_dir), ranks=2)
    return run_dir


def submit(cluster: Cluster, project: Project, run_dir: Path, *options: str, **environment: str) -> Job:
    return cluster.submit(
        "gift_70b.sh", *command(project, run_dir), options=[*TWO_NODES, *options],
        SFTRL_CONFIG=str(project.yaml), **environment,
    )  # fmt: skip


def num_steps(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def newest(run_dir: Path) -> int:
    return max((int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step-*")), default=0)


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


def assert_finished(job: Job, run_dir: Path, undisturbed: Path) -> None:
    assert job.ended() == ("COMPLETED", 0), job.said()
    # The same layout and operations: not a bit may differ.
    assert without_timing(metrics_of(run_dir)) == without_timing(metrics_of(undisturbed)), job.said()
    final = f"checkpoints/step-{NUM_STEPS:08d}"
    assert unequal_tensors(run_dir / final, undisturbed / final) == []


def test_a_job_that_is_requeued_and_meets_its_time_limit_stops_with_a_checkpoint_and_goes_on(
    cluster: Cluster, project: Project, undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = submit(cluster, project, run_dir)
    reach(job, run_dir, EVERY + 3)
    cluster.run("scontrol", "requeue", str(job.number))
    assert started_again(job, 2) % EVERY != 0, f"no checkpoint of its own before the end:\n{job.said()}"

    reach(job, run_dir, 3 * EVERY + 3)
    # What Slurm does 300 s before the limit (#SBATCH --signal=B:USR1@300); its own clock counts in minutes.
    cluster.run("scancel", "--batch", "--signal=USR1", str(job.number))
    assert started_again(job, 3) % EVERY != 0, f"no checkpoint of its own before the end:\n{job.said()}"
    assert_finished(job, run_dir, undisturbed)
    assert job.fields()["Restarts"] == "2"
    said = job.said()
    assert "SIGTERM: stopping after step" in said
    assert "SIGUSR1: stopping after step" in said


def test_a_killed_rank_a_killed_agent_and_a_rank_that_stands_still_cost_the_steps_since_a_checkpoint(
    cluster: Cluster, project: Project, undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    # torchrun waits that long for a process to heed SIGTERM, which a stopped one cannot.
    job = submit(cluster, project, run_dir, TORCH_ELASTIC_SHUTDOWN_TIMEOUT="3")
    reach(job, run_dir, EVERY + 3)
    job.processes("rank")[1].kill()

    reach(job, run_dir, 3 * EVERY + 3)
    assert starts(job) == [0], f"the agents start the ranks again, not the step:\n{job.said()}"
    job.processes("agent")[1].kill()
    assert started_again(job, 2) in (3 * EVERY, 4 * EVERY)

    reach(job, run_dir, 4 * EVERY + 3)
    job.processes("rank")[1].send_signal(signal.SIGSTOP)
    assert_finished(job, run_dir, undisturbed)
    assert len(starts(job)) == 2
    said = job.said()
    assert "nothing was finished for 0.5 minutes (train.hang_minutes)" in said
    assert re.search(r"\[rank 0\] +File .*trainers/sft.py", said), said
