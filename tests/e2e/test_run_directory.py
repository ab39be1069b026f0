"""What a run leaves behind: its configuration, a line per step, events for other programs."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sftrl.config.load import load_config, resolved_yaml
from megatron_sftrl.losses.api import is_own_number
from tests.e2e.curves import assert_same_curves, contents
from tests.e2e.product import sftrl
from tests.e2e.project import NUM_STEPS, Project, metrics_of

EVERY_STEP = {
    "step", "loss", "grad_norm", "lr", "tokens", "loss_tokens", "tokens_per_second", "entropy", "nll",
    "gift/label_weight", "padding_share", "epoch", "skipped_steps", "peak_memory_bytes", "seconds/data",
    "seconds/forward_backward", "seconds/optimizer", "seconds/reference",
}  # fmt: skip
OF_A_SAVE = {"seconds/checkpoint", "checkpoint/write_seconds", "checkpoint/gigabytes_per_second"}
EVALUATION = {"valid/loss", "valid/nll", "valid/entropy", "valid/gift/label_weight", "seconds/evaluate"}


def test_metrics_hold_one_object_a_step_with_every_field_that_was_promised(one_process: Path) -> None:
    metrics = metrics_of(one_process)
    assert [row["step"] for row in metrics] == list(range(1, NUM_STEPS + 1))
    for row in metrics:
        expected = EVERY_STEP | (EVALUATION if row["step"] in (4, 8) else set())
        assert row.keys() - OF_A_SAVE == expected
        assert all(isinstance(value, int | float) for value in row.values())
        assert {name for name in row if not is_own_number(name)} == {"entropy", "nll", "gift/label_weight"}
    assert [row["lr"] for row in metrics] == pytest.approx([0.005] + [0.01] * 7)  # 2 steps of warm-up
    assert metrics[4].keys() >= OF_A_SAVE, "the time of a save belongs to the step after it"
    assert all(row["tokens_per_second"] > 0 and row["peak_memory_bytes"] > 10**7 for row in metrics)


def test_a_frozen_reference_says_the_same_of_the_held_out_rows_at_every_evaluation(one_process: Path) -> None:
    first, last = (row for row in metrics_of(one_process) if "valid/loss" in row)
    assert first["valid/gift/label_weight"] == last["valid/gift/label_weight"]
    assert first["valid/nll"] != last["valid/nll"], "the policy did not move: the comparison is blind"


def test_the_resolved_configuration_is_a_fixed_point_and_starts_the_same_run(
    one_process: Path, tmp_path: Path
) -> None:
    resolved = one_process / "resolved.yaml"
    assert resolved_yaml(load_config(resolved)) == resolved.read_text()
    sftrl("sft", str(resolved), f"run_dir={tmp_path / 'run'}", "log.wandb=off", "log.tensorboard=false")
    assert_same_curves(metrics_of(tmp_path / "run"), metrics_of(one_process), tolerance=0)


def test_the_directory_holds_what_the_manual_says_and_nothing_half_written(one_process: Path) -> None:
    names = {path.name for path in one_process.iterdir()}
    assert names == {
        "resolved.yaml", "origins.json", "metrics.jsonl", "checkpoints", "tokens",
        "wandb", "wandb_id", "tensorboard",
    }  # fmt: skip
    checkpoints = sorted(path.name for path in (one_process / "checkpoints").iterdir())
    assert checkpoints == ["step-00000004", "step-00000008"]


def test_tensorboard_has_the_curves_of_metrics_jsonl(one_process: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(one_process / "tensorboard"))
    events.Reload()
    for name in ("loss", "gift/label_weight", "valid/loss"):
        rows = [row for row in metrics_of(one_process) if name in row]
        shown = {event.step: event.value for event in events.Scalars(name)}
        # TensorBoard stores fp32: 6e-8 of a value.
        assert shown == pytest.approx({row["step"]: row[name] for row in rows}, rel=1e-6)


def test_wandb_offline_writes_the_curves_into_the_run_directory(one_process: Path) -> None:
    (data,) = (one_process / "wandb").glob("offline-run-*/run-*.wandb")
    assert (one_process / "wandb_id").read_text() in data.name
    written = data.read_bytes()
    final = metrics_of(one_process)[-1]
    assert b"gift/label_weight" in written
    assert str(final["loss"]).encode() in written


def test_running_a_finished_run_again_does_nothing_harmful(project: Project, tmp_path: Path) -> None:
    again = ("sft", str(project.yaml), f"run_dir={tmp_path / 'run'}")
    sftrl(*again)
    before = contents(tmp_path / "run")
    sftrl(*again)
    assert contents(tmp_path / "run") == before
