"""Checkpoints as directories: temporary until complete, renamed in one step.

    checkpoints/step-00000120/       complete: the name exists only after everything in it is on the disk
    checkpoints/.step-00000140.tmp/  being written or removed; left over when a process was killed

Functions here run on one rank and know nothing of tensors.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from pathlib import Path

from megatron_sftrl.engine.checkpoint.record import FILE_NAME, CheckpointRecord, FileRecord
from megatron_sftrl.errors import UserError, hub_hint
from megatron_sftrl.models.hf_output import force_to_disk

_COMPLETE = re.compile(r"step-(\d{8,})")
_TEMPORARY = re.compile(r"\.step-\d{8,}(\.old)?\.tmp")


def complete_checkpoints(directory: Path) -> list[Path]:
    """Checkpoints under `directory`, lowest step first; empty when there is no such directory."""
    # Not pathlib's is_dir and glob: newer ones take any error, such as a stale handle, for an absent
    # directory, and the run would begin at step 0.
    try:
        with os.scandir(directory) as entries:
            found = [
                (int(match[1]), directory / entry.name)
                for entry in entries
                if (match := _COMPLETE.fullmatch(entry.name)) and entry.is_dir()
            ]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [path for _, path in sorted(found)]


def checkpoint_at(path: Path) -> Path:
    """The checkpoint that a user's path means: a step directory, a run directory, or its checkpoints/.

    Raises:
        UserError: nothing there.
    """
    if (path / FILE_NAME).exists() or _COMPLETE.fullmatch(path.name):
        if not path.is_dir():
            raise UserError(f"checkpoint {path} does not exist")
        return path
    for directory in (path / "checkpoints", path):
        if found := complete_checkpoints(directory):
            return found[-1]
    raise UserError(
        f"no complete checkpoint in {path}: expected a step directory (step-00000123), or a run directory "
        f"with checkpoints/step-*{hub_hint(path)}"
    )


def begin(directory: Path, step: int, *, num_bytes: int) -> Path:
    """Clear what killed processes left, and make the empty temporary directory of a new checkpoint.

    Args:
        directory: holds the checkpoints; created when missing.
        step: of the new checkpoint.
        num_bytes: about as much as will be written.
    Raises:
        UserError: not enough space on the disk.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for path in directory.iterdir():
        if _TEMPORARY.fullmatch(path.name):
            shutil.rmtree(path)
    disk = shutil.disk_usage(directory)
    # Some network file systems report no sizes at all.
    if disk.total > 0 and disk.free < num_bytes:
        raise UserError(
            f"the disk is full: a checkpoint of step {step} needs about {_size(num_bytes)} and {directory} "
            f"has {_size(disk.free)} left. Earlier checkpoints are untouched; free space and resume"
        )
    temporary = directory / f".{step_name(step)}.tmp"
    temporary.mkdir()
    return temporary


def complete(temporary: Path, record: CheckpointRecord, *, keep_last: int) -> Path:
    """Write the record, force everything to the disk, give the directory its name, remove old ones.

    Args:
        temporary: from begin(), with every file but checkpoint.json.
        record: describes those files.
        keep_last: complete checkpoints that stay.
    Returns:
        The checkpoint's path.
    """
    (temporary / FILE_NAME).write_text(record.to_json())
    for path in temporary.rglob("*"):
        force_to_disk(path)
    force_to_disk(temporary)
    directory = temporary.parent
    final = directory / step_name(record.trainer.step)
    temporary.rename(final)
    force_to_disk(directory)
    for old in complete_checkpoints(directory)[:-keep_last]:
        # Renamed first: a kill in the middle of the removal must not leave half a checkpoint under its name.
        removed = directory / f".{old.name}.old.tmp"
        old.rename(removed)
        shutil.rmtree(removed)
    return final


def file_record(path: Path) -> FileRecord:
    """Size and hash of a file."""
    with open(path, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256")
    return FileRecord(size=path.stat().st_size, sha256=digest.hexdigest())


def file_problem(path: Path, expected: FileRecord) -> str | None:
    """What is wrong with a file of a checkpoint, None when nothing is."""
    if not path.is_file():
        return f"{path.name} is missing"
    if (size := path.stat().st_size) != expected.size:
        return f"{path.name} has {size} bytes instead of {expected.size}"
    if file_record(path) != expected:
        return f"{path.name} has another content than was written"
    return None


def discard(temporary: Path) -> None:
    """Remove an unfinished checkpoint."""
    shutil.rmtree(temporary, ignore_errors=True)


def step_name(step: int) -> str:
    """Directory name of a step's checkpoint."""
    return f"step-{step:08d}"


def _size(num_bytes: int) -> str:
    if num_bytes < 10**6:
        return f"{num_bytes / 1e3:.1f} kB"
    return f"{num_bytes / 1e9:.3f} GB"
