"""checkpoint.json: what a checkpoint is, readable by people, and what its files must look like."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sftrl.errors import UserError, error_of

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
        skipped_steps: steps whose gradient was not finite.
        consecutive_skipped_steps: of them, the unbroken streak that ends at `step`.
        consecutive_idle_steps: steps of GRPO with nothing to learn from, the unbroken streak up to `step`.
        drawn_prompts, useful_prompts: of the last step under dynamic sampling, which the next one counts on.
        data_fingerprint: hash of the tokenized training data, so that a resume on changed data is noticed.
    """

    step: int = 0
    consumed_samples: int = 0
    skipped_steps: int = 0
    consecutive_skipped_steps: int = 0
    consecutive_idle_steps: int = 0
    drawn_prompts: int = 0
    useful_prompts: int = 0
    data_fingerprint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """A file of the checkpoint.

    Args:
        size: bytes.
        sha256: of its content, in hexadecimal as sha256sum prints it.
    """

    size: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRecord:
    """The content of checkpoint.json.

    Args:
        trainer: where the run stood.
        architecture: every field of the Architecture.
        dtype: of the weights, bf16, fp32 or fp16 (converted ones only).
        optimizer: its name in the configuration, None when only weights are stored.
        optimizer_step: updates applied (Adam's t).
        reference: kind of the reference whose weights are stored, None when none are.
        layout: sizes of the parallel axes and the kind of device, for the random generators.
        versions: of the packages that wrote it.
        files: by path below the directory, checkpoint.json itself left out.
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

    def to_json(self) -> str:
        """The text of checkpoint.json."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=2) + "\n"

    def content_hash(self) -> str:
        """SHA-256 over the names and hashes of all files, in hexadecimal."""
        hashes = {name: file.sha256 for name, file in sorted(self.files.items())}
        return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def read_record(path: Path) -> CheckpointRecord:
    """The record of the checkpoint directory `path`.

    Raises:
        UserError: no checkpoint.json there, or one that this version cannot read.
    """
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
