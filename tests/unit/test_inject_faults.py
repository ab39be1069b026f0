"""What the fault injector counts, on run directories made by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sftrl.engine.checkpoint.directory import (
    FILE_NAME,
    CheckpointRecord,
    TrainerState,
    file_record,
    step_name,
)
from tools.inject_faults import Job, steps_repeated


@pytest.mark.parametrize(
    ("steps", "newest", "repeated"),
    [
        (7, 5, (2, 2)),
        (10, 5, (5, 5)),  # killed in the save of step 10, or ahead of it
        (12, 5, (7, 5)),  # killed beside the save of step 10: two steps are the price of not waiting
        (12, 0, (12, 10)),  # the save of step 5 was lost as well
        (3, 0, (3, 3)),
    ],
)
def test_steps_beside_a_save_are_told_apart(steps: int, newest: int, repeated: tuple[int, int]) -> None:
    assert steps_repeated(steps, newest, every=5) == repeated


def test_a_run_directory_tells_its_steps_its_checkpoints_and_which_are_damaged(tmp_path: Path) -> None:
    job = Job(command=[], ranks=1, log=tmp_path / "log", run_dir=tmp_path)
    assert (job.steps(), job.newest(), job.is_saving(), job.damaged()) == (0, 0, False, 0)
    (tmp_path / "metrics.jsonl").write_text("{}\n{}\n{}")
    for step in (5, 10):
        made = tmp_path / "checkpoints" / step_name(step)
        made.mkdir(parents=True)
        (made / "weights").write_text(f"of step {step}")
        write_record(made, step)
    (tmp_path / "checkpoints/.step-00000015.tmp").mkdir()
    assert (job.steps(), job.newest(), job.is_saving(), job.damaged()) == (2, 10, True, 0)
    (tmp_path / "checkpoints" / step_name(5) / "weights").write_text("of step 6")
    assert job.damaged() == 1


def write_record(checkpoint: Path, step: int) -> None:
    record = CheckpointRecord(
        trainer=TrainerState(step=step),
        architecture={},
        dtype="fp32",
        optimizer=None,
        optimizer_step=0,
        reference=None,
        layout={},
        versions={},
        files={"weights": file_record(checkpoint / "weights")},
    )
    (checkpoint / FILE_NAME).write_text(record.to_json())
