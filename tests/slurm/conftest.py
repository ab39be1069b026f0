"""The private Slurm of a session, and what is submitted to it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.e2e.project import Project, make_project
from tests.slurm.cluster import Cluster, missing_programs, slurm_cluster

REQUIRED = "SFTRL_TEST_SLURM"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    wanted, missing = os.environ.get(REQUIRED), missing_programs()
    if wanted == "0":
        pytest.skip(f"{REQUIRED}=0")
    if missing and wanted != "1":
        pytest.skip(f"a private Slurm needs {', '.join(missing)}; {REQUIRED}=1 makes this an error")
    assert not missing, (
        f"{REQUIRED}=1, but this machine lacks {', '.join(missing)}: bash tests/slurm/install.sh"
    )
    with slurm_cluster(tmp_path_factory.mktemp("slurm") / "cluster") as running:
        yield running


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return make_project(tmp_path_factory.mktemp("project"))
