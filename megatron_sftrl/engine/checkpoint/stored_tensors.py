"""The tensors of a checkpoint read where they lie, any part of them, without the other ranks.

torch's own loader would make each tensor twice, once from the file and once for the part that is wanted, and
new pages cost more than the copying: this took most of an export's time.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_sftrl.engine.checkpoint.metadata import read_index
from megatron_sftrl.errors import UserError
from megatron_sftrl.models.hf_tensor_file import StoredTensor, read_part


class StoredTensors:
    """A checkpoint directory's tensors; close them (contextlib.closing).

    Args:
        directory: of the checkpoint.
    Raises:
        UserError: the index cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        index = read_index(directory)
        entries = index.state_dict_metadata.items()
        self._entries = {key: entry for key, entry in entries if isinstance(entry, TensorStorageMetadata)}
        self._infos = index.storage_data
        self._directory = directory
        self._streams: dict[Path, BinaryIO] = {}
        self._places: dict[MetadataIndex, StoredTensor] = {}
        self.shapes: dict[str, tuple[int, ...]] = {
            key: tuple(entry.size) for key, entry in self._entries.items()
        }
        self.dtypes: dict[str, torch.dtype] = {
            key: entry.properties.dtype for key, entry in self._entries.items()
        }

    def read_into(self, target: Tensor, key: str, offset: tuple[int, ...]) -> None:
        """Read the box of a tensor that begins at `offset` and has the target's shape.

        Args:
            target: filled; CPU, of the stored dtype.
            key: of the tensor.
            offset: one number a dimension, stacked axes first.
        Raises:
            UserError: the files do not hold all of the box.
        """
        read = 0
        for chunk in self._entries[key].chunks:
            overlap = _overlap(offset, tuple(target.shape), tuple(chunk.offsets), tuple(chunk.sizes))
            if overlap is None:
                continue
            part, place = target[overlap.in_box], self._place(key, chunk)
            is_direct = part.is_contiguous()
            descriptor = self._streams[place.file].fileno()
            found = read_part(descriptor, place, overlap.in_chunk, out=part if is_direct else None)
            if not is_direct:
                part.copy_(found)
            read += part.numel()
        if read != target.numel():
            raise UserError(
                f"checkpoint {self._directory} is damaged: its index has {read} of {target.numel()} values "
                f"of a part of {key}; use another checkpoint"
            )

    def close(self) -> None:
        """Close the files; nothing can be read afterwards."""
        for stream in self._streams.values():
            stream.close()
        self._streams = {}

    def _place(self, key: str, chunk: ChunkStorageMetadata) -> StoredTensor:
        """Where a chunk of a tensor lies; found out once."""
        index = MetadataIndex(key, chunk.offsets)
        if index not in self._places:
            info = self._infos[index]
            file = self._directory / info.relative_path
            if file not in self._streams:
                self._streams[file] = file.open("rb")
            # A fake tensor knows its place in the file and occupies no memory.
            with FakeTensorMode():
                view = cast(
                    BinaryIO,
                    _create_file_view(cast(io.IOBase, self._streams[file]), info.offset, info.length),
                )
                found = torch.load(view, map_location="cpu", weights_only=True)
            start = getattr(found.untyped_storage(), "_checkpoint_offset", None)
            if start is None or not found.is_contiguous() or found.numel() != math.prod(chunk.sizes):
                raise UserError(f"{file}: {key} is not stored as the contiguous tensor that the index names")
            self._places[index] = StoredTensor(
                file=file,
                offset=info.offset + start + found.storage_offset() * found.element_size(),
                shape=tuple(chunk.sizes),
                dtype=found.dtype,
            )
        return self._places[index]


@dataclass(frozen=True, slots=True)
class _Overlap:
    """What two boxes of a tensor share, in the coordinates of each."""

    in_box: tuple[slice, ...]
    in_chunk: tuple[slice, ...]


def _overlap(
    box: tuple[int, ...], box_shape: tuple[int, ...], chunk: tuple[int, ...], chunk_shape: tuple[int, ...]
) -> _Overlap | None:
    in_box, in_chunk = [], []
    for first, size, other, other_size in zip(box, box_shape, chunk, chunk_shape, strict=True):
        start, end = max(first, other), min(first + size, other + other_size)
        if start >= end:
            return None
        in_box.append(slice(start - first, end - first))
        in_chunk.append(slice(start - other, end - other))
    return _Overlap(tuple(in_box), tuple(in_chunk))
