"""What every end-to-end test starts from: the files of a project, and two runs of its YAML."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.grpo_project import GrpoProject, make_grpo_project
from tests.e2e.once import once
from tests.e2e.product import run_product, sftrl
from tests.e2e.project import Project, make_project


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return once(tmp_path_factory, "project", make_project)


@pytest.fixture(scope="session")
def one_process(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of the YAML in one process, with both optional sinks: read, never written."""

    def run(folder: Path) -> Path:
        sinks = "log={wandb: offline, tensorboard: true}"
        run_product("sft", project.yaml, f"run_dir={folder}/run", sinks, log=folder / "log")
        return folder / "run"

    return once(tmp_path_factory, "one_process", run)


@pytest.fixture(scope="session")
def two_processes(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of the same YAML under torchrun with tp = 2: read, never written."""

    def run(folder: Path) -> Path:
        run_product(
            "sft", project.yaml, f"run_dir={folder}/run", "parallel.tp=2", log=folder / "log", ranks=2
        )
        return folder / "run"

    return once(tmp_path_factory, "two_processes", run)


@pytest.fixture(scope="session")
def grpo(project: Project, tmp_path_factory: pytest.TempPathFactory) -> GrpoProject:
    return once(tmp_path_factory, "grpo", lambda folder: make_grpo_project(project, folder))


@pytest.fixture(scope="session")
def grpo_run(grpo: GrpoProject, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of the GRPO project's YAML on one process: read, never written."""

    def run(folder: Path) -> Path:
        sftrl(*grpo.command(folder / "run"))
        return folder / "run"

    return once(tmp_path_factory, "grpo_run", run)
