"""Tensors to and from a directory in Megatron's torch_dist format.

torch.distributed.checkpoint does it inside this process. Megatron's own synchronous save spawns a manager
process (which imports torch and the user's main module, so that must be importable) and forks a writer:
seconds for every run, a hang without psutil. The files are the same, and dist_checkpointing.load reads them.
"""

from __future__ import annotations

import contextlib
import io
import math
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    MCoreSavePlanner,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.checkpoint.utils import _create_file_view
from torch.futures import Future

from megatron_sftrl.engine.together import on_every_rank, on_rank_zero
from megatron_sftrl.errors import UserError, error_of, first_of
from megatron_sftrl.models.hf_tensor_file import StoredTensor, new_file, read_part
from megatron_sftrl.models.tensors import Region

# The index of a checkpoint's tensors (.metadata), read without trusting it.
#
# It is a pickle, which can run any code, and a checkpoint may come from someone else (model.init_checkpoint):
# only the few classes of an index are let through. Tensors are read with torch.load(weights_only=True).


_ALLOWED = {
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "torch": {"Size", "float32", "bfloat16", "float16", "float64", "uint8", "int64", "int32", "bool"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
}


class IndexReader(FileSystemReader):
    """torch's reader of checkpoint directories, with a guarded index."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = read_index(Path(self.path))
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def read_index(directory: Path) -> Metadata:
    """The index of the checkpoint in `directory`; UserError: unreadable, or it holds what no index needs."""
    file = directory / ".metadata"
    try:
        metadata = _IndexUnpickler(io.BytesIO(file.read_bytes())).load()
    except UserError:
        raise
    except Exception as error:
        raise error_of(
            f"checkpoint {directory} is damaged: .metadata cannot be read ({type(error).__name__}: {error})",
            error,
        ) from error
    if not isinstance(metadata, Metadata):
        raise UserError(f"checkpoint {directory} is damaged: .metadata is no index of tensors")
    return metadata


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _memory_format
        if name not in _ALLOWED.get(module, ()):
            raise UserError(
                f"the checkpoint's .metadata names {module}.{name}, which no index of tensors needs: it "
                "may be malicious, nothing was loaded"
            )
        return super().find_class(module, name)


def _memory_format(kind: object, name: str) -> object:
    """Python 3.11.0 to 3.11.3 pickle a member of an enumeration as getattr(its class, its name)."""
    if kind is not _MEM_FORMAT_ENCODING:
        raise UserError(
            f"the checkpoint's .metadata asks for {name} of {kind!r}, which no index of tensors needs: it "
            "may be malicious, nothing was loaded"
        )
    return _MEM_FORMAT_ENCODING[name]


def write_tensors(
    tensors: Sequence[ShardedTensor],
    directory: Path,
    group: dist.ProcessGroup | None = None,
    on_progress: Callable[[], None] | None = None,
) -> None:
    """Write this rank's main replicas; every rank calls it. Files are forced to the disk.

    Args:
        directory: empty.
        on_progress: called for each tensor.
    Raises:
        UserError, RuntimeError: on every rank, when any rank could not write.
    """
    state = mcore_to_pyt_state_dict(_by_key(stored_here(tensors)), False)  # type: ignore[arg-type]
    # Planning also checks that the regions of all ranks cover every tensor once, without overlap.
    on_every_rank(
        lambda: torch_checkpoint.save(
            state,
            storage_writer=torch_checkpoint.FileSystemWriter(directory, thread_count=1, sync_files=True),
            planner=_SavePlanner(on_progress),
            process_group=group,
        ),
        group,
    )
    on_rank_zero(lambda: finish_format(directory), group)


class _SavePlanner(MCoreSavePlanner):
    def __init__(self, on_progress: Callable[[], None] | None) -> None:
        super().__init__(dedup_replicated_tensors=False, flatten_state_dict=False)
        self._on_progress = on_progress

    def resolve_data(self, write_item: WriteItem) -> Any:
        if self._on_progress is not None:
            self._on_progress()
        return super().resolve_data(write_item)


def read_tensors(tensors: Sequence[ShardedTensor], directory: Path) -> None:
    """Fill the tensors' data in place from `directory`; every rank calls it.

    Raises:
        UserError, RuntimeError: on every rank, when any rank could not read. The tensors are then undefined.
    """
    state = mcore_to_pyt_state_dict(_by_key(tensors), True)  # type: ignore[arg-type]
    planner = MCoreLoadPlanner(
        shapes_validation_sharded_tensors=[each for each in tensors if not each.allow_shape_mismatch],
        allow_shape_mismatch_sharded_tensors={
            each.key: each for each in tensors if each.allow_shape_mismatch
        },
    )
    on_every_rank(
        lambda: torch_checkpoint.load(state, storage_reader=IndexReader(directory), planner=planner)
    )


def stored_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Global shape of every tensor in the checkpoint, by key; every rank calls it."""

    return on_rank_zero(lambda: {key: tuple(entry.size) for key, entry in _tensor_entries(directory)})


def stored_dtypes(directory: Path) -> dict[str, torch.dtype]:
    """Dtype of every tensor in the checkpoint, by key; every rank calls it."""
    return on_rank_zero(lambda: {key: entry.properties.dtype for key, entry in _tensor_entries(directory)})


def _tensor_entries(directory: Path) -> list[tuple[str, TensorStorageMetadata]]:
    index = read_index(directory).state_dict_metadata.items()
    return [(key, entry) for key, entry in index if isinstance(entry, TensorStorageMetadata)]


def check_tensors(
    tensors: Sequence[ShardedTensor], stored: dict[str, tuple[int, ...]], directory: Path
) -> None:
    """Before anything is read, compare what all ranks want with the stored shapes that some rank should want.

    Raises:
        UserError: on every rank, naming the first missing, unexpected and differently shaped tensors.
    """
    wanted = {tensor.key: (tuple(tensor.global_shape), tensor.allow_shape_mismatch) for tensor in tensors}
    everyone: list[dict[str, tuple[tuple[int, ...], bool]]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, wanted)
    all_wanted = {key: value for each in everyone for key, value in each.items()}
    problems = [f"missing: {key}" for key in sorted(all_wanted.keys() - stored.keys())]
    problems += [f"unexpected: {key}" for key in sorted(stored.keys() - all_wanted.keys())]
    for key in sorted(all_wanted.keys() & stored.keys()):
        shape, has_padding = all_wanted[key]
        # Vocabulary padding differs between layouts; the vocabulary itself is part of the architecture.
        skip = 1 if has_padding else 0
        if shape[skip:] != stored[key][skip:] or len(shape) != len(stored[key]):
            problems.append(f"shape of {key}: expected {list(shape)}, got {list(stored[key])}")
    if problems:
        heading = f"checkpoint {directory} does not fit this run; nothing was loaded:"
        raise UserError("\n  ".join([heading, *first_of(problems)]))


def num_bytes(tensors: Iterable[ShardedTensor]) -> int:
    return sum(tensor.data.nbytes for tensor in stored_here(tensors) if tensor.data is not None)


def stored_here(tensors: Iterable[ShardedTensor]) -> list[ShardedTensor]:
    """Those that this rank writes: of equal parts on several ranks, one is stored."""
    return [tensor for tensor in tensors if is_main_replica(tensor.replica_id)]


def _by_key(tensors: Iterable[ShardedTensor]) -> dict[str, list[ShardedTensor]]:
    grouped: dict[str, list[ShardedTensor]] = {}
    for tensor in tensors:
        grouped.setdefault(tensor.key, []).append(tensor)
    return grouped


def finish_format(directory: Path) -> None:
    """Write metadata.json and common.pt (empty: what is not a tensor is in checkpoint.json)."""
    written = {info.relative_path for info in (read_index(directory).storage_data or {}).values()}
    if lost := sorted(name for name in written if not (directory / name).is_file()):
        raise RuntimeError(
            f"rank 0 does not see {', '.join(lost)} that other ranks wrote to {directory}: run_dir must be "
            "on a file system that all nodes share"
        )
    # Written by hand: the function for it moved between megatron-core 0.16 and 0.19.
    torch.save({}, directory / "common.pt")
    save_config(CheckpointingConfig("torch_dist", 1), str(directory))


# The tensors of a checkpoint read where they lie, any part of them, without the other ranks.
#
# torch's own loader would make each tensor twice, once from the file and once for the part that is wanted,
# and new pages cost more than the copying: this took most of an export's time.


class StoredTensors:
    """A checkpoint's tensors; close them (contextlib.closing). UserError: the index cannot be read."""

    def __init__(self, directory: Path) -> None:
        index = read_index(directory)
        entries = index.state_dict_metadata.items()
        self._entries = {key: entry for key, entry in entries if isinstance(entry, TensorStorageMetadata)}
        self._infos = index.storage_data
        self._directory = directory
        self._streams: dict[Path, BinaryIO] = {}
        self._places: dict[MetadataIndex, StoredTensor] = {}
        self._bounds: dict[str, tuple[Tensor, Tensor]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {
            key: tuple(entry.size) for key, entry in self._entries.items()
        }
        self.dtypes: dict[str, torch.dtype] = {
            key: entry.properties.dtype for key, entry in self._entries.items()
        }

    def read_into(self, target: Tensor, key: str, offset: tuple[int, ...]) -> None:
        """Fill `target` (CPU, of the stored dtype) with the region of its shape that begins at `offset`.

        Args:
            offset: one number a dimension, stacked axes first.
        Raises:
            UserError: the files do not hold all of the region.
        """
        region, read = Region.of(target.shape, offset), 0
        for chunk in self._chunks_in(region, key):
            shared = region.intersect(Region.of(chunk.sizes, chunk.offsets))
            part, place = target[shared.relative_to(offset).slices], self._place(key, chunk)
            source = shared.relative_to(chunk.offsets).slices
            is_direct = part.is_contiguous()
            descriptor = self._streams[place.file].fileno()
            found = read_part(descriptor, place, source, out=part if is_direct else None)
            if not is_direct:
                part.copy_(found)
            read += part.numel()
        if read != target.numel():
            raise UserError(
                f"checkpoint {self._directory} is damaged: its index has {read} of {target.numel()} values "
                f"of a part of {key}; use another checkpoint"
            )

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()
        self._streams = {}

    def _chunks_in(self, region: Region, key: str) -> list[ChunkStorageMetadata]:
        """The chunks that share elements with the region.

        All are compared in one operation: experts of all layers are chunks of one tensor, thousands of them,
        and as many regions are read.
        """
        chunks = self._entries[key].chunks
        if key not in self._bounds:
            starts = torch.tensor([[*chunk.offsets] for chunk in chunks])
            self._bounds[key] = starts, starts + torch.tensor([[*chunk.sizes] for chunk in chunks])
        starts, stops = self._bounds[key]
        is_in = (starts < torch.tensor(region.stop)) & (stops > torch.tensor(region.start))
        return [chunks[place] for place in is_in.all(dim=1).nonzero().flatten().tolist()]

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


# A checkpoint's tensors written one at a time, with no model and no second copy in memory.
#
# For the conversion tools. A training run loads what is written here.


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPart:
    """A region of a checkpoint tensor that this process writes.

    Args:
        region: stacked axes (of size 1) first.
        fill: puts the values into a CPU tensor of this shape and dtype, when they are written.
    """

    key: str
    region: Region
    global_shape: tuple[int, ...]
    dtype: torch.dtype
    fill: Callable[[Tensor], None]

    @property
    def num_bytes(self) -> int:
        """Size on the disk, without the format's few bytes around it."""
        return self.region.numel * self.dtype.itemsize


def write_parts(parts: Sequence[StoredPart], directory: Path) -> None:
    """Write this process's parts, forced to the disk; every rank calls it, and together they cover each
    tensor once.

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


class _MakingPlanner(MCoreSavePlanner):
    """Asks for a part's values when the writer reaches it, and forgets them when they are written."""

    def __init__(self, parts: Sequence[StoredPart]) -> None:
        super().__init__(dedup_replicated_tensors=False, flatten_state_dict=False)
        self._parts = {(part.key, part.region.start): part for part in parts}
        # One piece of memory for all parts, one after the other: fresh pages would cost as much as copying.
        self._memory = np.empty(max((part.num_bytes for part in parts), default=0), np.uint8)

    def resolve_data(self, write_item: WriteItem) -> Tensor:  # type: ignore[override]
        offset = write_item.index.offset
        assert offset is not None
        part = self._parts[write_item.index.fqn, tuple(offset)]
        # A tensor of its own storage: torch writes the whole storage of a view.
        values = torch.frombuffer(self._memory, dtype=part.dtype, count=part.region.numel)
        values = values.view(part.region.shape)
        part.fill(values)
        return values


class _OneAtATimeWriter(torch_checkpoint.FileSystemWriter):
    """Writes torch's files, one tensor in memory at a time; torch's own writer keeps the last of each key."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._directory = directory

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results: list[WriteResult] = []
        if plan.items:
            name = f"{plan.storage_data.prefix}0.distcp"
            with new_file(self._directory / name) as stream, _without_checksums():
                for item in plan.items:
                    start = stream.tell()
                    _save(planner.resolve_data(item), stream)
                    length = stream.tell() - start
                    place = _StorageInfo(relative_path=name, offset=start, length=length)
                    results.append(WriteResult(index=item.index, size_in_bytes=length, storage_data=place))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


def _save(values: Any, stream: BinaryIO) -> None:
    try:
        torch.save(values, stream)
    except RuntimeError as error:
        # After a failed write torch ends its archive all the same, and raises about that.
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None


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
        data=torch.empty(part.region.shape, dtype=part.dtype, device="meta"),
        dtype=part.dtype,
        local_shape=part.region.shape,
        global_shape=part.global_shape,
        global_offset=part.region.start,
        axis_fragmentations=None,
    )
