"""What every end-to-end test starts from: the files of a project, and two runs of its YAML."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.grpo_project import GrpoProject, make_grpo_project
from tests.e2e.product import run_product, sftrl
from tests.e2e.project import Project, make_project


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return make_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="session")
def one_process(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of the YAML in one process, with both optional sinks: read, never written."""
    run_dir = tmp_path_factory.mktemp("one_process") / "run"
    run_product(
        "sft", project.yaml, f"run_dir={run_dir}", "log={wandb: offline, tensorboard: true}",
        log=run_dir.parent / "log",
    )  # fmt: skip
    return run_dir


@pytest.fixture(scope="session")
def two_processes(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of the same YAML under torchrun with tp = 2: read, never written."""
    run_dir = tmp_path_factory.mktemp("two_processes") / "run"
    run_product(
        "sft", project.yaml, f"run_dir={run_dir}", "parallel.tp=2", log=run_dir.parent / "log", ranks=2
    )
    return run_dir


@pytest.fixture(scope="session")
def grpo(project: Project, tmp_path_factory: pytest.TempPathFactory) -> GrpoProject:
    return make_grpo_project(project, tmp_path_factory.mktemp("grpo"))


@pytest.fixture(scope="session")
def grpo_run(grpo: GrpoProject, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of the GRPO project's YAML on one process: read, never written."""
    run_dir = tmp_path_factory.mktemp("grpo_run") / "run"
    sftrl(*grpo.command(run_dir))
    return run_dir
