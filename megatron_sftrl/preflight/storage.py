"""The run directory: seen and written by every node, with space for the checkpoints."""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path

from megatron_sftrl.config.schema import TrainingConfig
from megatron_sftrl.models.architecture import Architecture
from megatron_sftrl.models.tensors import hf_shapes

_PATIENCE_S = 10.0  # network file systems show a new file to other nodes only after a while
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def existing_ancestor(path: Path) -> Path:
    """The path itself, or the nearest directory above it that exists."""
    path = path.absolute()
    return path if path.is_dir() else existing_ancestor(path.parent)


def leave_mark(directory: Path, name: str) -> None:
    """Write a small file.

    Raises:
        OSError: the directory cannot be written.
    """
    (directory / name).write_text(name)


def see_mark(directory: Path, name: str) -> bool:
    """Whether a file that another node has written can be read here, after some patience."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            if (directory / name).read_text() == name:
                return True
        except OSError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)


def checkpoint_bytes(config: TrainingConfig, architecture: Architecture) -> int:
    """Bytes of one checkpoint: weights in their dtype; fp32 main weights, moments and moving reference.

    A lower bound: the few megabytes of indexes, random states and tokenizer are left out.
    """
    parameters = sum(map(math.prod, hf_shapes(architecture).values()))
    weights = _BYTES[config.model.dtype]
    moments = 2 if config.optim.name == "adamw" else int(config.optim.momentum > 0)
    # A model in fp32 is its own main weights.
    main = 1 if weights < 4 else 0
    moving = config.reference is not None and config.reference.kind == "moving_average"
    return parameters * (weights + 4 * (main + moments + moving))


def space_problem(config: TrainingConfig, architecture: Architecture) -> tuple[str, str | None]:
    """(what was seen, what is wrong): the disk holds the checkpoints that the run keeps, and one more.

    Args:
        config: of the run; what lies in its run directory already is counted.
        architecture: of its model.
    """
    directory = existing_ancestor(config.run_dir)
    there = len(list((config.run_dir / "checkpoints").glob("step-*")))
    still = max(1, config.checkpoint.keep_last + 1 - there)
    one = checkpoint_bytes(config, architecture)
    disk = shutil.disk_usage(directory)
    detail = f"{disk.free / 1e9:.1f} GB free, {still} checkpoint(s) of {one / 1e9:.3f} GB to come"
    # Some network file systems report no sizes at all.
    if disk.total == 0 or disk.free >= still * one:
        return detail, None
    return detail, (
        f"{directory} has {disk.free / 1e9:.1f} GB free and the run will write {still} checkpoint(s) of "
        f"{one / 1e9:.1f} GB before it removes one: free space, choose another run_dir, or lower "
        "checkpoint.keep_last"
    )
