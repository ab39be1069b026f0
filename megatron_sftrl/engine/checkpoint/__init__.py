"""Checkpoints of one format for every layout: what is saved, how it lies on the disk, how it is proven whole.

`store` saves and loads a run; behind it `tensors` names what a checkpoint holds, `format` writes and reads
torch_dist files, `directory` makes a directory complete or refused, `background` writes beside the training.
`converted` is for conversions: weights only, under either side's names.
"""

from megatron_sftrl.engine.checkpoint.converted import StoredModel, save_converted, stored_assets
from megatron_sftrl.engine.checkpoint.directory import (
    CheckpointRecord,
    TrainerState,
    checkpoint_at,
    complete_checkpoints,
    hashed_files,
)
from megatron_sftrl.engine.checkpoint.format import StoredPart, StoredTensors
from megatron_sftrl.engine.checkpoint.store import (
    CheckpointStore,
    FoundCheckpoint,
    find_checkpoint,
    load_weights,
)

__all__ = [
    "CheckpointRecord",
    "CheckpointStore",
    "FoundCheckpoint",
    "StoredModel",
    "StoredPart",
    "StoredTensors",
    "TrainerState",
    "checkpoint_at",
    "complete_checkpoints",
    "find_checkpoint",
    "hashed_files",
    "load_weights",
    "save_converted",
    "stored_assets",
]
