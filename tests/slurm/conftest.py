"""The private Slurm of a session, and what is submitted to it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.product import sftrl
from tests.e2e.project import Project, make_project
from tests.slurm.cluster import Cluster, missing_programs, slurm_cluster
from tests.slurm.disturbed import command

REQUIRED = "SFTRL_TEST_SLURM"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if os.environ.get(REQUIRED) != "1":
        pytest.skip(f"a private Slurm and its jobs take some 15 minutes: {REQUIRED}=1 runs them")
    missing = missing_programs()
    assert not missing, f"this machine lacks {', '.join(missing)}: bash tests/slurm/install.sh"
    with slurm_cluster(tmp_path_factory.mktemp("slurm") / "cluster") as running:
        yield running


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return make_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="session")
def undisturbed(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run under two ranks that nobody disturbs: read, never written."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    sftrl("sft", str(project.yaml), *command(project, run_dir), ranks=2)
    return run_dir
