"""What stands before a training: the shipped scripts convert a model and score data, then train on both."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.e2e.conversion import publish
from tests.e2e.curves import assert_same_curves
from tests.e2e.product import run_product, sftrl
from tests.e2e.project import Project, metrics_of, num_learned, read_rows
from tests.ranks import ROOT
from tests.slurm.cluster import Cluster, Job
from tests.slurm.test_bad_input import path_with, program

TWO_NODES = ("--nodes=2", "--gpus-per-node=1")
# fp32 sums in another order, as in tests/e2e/test_run.py.
OTHER_ORDER = 1e-5


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as its author publishes it."""
    return publish(tmp_path_factory.mktemp("published") / "hf")


@pytest.fixture(scope="module")
def converted(cluster: Cluster, hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a checkpoint, by slurm/convert.sh on a node without GPUs, where nvidia-smi finds none."""
    folder = tmp_path_factory.mktemp("converted")
    program(folder / "bin/nvidia-smi", 'echo "NVIDIA-SMI has failed"; exit 9')
    finished(
        cluster.submit(
            "convert.sh", "from_hf", "--hf", hf, "--out", folder / "checkpoint", "--verify",
            PATH=path_with(cluster, folder / "bin"),
        )
    )  # fmt: skip
    return folder / "checkpoint"


@pytest.fixture(scope="module")
def scored(
    cluster: Cluster, project: Project, hf: Path, converted: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """train.jsonl with the scores of the converted model, by slurm/score_behavior.sh on two nodes."""
    out = tmp_path_factory.mktemp("scored") / "scored.jsonl"
    finished(
        cluster.submit(
            "score_behavior.sh", project.yaml, *model_of(hf), "parallel.tp=2", "--checkpoint", converted,
            "--data", project.train, "--out", out, options=TWO_NODES,
        )
    )  # fmt: skip
    return out


def model_of(hf: Path, *, checkpoint: Path | None = None) -> list[str]:
    """Overrides that replace the project's model by the published one, or by its converted checkpoint."""
    if checkpoint is None:
        return ["model.architecture=null", f"model.hf={hf}"]
    return ["model.architecture=null", f"model.hf_config={hf}", f"model.init_checkpoint={checkpoint}"]


def finished(job: Job) -> None:
    assert job.ended() == ("COMPLETED", 0), job.said()


def assert_two_nodes_train_as_one_process(
    script: str, cluster: Cluster, project: Project, hf: Path, converted: Path, folder: Path, *overrides: str
) -> None:
    """The job starts from the converted checkpoint, the process from the published files."""
    finished(
        cluster.submit(
            script, f"run_dir={folder / 'two'}", *model_of(hf, checkpoint=converted), *overrides,
            options=TWO_NODES, SFTRL_CONFIG=str(project.yaml),
        )
    )  # fmt: skip
    sftrl("sft", str(project.yaml), f"run_dir={folder / 'one'}", *model_of(hf), *overrides)
    found = metrics_of(folder / "two")
    assert len(found) == 8
    assert all(math.isfinite(value) for row in found for value in row.values())
    assert found[-1]["nll"] < found[0]["nll"], "it learns"
    assert_same_curves(found, metrics_of(folder / "one"), tolerance=OTHER_ORDER)


def test_gift_from_a_converted_model_is_gift_from_the_published_one(
    cluster: Cluster, project: Project, hf: Path, converted: Path, tmp_path: Path
) -> None:
    assert_two_nodes_train_as_one_process("gift_70b.sh", cluster, project, hf, converted, tmp_path)


def test_scores_of_two_nodes_are_those_of_one_process(
    project: Project, hf: Path, converted: Path, scored: Path, tmp_path: Path
) -> None:
    alone = tmp_path / "scored.jsonl"
    run_product(
        project.yaml, *model_of(hf), "--checkpoint", converted, "--data", project.train, "--out", alone,
        log=tmp_path / "log", program=[str(ROOT / "tools/score_behavior_logprobs.py")],
    )  # fmt: skip
    rows = read_rows(scored)
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in read_rows(project.train)]
    for ours, theirs in zip(rows, read_rows(alone), strict=True):
        assert len(ours["behavior_logprobs"]) == num_learned(ours)
        assert ours["behavior_token_ids"] == theirs["behavior_token_ids"]
        # fp32 logits summed in another order, as in tests/e2e/test_pear_from_scratch.py.
        assert ours["behavior_logprobs"] == pytest.approx(theirs["behavior_logprobs"], abs=2e-5)


def test_pear_on_scored_data(
    cluster: Cluster, project: Project, hf: Path, converted: Path, scored: Path, tmp_path: Path
) -> None:
    assert_two_nodes_train_as_one_process(
        "pear_70b.sh", cluster, project, hf, converted, tmp_path,
        "loss={name: pear}", "reference=null", f"data.train=[{scored}]", "data.valid=[]", "train={steps: 8}",
    )  # fmt: skip


def test_curiosft(cluster: Cluster, project: Project, hf: Path, converted: Path, tmp_path: Path) -> None:
    assert_two_nodes_train_as_one_process(
        "curiosft_70b.sh", cluster, project, hf, converted, tmp_path,
        "loss={name: curiosft, top_k: 16, pivot: 3.0}",
        "reference={kind: moving_average, decay: 0.9, sync_every: 2}",
    )  # fmt: skip
