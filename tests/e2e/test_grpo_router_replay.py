"""rollout.router_replay: a mixture trains on the experts that its engine chose, in every layout."""

from __future__ import annotations

from pathlib import Path

from tests.e2e.grpo_project import GrpoProject, samples_of
from tests.e2e.product import sftrl
from tests.e2e.project import metrics_of, without_timing

MIXTURE = (
    "model.architecture.family=qwen3_moe", "model.architecture.num_experts=4",
    "model.architecture.experts_per_token=2",
)  # fmt: skip
REPLAY = (*MIXTURE, "rollout.router_replay=true")
CHANGED = "router_replay/changed"


def test_where_the_engine_chose_what_the_trainer_would_the_run_is_the_same(
    grpo: GrpoProject, tmp_path: Path
) -> None:
    """With one update a step: in later ones the policy's own choice moves away from the engine's."""
    one = ("rollout.passes=1", "batch.global_size=16")
    sftrl(*grpo.command(tmp_path / "own", *MIXTURE, *one))
    sftrl(*grpo.command(tmp_path / "replayed", *REPLAY, *one))
    assert samples_of(tmp_path / "own") == samples_of(tmp_path / "replayed")
    replayed = metrics_of(tmp_path / "replayed")
    assert [row.pop(CHANGED) for row in replayed] == [0.0] * 3
    assert without_timing(replayed) == without_timing(metrics_of(tmp_path / "own"))
