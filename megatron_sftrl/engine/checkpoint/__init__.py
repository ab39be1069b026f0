"""Checkpoints of one format for every layout: what is saved, how it lies on the disk, how it is proven whole.

`store` is the door; behind it `tensors` and `optimizer` name what a checkpoint holds in coordinates of the
model, `boxes` cut a sharded optimizer's flat ranges into them, `io` writes and reads torch_dist files,
`directory`, `record`, `integrity` and `metadata` make a directory complete or refused. `converted`,
`parts` and `stored_tensors` are for conversions: checkpoints of weights only, tensor by tensor.
"""

from megatron_sftrl.engine.checkpoint.converted import save_converted, stored_assets
from megatron_sftrl.engine.checkpoint.directory import (
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
    "CheckpointStore",
    "FoundCheckpoint",
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
