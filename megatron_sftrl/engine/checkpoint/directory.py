"""Checkpoints as directories: temporary until complete, renamed in one step.

    checkpoints/step-00000120/       complete: the name exists only after everything in it is on the disk
    checkpoints/.step-00000140.tmp/  being written or removed; left over when a process was killed

Functions here run on one rank and know nothing of tensors.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_sftrl.engine.together import on_every_rank, on_rank_zero
from megatron_sftrl.errors import UserError, error_of, first_of, hub_hint
from megatron_sftrl.models.hf_output import LOCK, force_to_disk

# checkpoint.json: what a checkpoint is, readable by people, and what its files must look like.


FILE_NAME = "checkpoint.json"
FORMAT = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerState:
    """Where a run stands; with the tensors of a checkpoint it is all that a resume needs.

    The learning rate is a function of the step and the order of the data a function of seed and
    consumed_samples, so neither has a state of its own.

    Args:
        step: optimizer steps done, skipped ones included.
        consumed_samples: sequences taken from the training data since the run began.
        consumed_demonstrations: sequences taken from sft.data, beside the prompts of a run of GRPO.
        skipped_steps: steps whose gradient was not finite.
        consecutive_skipped_steps: of them, the unbroken streak that ends at `step`.
        consecutive_idle_steps: steps of GRPO with nothing to learn from, the unbroken streak up to `step`.
        drawn_prompts, useful_prompts: of the last step under dynamic sampling, which the next one counts on.
        data_fingerprint: hash of the tokenized training data, so that a resume on changed data is noticed.
        gate_starts: [step, value] that a gate compares later steps with, by metric and first step.
    """

    step: int = 0
    consumed_samples: int = 0
    consumed_demonstrations: int = 0
    skipped_steps: int = 0
    consecutive_skipped_steps: int = 0
    consecutive_idle_steps: int = 0
    drawn_prompts: int = 0
    useful_prompts: int = 0
    data_fingerprint: str = ""
    gate_starts: dict[str, list[float]] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """Bytes of a file, and the SHA-256 of its content in hexadecimal, as sha256sum prints it."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRecord:
    """The content of checkpoint.json.

    Args:
        architecture: every field of the Architecture.
        dtype: of the weights, bf16, fp32 or fp16 (converted ones only).
        optimizer: its name in the configuration, None when only weights are stored.
        optimizer_step: updates applied (Adam's t).
        reference: kind of the reference whose weights are stored, None when none are.
        layout: sizes of the parallel axes and the kind of device, for the random generators.
        versions: of the packages that wrote it.
        files: by path below the directory, checkpoint.json itself left out.
        lora: where only adapters are stored, what they are and the fingerprint of the weights under them.
    """

    trainer: TrainerState
    architecture: Mapping[str, Any]
    dtype: str
    optimizer: str | None
    optimizer_step: int
    reference: str | None
    layout: Mapping[str, str | int]
    versions: Mapping[str, str]
    files: Mapping[str, FileRecord]
    lora: Mapping[str, Any] | None = None

    def to_json(self) -> str:
        values = {"format": FORMAT, **dataclasses.asdict(self)}
        if self.lora is None:
            del values["lora"]  # as older versions write and read it
        return json.dumps(values, indent=2) + "\n"

    def content_hash(self) -> str:
        """SHA-256 over the names and hashes of all files, in hexadecimal."""
        hashes = {name: file.sha256 for name, file in sorted(self.files.items())}
        return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def read_record(path: Path) -> CheckpointRecord:
    """The record of the checkpoint `path`; UserError without a checkpoint.json that this version can read."""
    file = path / FILE_NAME
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(
            f"{path} has no {FILE_NAME}: it is not a complete checkpoint. Choose another one, or delete it"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise error_of(
            f"checkpoint {path} is damaged: {FILE_NAME} cannot be read ({error})", error
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else None
        raise UserError(f"{file}: expected format {FORMAT}, got {found!r}; it was written by another version")
    try:
        return _from_json(content)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"checkpoint {path} is damaged: {FILE_NAME} lacks or misnames {error}") from error


def differences(
    stored: Mapping[str, Any],
    current: Mapping[str, Any],
) -> list[str]:
    """`name: checkpoint a, this run b` for each value that is not the same."""
    return [
        f"{name}: checkpoint {stored.get(name)!r}, this run {current.get(name)!r}"
        for name in sorted({*stored, *current})
        if stored.get(name) != current.get(name)
    ]


def _from_json(content: dict[str, Any]) -> CheckpointRecord:
    fields = {name: value for name, value in content.items() if name != "format"}
    fields["trainer"] = TrainerState(**fields["trainer"])
    fields["files"] = {name: FileRecord(**file) for name, file in fields["files"].items()}
    return CheckpointRecord(**fields)


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
        directory: of all checkpoints; created when missing.
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
        temporary: from begin(), with every file but checkpoint.json, which `record` describes.
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
    shutil.rmtree(temporary, ignore_errors=True)


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def _size(num_bytes: int) -> str:
    if num_bytes < 10**6:
        return f"{num_bytes / 1e3:.1f} kB"
    return f"{num_bytes / 1e9:.3f} GB"


# Every file of a checkpoint is hashed when written and again before it is used, by all ranks together.
#
# torch reads tensors without comparing the checksums in its own files (measured with torch 2.13: a flipped
# bit in a weight loads without a word), so nothing else would notice a damaged disk.


def hashed_files(
    directory: Path,
    group: dist.ProcessGroup | None = None,
    *,
    names: Sequence[str] | None = None,
    on_progress: Callable[[], None] | None = None,
) -> dict[str, FileRecord]:
    """Size and hash of files below `directory` that do not change any more; each rank reads its share.

    Args:
        names: all of them when not given.
        on_progress: called for each file.
    Raises:
        UserError, RuntimeError: on every rank, when any rank could not read.
    """
    if names is None:
        names = on_rank_zero(
            lambda: sorted(
                str(path.relative_to(directory))
                for path in directory.rglob("*")
                if path.is_file() and path.name != LOCK
            ),
            group,
        )

    def record(name: str) -> FileRecord:
        if on_progress is not None:
            on_progress()
        return file_record(directory / name)

    mine = on_every_rank(lambda: {name: record(name) for name in _share(names)}, group)
    everyone: list[dict[str, FileRecord]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, mine, group=group)
    merged = {name: record for each in everyone for name, record in each.items()}
    return {name: merged[name] for name in names}


class Verification:
    """Hashes a checkpoint's files in a thread, each rank its share, while the checkpoint is used; collective.

    Raises:
        UserError: on every rank: no checkpoint.json that can be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record: CheckpointRecord = on_rank_zero(lambda: read_record(path))
        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hash")
        self._mine = pool.submit(self._problems_of_share)
        pool.shutdown(wait=False)

    def finish(self) -> CheckpointRecord:
        """Wait for all ranks; every rank calls it before anything made of the checkpoint counts.

        Raises:
            UserError: on every rank, naming the first files that are missing or have another size or content.
        """
        mine = on_every_rank(self._mine.result)
        everyone: list[list[str | None]] = [[]] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        if problems := sorted(text for each in everyone for text in each if text is not None):
            raise UserError(
                f"checkpoint {self.path} is damaged: {'; '.join(first_of(problems))}. Nothing was loaded; "
                "delete this directory to go back to the checkpoint before it"
            )
        return self.record

    def _problems_of_share(self) -> list[str | None]:
        files = self.record.files
        return [file_problem(self.path / name, files[name]) for name in _share(list(files))]


def verified_record(path: Path) -> CheckpointRecord:
    """The record of a checkpoint whose files all are what was written.

    Raises:
        UserError: on every rank, naming the first files that are missing or have another size or content.
    """
    return Verification(path).finish()


def _share(names: Sequence[str]) -> list[str]:
    return list(names)[dist.get_rank() :: dist.get_world_size()]
