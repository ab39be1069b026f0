"""What Slurm itself ends, at a time limit, for a more important job or with its node, goes on later."""

from __future__ import annotations

import re
import signal
from pathlib import Path

from tests.e2e.project import Project
from tests.slurm.cluster import Cluster, Job
from tests.slurm.disturbed import (
    EVERY,
    assert_finished,
    command,
    reach,
    started_again,
    stops,
    submit,
)


def signal_ranks(job: Job, number: signal.Signals) -> None:
    """SIGSTOP makes of a step one that takes as long as the test wants: Slurm counts limits in minutes."""
    for rank in job.processes("rank"):
        rank.send_signal(number)


def end_in_two_minutes(job: Job) -> None:
    """At most, and in more than one: a limit is whole minutes from the start."""
    *_, hours, minutes, _ = map(int, re.findall(r"\d+", job.fields()["RunTime"]))
    set_limit(job, 60 * hours + minutes + 2)


def set_limit(job: Job, minutes: int) -> None:
    job.cluster.run("scontrol", "update", f"JobId={job.number}", f"TimeLimit={minutes}")


def test_a_job_at_its_time_limit_stops_with_a_checkpoint_also_when_a_step_takes_longer_than_the_warning(
    cluster: Cluster, project: Project, undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    words = command(project, run_dir, hang_minutes=10.0)
    # Slurm looks at its clock every 30 s, and warns that much earlier rather than later.
    job = submit(cluster, project, words, "--time=60", "--signal=B:USR1@60")
    reach(job, run_dir, EVERY + 3)
    end_in_two_minutes(job)
    signal_ranks(job, signal.SIGSTOP)
    job.wait_until(lambda: "the end of the job is near" in job.said(), what="the warning of Slurm")
    signal_ranks(job, signal.SIGCONT)
    assert [started_again(job, 2)] == stops(job), f"no checkpoint of its own before the end:\n{job.said()}"
    set_limit(job, 60)

    reach(job, run_dir, 3 * EVERY + 3)
    end_in_two_minutes(job)
    signal_ranks(job, signal.SIGSTOP)  # until the script lets the job go: Slurm continues what it ends
    assert started_again(job, 3) == stops(job)[-1], f"no checkpoint of its own before the end:\n{job.said()}"
    set_limit(job, 60)
    assert_finished(job, run_dir, undisturbed)
    assert job.fields()["Restarts"] == "2"
    assert job.batch_log.read_text().count("the end of the job is near") == 2
    assert [job.said().count(f"{name}: stopping after step") for name in ("SIGUSR1", "SIGTERM")] == [1, 1]


def test_a_preempted_job_stops_with_a_checkpoint_lets_the_other_one_run_and_goes_on(
    cluster: Cluster, project: Project, undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = submit(cluster, project, command(project, run_dir))
    reach(job, run_dir, EVERY + 3)
    options = ("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null")
    urgent = Job(cluster, int(cluster.run("sbatch", "--parsable", *options, "--wrap=true")))
    assert [started_again(job, 2)] == stops(job), f"no checkpoint of its own before the end:\n{job.said()}"
    assert urgent.ended() == ("COMPLETED", 0)
    assert_finished(job, run_dir, undisturbed)
    assert job.fields()["Restarts"] == "1"
    assert "SIGTERM: stopping after step" in job.said()


def test_a_job_whose_node_is_lost_goes_on_when_there_are_nodes_again(
    cluster: Cluster, project: Project, undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = submit(cluster, project, command(project, run_dir))
    reach(job, run_dir, EVERY + 3)
    cluster.run("scontrol", "update", "NodeName=node1", "State=DOWN", "Reason=lost")
    # Its slurmd answers, so that Slurm takes it back (ReturnToService); the job is queued again.
    assert started_again(job, 2) >= EVERY
    assert_finished(job, run_dir, undisturbed)
    assert job.fields()["Restarts"] == "1"
