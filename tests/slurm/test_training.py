"""The shipped scripts on two nodes compute what one process computes."""

from __future__ import annotations

from pathlib import Path

from tests.e2e.curves import assert_same_curves
from tests.e2e.product import sftrl
from tests.e2e.project import Project, metrics_of
from tests.slurm.cluster import GPUS_PER_NODE, Cluster

# fp32 sums in another order, as in tests/e2e/test_run.py.
OTHER_ORDER = 1e-5


def test_gift_on_two_nodes_of_two_processes_is_the_run_of_one_process(
    cluster: Cluster, project: Project, tmp_path: Path
) -> None:
    job = cluster.submit(
        "gift_70b.sh", f"run_dir={tmp_path / 'two'}", "parallel.tp=2", "checkpoint.every=0",
        options=["--nodes=2", f"--gpus-per-node={GPUS_PER_NODE}"], SFTRL_CONFIG=str(project.yaml),
        SFTRL_PREFLIGHT="1",
    )  # fmt: skip
    job.wait_until(lambda: len(job.processes("rank")) == 4, what="four ranks")
    assert len(job.processes("agent")) == 2
    sftrl("sft", str(project.yaml), f"run_dir={tmp_path / 'one'}", "checkpoint.every=0")
    assert job.ended() == ("COMPLETED", 0), job.said()
    assert_same_curves(metrics_of(tmp_path / "two"), metrics_of(tmp_path / "one"), tolerance=OTHER_ORDER)
    nodes = [(job.logs / f"node-{index}.log").read_text() for index in (0, 1)]
    assert "all-reduce over all processes" in nodes[0], "preflight comes first, on all processes"
    assert "step 8/8" in nodes[0]
    assert "step 8/8" not in nodes[1]
