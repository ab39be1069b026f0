"""SFT, export and GRPO as one submission."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.e2e.curves import assert_same_curves
from tests.e2e.grpo_project import make_grpo_project
from tests.e2e.product import sftrl
from tests.e2e.project import Project, metrics_of
from tests.ranks import ROOT
from tests.slurm.cluster import Cluster, Job

# dp = 2 against one process: fp32 sums in another order, as in tests/e2e/test_grpo_layouts.py.
OTHER_ORDER = 2e-5


def chain(cluster: Cluster, project: Project, folder: Path, *arguments: str, **environment: str) -> list[Job]:
    """Submit the chain with two steps of each training; its three jobs."""
    grpo = make_grpo_project(project, folder)
    logs = f"--output={cluster.logs}/%x-%j.out"
    numbers = cluster.run(
        "bash", "slurm/sft_then_grpo.sh", folder / "runs", "train.steps=2", "--", "train.steps=2", *arguments,
        SFTRL_SFT_CONFIG=str(project.yaml), SFTRL_GRPO_CONFIG=str(grpo.yaml), SFTRL_PROCESSES="1",
        SFTRL_SBATCH=f"--nodes=2 --gpus-per-node=1 {logs}", SFTRL_CONVERT_SBATCH=logs, **environment,
    )  # fmt: skip
    return [Job(cluster, int(number)) for number in numbers.split()]


def test_grpo_starts_from_what_sft_has_exported(cluster: Cluster, project: Project, tmp_path: Path) -> None:
    (folder := tmp_path / "chain").mkdir()
    jobs = chain(cluster, project, folder)
    assert [job.state for job in jobs[1:]] == ["PENDING", "PENDING"]
    for job in jobs:
        assert job.ended() == ("COMPLETED", 0), job.said()
    runs = folder / "runs"
    assert len(metrics_of(runs / "sft")) == 2
    sftrl(
        "grpo", str(folder / "grpo.yaml"), f"run_dir={tmp_path / 'one'}", "train.steps=2",
        "model.architecture=null", f"model.hf={runs / 'hf'}",
    )  # fmt: skip
    assert_same_curves(metrics_of(runs / "grpo"), metrics_of(tmp_path / "one"), tolerance=OTHER_ORDER)


def test_what_follows_a_failed_job_leaves_the_queue(
    cluster: Cluster, project: Project, tmp_path: Path
) -> None:
    failing = tmp_path / "failing.sh"
    failing.write_text("#!/bin/bash\nexit 3\n")
    (folder := tmp_path / "chain").mkdir()
    jobs = chain(cluster, project, folder, SFTRL_SFT=str(failing))
    assert jobs[0].ended() == ("FAILED", 3)
    assert [job.ended()[0] for job in jobs[1:]] == ["CANCELLED", "CANCELLED"]


def test_a_mistake_in_the_last_stage_is_told_before_the_first_is_submitted(
    cluster: Cluster, project: Project, tmp_path: Path
) -> None:
    grpo = make_grpo_project(project, tmp_path)
    done = subprocess.run(
        ["bash", "slurm/sft_then_grpo.sh", tmp_path / "runs", "train.steps=2", "--", "rollout.size=4"],
        capture_output=True, text=True, cwd=ROOT, check=False,
        env=cluster.environment
        | {"SFTRL_SFT_CONFIG": str(project.yaml), "SFTRL_GRPO_CONFIG": str(grpo.yaml)},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert "rollout.size" in done.stderr
