"""A job that a cluster disturbs ends with the numbers of one that it leaves alone."""

from __future__ import annotations

import re
import signal
from pathlib import Path

from tests.e2e.project import Project
from tests.slurm.cluster import Cluster
from tests.slurm.disturbed import (
    EVERY,
    TWO_NODES,
    assert_finished,
    command,
    reach,
    started_again,
    starts,
    stops,
    submit,
)


def test_a_job_that_is_requeued_and_meets_its_time_limit_stops_with_a_checkpoint_and_goes_on(
    cluster: Cluster, project: Project, undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = submit(cluster, project, command(project, run_dir))
    reach(job, run_dir, EVERY + 3)
    cluster.run("scontrol", "requeue", str(job.number))
    assert [started_again(job, 2)] == stops(job), f"no checkpoint of its own before the end:\n{job.said()}"

    reach(job, run_dir, 3 * EVERY + 3)
    # What Slurm does 300 s before the limit (#SBATCH --signal=B:USR1@300); its own clock counts in minutes.
    cluster.run("scancel", "--batch", "--signal=USR1", str(job.number))
    assert started_again(job, 3) == stops(job)[-1], f"no checkpoint of its own before the end:\n{job.said()}"
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
    job = submit(cluster, project, command(project, run_dir), TORCH_ELASTIC_SHUTDOWN_TIMEOUT="3")
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


def test_attempts_that_lead_nowhere_come_to_an_end(
    cluster: Cluster, project: Project, tmp_path: Path
) -> None:
    module = tmp_path / "fatal.py"
    module.write_text(
        "import os\n"
        "from megatron_sftrl import register_loss\n"
        "from megatron_sftrl.losses.api import LossOptions\n"
        "register_loss('fatal', config=LossOptions)(lambda inputs, config: os._exit(3))\n"
    )
    job = cluster.submit(
        "gift_70b.sh", f"run_dir={tmp_path / 'run'}", f"loss={{name: fatal, modules: [{module}]}}",
        "reference=null", options=TWO_NODES, SFTRL_CONFIG=str(project.yaml), SFTRL_RESTARTS="0",
        SFTRL_ATTEMPTS="2",
    )  # fmt: skip
    assert job.ended() == ("FAILED", 1), job.said()
    assert starts(job) == [0, 0]
    assert "2 attempts from the beginning ended without another checkpoint" in job.batch_log.read_text()
