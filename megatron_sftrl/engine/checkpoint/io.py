"""Tensors to and from a directory in Megatron's torch_dist format.

Written and read by torch.distributed.checkpoint inside this process. Megatron's own synchronous save goes
through a manager process that it spawns (a fresh interpreter that imports torch and the user's main
module) and a forked writer: seconds for every run, a hang without psutil, and a main module that must
be importable. The files are the same, and dist_checkpointing.load reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    MCoreSavePlanner,
    mcore_to_pyt_state_dict,
)
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItem

from megatron_sftrl.engine.checkpoint.metadata import IndexReader, read_index
from megatron_sftrl.engine.together import on_every_rank, on_rank_zero
from megatron_sftrl.errors import UserError, first_of


def write_tensors(
    tensors: Sequence[ShardedTensor],
    directory: Path,
    group: dist.ProcessGroup | None = None,
    on_progress: Callable[[], None] | None = None,
) -> None:
    """Write this rank's main replicas; every rank calls it. Files are forced to the disk.

    Args:
        tensors: of this rank.
        directory: empty.
        group: of all ranks; the default one when not given.
        on_progress: called for each tensor.
    Raises:
        UserError, RuntimeError: on every rank, when any rank could not write.
    """
    state = mcore_to_pyt_state_dict(_by_key(stored_here(tensors)), False)  # type: ignore[arg-type]
    # Planning also checks that the boxes of all ranks cover every tensor once, without overlap.
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
    """Megatron's planner, which tells of each tensor that is written."""

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
    """Compare what all ranks want with what is stored, before anything is read.

    Args:
        tensors: wanted by this rank.
        stored: shapes of the tensors that should all be wanted by some rank.
        directory: for the message.
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
    """Bytes that write_tensors would write on this rank."""
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
