"""Checkpoint directories without tensors in them."""

from __future__ import annotations

import dataclasses
import errno
import os
from pathlib import Path

import pytest

from megatron_sftrl.engine.checkpoint import directory as checkpoint_directory
from megatron_sftrl.engine.checkpoint.directory import CheckpointRecord, TrainerState, read_record


def record(step: int) -> CheckpointRecord:
    return CheckpointRecord(
        trainer=TrainerState(step=step, consumed_samples=3, skipped_steps=1),
        architecture={"num_layers": 2},
        dtype="bf16",
        optimizer="adamw",
        optimizer_step=step,
        reference=None,
        layout={"tp": 2, "device": "cpu"},
        versions={},
        files={},
    )


def write(directory: Path, step: int) -> Path:
    temporary = checkpoint_directory.begin(directory, step, num_bytes=10)
    (temporary / "data").write_bytes(b"0123456789")
    files = {"data": checkpoint_directory.file_record(temporary / "data")}
    return checkpoint_directory.complete(
        temporary, dataclasses.replace(record(step), files=files), keep_last=2
    )


def test_a_record_survives_the_disk(tmp_path: Path) -> None:
    path = write(tmp_path, 4)
    read = read_record(path)
    assert dataclasses.replace(read, files={}) == record(4)
    assert read.files["data"].size == 10
    assert checkpoint_directory.file_problem(path / "data", read.files["data"]) is None


def test_a_disk_without_enough_space_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    write(tmp_path, 1)
    with pytest.raises(ValueError, match="the disk is full: a checkpoint of step 2 needs about 1000000000"):
        checkpoint_directory.begin(tmp_path, 2, num_bytes=10**18)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_steps_are_ordered_by_number_not_by_name(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000):
        write(tmp_path, step)
    assert checkpoint_directory.checkpoint_at(tmp_path).name == "step-100000000"


def test_a_file_that_is_not_what_was_written_is_described(tmp_path: Path) -> None:
    file = write(tmp_path, 1) / "data"
    expected = checkpoint_directory.file_record(file)
    file.write_bytes(b"0123456780")
    assert checkpoint_directory.file_problem(file, expected) == "data has another content than was written"
    file.write_bytes(b"")
    assert checkpoint_directory.file_problem(file, expected) == "data has 0 bytes instead of 10"
    file.unlink()
    assert checkpoint_directory.file_problem(file, expected) == "data is missing"


def test_a_path_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    checkpoint_directory.begin(tmp_path, 5, num_bytes=0)
    with pytest.raises(ValueError, match="no complete checkpoint"):
        checkpoint_directory.checkpoint_at(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        checkpoint_directory.checkpoint_at(tmp_path / "step-00000005")


def test_checkpoints_that_cannot_be_listed_are_not_taken_for_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert checkpoint_directory.complete_checkpoints(tmp_path / "absent") == []

    def stale(path: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(os, "scandir", stale)
    with pytest.raises(OSError, match="Stale file handle"):
        checkpoint_directory.complete_checkpoints(tmp_path)
