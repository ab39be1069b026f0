"""What cannot work is refused before the first step, and says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.project import Project
from tests.slurm.cluster import Cluster, Job

TWO_NODES = ("--nodes=2", "--gpus-per-node=1")


def refused(job: Job) -> str:
    """The batch script's log, once it has ended with code 2 and without a step of training."""
    assert job.ended() == ("FAILED", 2), job.said()
    assert not (job.logs / "attempts").exists(), job.said()
    return job.batch_log.read_text()


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
    return path


def path_with(cluster: Cluster, first: Path) -> str:
    return f"{first}:{cluster.environment['PATH']}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.learning_rate=1", "optim.learning_rate"),
        ("parallel.tp=two", "parallel.tp"),
        ("run_dir=/proc/nothing", "choose another run_dir"),
    ],
)
def test_an_override_that_cannot_be_is_refused_by_name(
    override: str, message: str, cluster: Cluster, project: Project
) -> None:
    job = cluster.submit("gift_70b.sh", override, options=TWO_NODES, SFTRL_CONFIG=str(project.yaml))
    assert message in refused(job)


def test_a_configuration_that_is_not_there_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit("pear_70b.sh", options=TWO_NODES, SFTRL_CONFIG=str(tmp_path / "absent.yaml"))
    said = refused(job)
    assert f"no configuration {tmp_path}/absent.yaml" in said
    assert "SFTRL_CONFIG" in said


def test_a_configuration_of_another_kind_of_run_is_refused(cluster: Cluster, project: Project) -> None:
    job = cluster.submit("grpo_70b.sh", options=TWO_NODES, SFTRL_CONFIG=str(project.yaml))
    assert "rollout" in refused(job)


def test_a_run_directory_that_a_node_does_not_see_is_refused_with_the_node(
    cluster: Cluster, project: Project
) -> None:
    run_dir = cluster.unshared / "run"
    job = cluster.submit(
        "gift_70b.sh", f"run_dir={run_dir}", options=TWO_NODES, SFTRL_CONFIG=str(project.yaml)
    )
    assert f"node1 does not see {cluster.unshared}, where the run is written" in refused(job)
    assert list(cluster.unshared.iterdir()) == [], "the check leaves nothing behind"


def test_logs_that_a_node_does_not_see_are_refused_with_the_node(cluster: Cluster, project: Project) -> None:
    logs = cluster.unshared / "logs"
    job = cluster.submit(
        "gift_70b.sh",
        options=TWO_NODES,
        SFTRL_CONFIG=str(project.yaml),
        SFTRL_LOGS=str(logs),
    )
    assert (
        f"node1 did not answer in {logs}/gift-70b-{job.number}: all nodes must share this directory"
        in refused(job)
    )


def test_a_node_that_has_lost_a_gpu_is_refused_by_name(
    cluster: Cluster, project: Project, tmp_path: Path
) -> None:
    lost = '[ $SLURMD_NODENAME = node1 ] || echo "GPU 0: NVIDIA H100"; echo "GPU 1: NVIDIA H100"'
    program(tmp_path / "bin/nvidia-smi", lost)
    job = cluster.submit(
        "gift_70b.sh", f"run_dir={tmp_path / 'run'}", options=["--nodes=2", "--gpus-per-node=2"],
        SFTRL_CONFIG=str(project.yaml), PATH=path_with(cluster, tmp_path / "bin"),
    )  # fmt: skip
    said = refused(job)
    assert "node1 has 1 GPUs, node0 has 2, and 2 processes are to run on each" in said
    assert "--exclude" in said


def test_a_conversion_between_other_formats_is_refused(cluster: Cluster) -> None:
    job = cluster.submit("convert.sh", "from_megatron", SFTRL_PROCESSES="1")
    assert "expected to_hf or from_hf, got 'from_megatron'" in refused(job)


def test_a_conversion_that_cannot_be_is_refused_once(cluster: Cluster) -> None:
    job = cluster.submit("convert.sh", "from_hf", "--hf", "/absent", "--out", "/out", SFTRL_PROCESSES="1")
    assert "refused, see" in refused(job)
    assert job.said().count("error: no such file: /absent") == 1


def test_a_container_image_that_is_not_there_is_refused(cluster: Cluster, project: Project) -> None:
    job = cluster.submit(
        "gift_70b.sh",
        options=TWO_NODES,
        SFTRL_CONFIG=str(project.yaml),
        SFTRL_CONTAINER="/images/absent.sqsh",
    )
    assert "container image /images/absent.sqsh does not exist" in refused(job)


def test_a_container_on_a_cluster_without_pyxis_is_refused(cluster: Cluster, project: Project) -> None:
    job = cluster.submit(
        "gift_70b.sh", options=TWO_NODES, SFTRL_CONFIG=str(project.yaml), SFTRL_CONTAINER="registry#image:1"
    )
    assert "this cluster has no pyxis" in refused(job)


def test_a_container_is_handed_to_pyxis_with_its_mounts(
    cluster: Cluster, project: Project, tmp_path: Path
) -> None:
    """srun of a cluster with pyxis, as far as the script can tell: it takes the options and notes them."""
    noted = tmp_path / "noted"
    program(
        tmp_path / "bin/srun",
        f"""[ "$1" != --help ] || {{ echo "--container-image"; exit; }}
        for word; do case $word in --container-*) echo "$word" >> {noted} ;; *) kept+=("$word") ;; esac; done
        exec /usr/bin/srun "${{kept[@]}}" """,
    )
    job = cluster.submit(
        "gift_70b.sh", "optim.nothing=1", options=TWO_NODES, SFTRL_CONFIG=str(project.yaml),
        SFTRL_CONTAINER="registry#image:1", SFTRL_MOUNTS="/data:/data:ro",
        PATH=path_with(cluster, tmp_path / "bin"),
    )  # fmt: skip
    assert "optim.nothing" in refused(job)
    image, mounts, folder = noted.read_text().splitlines()
    assert image == "--container-image=registry#image:1"
    here = folder.removeprefix("--container-workdir=")
    assert mounts == f"--container-mounts={here}:{here},{here}:{here},{job.logs}:{job.logs},/data:/data:ro"
