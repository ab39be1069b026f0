"""From tensors to a complete checkpoint directory, while the training waits or beside it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_sftrl.engine.checkpoint import directory as checkpoint_directory
from megatron_sftrl.engine.checkpoint.converted import store_assets
from megatron_sftrl.engine.checkpoint.integrity import hashed_files
from megatron_sftrl.engine.checkpoint.io import num_bytes, write_tensors
from megatron_sftrl.engine.checkpoint.record import CheckpointRecord
from megatron_sftrl.engine.together import on_rank_zero, sum_over_ranks
from megatron_sftrl.errors import UserError
from megatron_sftrl.models.hf_output import HfAssets


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A checkpoint that is complete.

    Args:
        num_bytes: of its files.
        seconds: from the first byte until everything was on the disk under its name.
    """

    num_bytes: int
    seconds: float


def write_checkpoint(
    tensors: Sequence[ShardedTensor],
    record: CheckpointRecord,
    *,
    directory: Path,
    assets: HfAssets,
    keep_last: int,
    group: dist.ProcessGroup | None = None,
    on_progress: Callable[[], None] | None = None,
) -> Written:
    """Write a checkpoint of `record.trainer.step` and remove old ones; every rank calls it.

    Args:
        tensors: of this rank; nothing changes them meanwhile.
        record: without files.
        directory: of the run's checkpoints.
        assets: stored beside the tensors.
        keep_last: complete checkpoints that stay.
        group: of all ranks; the default one when not given.
        on_progress: called for each tensor that is written and each file that is hashed.
    Raises:
        UserError, RuntimeError: on every rank, when it could not be written (a full disk is the user's);
            earlier checkpoints are as they were.
    """
    began, step = time.monotonic(), record.trainer.step
    total = sum_over_ranks(num_bytes(tensors), group)
    temporary = on_rank_zero(lambda: checkpoint_directory.begin(directory, step, num_bytes=total), group)
    try:
        write_tensors(tensors, temporary, group, on_progress)
        on_rank_zero(lambda: store_assets(temporary, assets), group)
        whole = dataclasses.replace(record, files=hashed_files(temporary, group, on_progress=on_progress))
        on_rank_zero(lambda: checkpoint_directory.complete(temporary, whole, keep_last=keep_last), group)
    except (UserError, RuntimeError) as error:  # on every rank, from together.py
        on_rank_zero(lambda: checkpoint_directory.discard(temporary), group)
        kind = UserError if isinstance(error, UserError) else RuntimeError
        raise kind(
            f"the checkpoint of step {step} could not be written to {directory}; earlier checkpoints are "
            f"untouched. {error}"
        ) from error
    return Written(
        num_bytes=sum(file.size for file in whole.files.values()), seconds=time.monotonic() - began
    )
