"""Writing a Hugging Face model directory: complete under its name, or not there at all.

my-model/        complete: the name exists only after everything in it is on the disk
.my-model.tmp/   being written, .lock in it held by its writer; left over when a process was killed
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megatron_sftrl.errors import UserError
from megatron_sftrl.hf.disk import force_to_disk
from megatron_sftrl.hf.safetensors_writer import write_safetensors
from megatron_sftrl.hf.weight_files import INDEX_FILE, SINGLE_FILE

LOCK = ".lock"
"""Name of the file in a temporary directory that says that its writer lives; it goes before the renaming."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HfFile:
    """A weight file of a model directory.

    Args:
        name: of the file.
        tensors: names of its tensors.
    """

    name: str
    tensors: tuple[str, ...]


def plan_files(sizes: Sequence[tuple[str, int]], *, max_bytes: int) -> list[HfFile]:
    """Spread tensors over files in their order, as huggingface_hub's split does.

    Args:
        sizes: name and bytes of each tensor.
        max_bytes: of the tensors of one file; a larger tensor gets a file of its own.
    Returns:
        The files; one named model.safetensors, or several with their number in the name.
    """
    assert sizes
    assert len({name for name, _ in sizes}) == len(sizes), "a tensor is named twice"
    groups: list[list[str]] = []
    current: list[str] = []
    filled = 0
    for name, size in sizes:
        if size > max_bytes:
            groups.append([name])
            continue
        if filled + size > max_bytes:
            groups.append(current)
            current, filled = [], 0
        current.append(name)
        filled += size
    if current:
        groups.append(current)
    if len(groups) == 1:
        return [HfFile(name=SINGLE_FILE, tensors=tuple(groups[0]))]
    return [
        HfFile(name=f"model-{number:05d}-of-{len(groups):05d}.safetensors", tensors=tuple(group))
        for number, group in enumerate(groups, start=1)
    ]


def write_file(directory: Path, file: HfFile, tensors: Mapping[str, Tensor]) -> None:
    """Write a weight file and force it to the disk.

    Args:
        directory: from `new_directory`.
        file: of the plan.
        tensors: at least its tensors, CPU, contiguous.
    """
    kinds = {name: (tensors[name].dtype, tuple(tensors[name].shape)) for name in file.tensors}
    write_safetensors(directory / file.name, kinds, lambda name: tensors[name])


def write_index(directory: Path, files: Sequence[HfFile], sizes: Sequence[tuple[str, int]]) -> None:
    """Write the index of several weight files; a single one needs none.

    Args:
        directory: from `new_directory`.
        files: the plan.
        sizes: name and bytes of each tensor.
    """
    if len(files) == 1:
        return
    index = {
        "metadata": {"total_size": sum(size for _, size in sizes)},
        "weight_map": {name: file.name for file in files for name in file.tensors},
    }
    path = directory / INDEX_FILE
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    force_to_disk(path)


def temporary_directory(out: Path) -> Path:
    """Where the files of `out` are written until all of them are there."""
    return out.parent / f".{out.name}.tmp"


@contextmanager
def new_directory(out: Path, *, num_bytes: int) -> Iterator[Path]:
    """Make a directory in one step: the block fills a temporary one, which then gets its name.

    One process enters this; others may write into `temporary_directory(out)` until the block ends. An error
    in the block removes the temporary directory; what a killed process left is removed by the next one.

    Args:
        out: that does not exist; its parents are made.
        num_bytes: about as much as will be written.
    Yields:
        The temporary directory, empty.
    Raises:
        UserError: `out` exists, another process is writing it, or the disk has not the space.
    """
    out = Path(os.path.abspath(out))
    refuse_existing(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_directory(out)
    _remove_left_over(temporary, out)
    _check_space(out, num_bytes)
    temporary.mkdir()
    # The kernel takes the lock away from a killed process.
    lock = os.open(temporary / LOCK, os.O_CREAT | os.O_RDWR)
    try:
        _lock(lock)
        yield temporary
        (temporary / LOCK).unlink()
        for path in sorted(temporary.rglob("*")):
            force_to_disk(path)
        force_to_disk(temporary)
        refuse_existing(out)
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        os.close(lock)
    force_to_disk(out.parent)


def refuse_existing(out: Path) -> None:
    """Refuse to write over anything.

    Raises:
        UserError: something has this name.
    """
    if os.path.lexists(out):
        raise UserError(f"{out} exists already: choose another --out, or remove it")


def _remove_left_over(temporary: Path, out: Path) -> None:
    """Remove what a killed process left, but not what a living one is writing."""
    if not os.path.lexists(temporary):
        return
    if temporary.is_symlink() or not temporary.is_dir():
        raise UserError(
            f"{temporary} is in the way: expected no such file, or a directory left by us; remove it"
        )
    try:
        lock = os.open(temporary / LOCK, os.O_RDWR)
    except FileNotFoundError:  # killed right before the renaming
        shutil.rmtree(temporary)
        return
    try:
        if not _lock(lock):
            raise UserError(
                f"another process is writing {out} at the moment: wait for it, or choose another --out"
            )
        shutil.rmtree(temporary)
    finally:
        os.close(lock)


def _lock(descriptor: int) -> bool:
    """Take the lock; False when another process has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks (Lustre without -o flock): two writers are not told apart
    return True


def _check_space(out: Path, num_bytes: int) -> None:
    disk = shutil.disk_usage(out.parent)
    # Some network file systems report no sizes at all.
    if disk.total > 0 and disk.free < num_bytes:
        raise UserError(
            f"the disk is too full: {out} needs about {num_bytes / 1e9:.3f} GB and {out.parent} has "
            f"{disk.free / 1e9:.3f} GB left; free space or choose an --out on another disk"
        )
