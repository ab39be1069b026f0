"""A checkpoint's tensors written one at a time, with no model and no second copy in memory.

For the conversion tools. The files are those of io.py: a training run loads what is written here.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_sftrl.engine.checkpoint.io import finish_format
from megatron_sftrl.engine.checkpoint.record import FileRecord
from megatron_sftrl.engine.together import on_every_rank, on_rank_zero
from megatron_sftrl.models.direct_file import new_direct_file


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPart:
    """A box of a checkpoint tensor that this process writes.

    Args:
        key: of the tensor.
        offset, shape: of the box, one number a dimension, stacked axes (of size 1) first.
        global_shape: of the tensor.
        dtype: of its elements.
        fill: puts the values into a CPU tensor of this shape and dtype, when they are written.
    """

    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    global_shape: tuple[int, ...]
    dtype: torch.dtype
    fill: Callable[[Tensor], None]

    @property
    def num_bytes(self) -> int:
        """Size on the disk, without the format's few bytes around it."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_parts(parts: Sequence[StoredPart], directory: Path) -> dict[str, FileRecord]:
    """Write this process's parts; every rank calls it, and together they cover each tensor once.

    Returns:
        Size and hash of the files that this process wrote and forced to the disk, by name. The index is
        none of them.
    Raises:
        UserError: on every rank, when any rank could not make or write a part.
    """
    by_key: dict[str, list[Any]] = {}
    for part in parts:
        by_key.setdefault(part.key, []).append(_placeholder(part))
    state = mcore_to_pyt_state_dict(by_key, False)
    writer = _OneAtATimeWriter(directory)
    on_every_rank(lambda: torch_checkpoint.save(state, storage_writer=writer, planner=_MakingPlanner(parts)))
    on_rank_zero(lambda: finish_format(directory))
    return writer.files


class _MakingPlanner(MCoreSavePlanner):
    """Asks for a part's values when the writer reaches it, and forgets them when they are written."""

    def __init__(self, parts: Sequence[StoredPart]) -> None:
        super().__init__(dedup_replicated_tensors=False, flatten_state_dict=False)
        self._parts = {(part.key, part.offset): part for part in parts}
        # One piece of memory for all parts, one after the other: fresh pages would cost as much as copying.
        self._memory = np.empty(max((part.num_bytes for part in parts), default=0), np.uint8)

    def resolve_data(self, write_item: WriteItem) -> Tensor:  # type: ignore[override]
        offset = write_item.index.offset
        assert offset is not None
        part = self._parts[write_item.index.fqn, tuple(offset)]
        # A tensor of its own storage: torch writes the whole storage of a view.
        values = torch.frombuffer(self._memory, dtype=part.dtype, count=math.prod(part.shape))
        values = values.view(part.shape)
        part.fill(values)
        return values


class _OneAtATimeWriter(torch_checkpoint.FileSystemWriter):
    """Writes torch's files, one tensor in memory at a time; torch's own writer keeps the last of each key."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._directory = directory
        self.files: dict[str, FileRecord] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results: list[WriteResult] = []
        if plan.items:
            name = f"{plan.storage_data.prefix}0.distcp"
            # Hashed on the way: the disk need not be asked for the bytes again.
            digest = hashlib.sha256()
            file = new_direct_file(self._directory / name, on_bytes=digest.update)
            with file as stream, _without_checksums():
                for item in plan.items:
                    start = stream.tell()
                    torch.save(planner.resolve_data(item), cast(IO[bytes], stream))
                    length = stream.tell() - start
                    place = _StorageInfo(relative_path=name, offset=start, length=length)
                    results.append(WriteResult(index=item.index, size_in_bytes=length, storage_data=place))
            self.files[name] = FileRecord(size=stream.tell(), sha256=digest.hexdigest())
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


@contextlib.contextmanager
def _without_checksums() -> Iterator[None]:
    """torch would compute a CRC of each tensor that nothing compares: every file is hashed as a whole."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _placeholder(part: StoredPart) -> ShardedTensor:
    return ShardedTensor(
        key=part.key,
        data=torch.empty(part.shape, dtype=part.dtype, device="meta"),
        dtype=part.dtype,
        local_shape=part.shape,
        global_shape=part.global_shape,
        global_offset=part.offset,
        axis_fragmentations=None,
    )
