"""Checkpoints of weights only, made by a conversion: training starts from them, no run resumes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import megatron.core
import torch

from megatron_sftrl.engine.checkpoint.directory import (
    FILE_NAME,
    CheckpointRecord,
    TrainerState,
    hashed_files,
)
from megatron_sftrl.engine.checkpoint.format import StoredPart, write_parts
from megatron_sftrl.engine.together import new_directory_together, on_rank_zero, sum_over_ranks
from megatron_sftrl.models.architecture import Architecture, to_record
from megatron_sftrl.models.hf_output import HfAssets, write_assets

_ASSETS = "hf"
"""Folder of a checkpoint with what travels beside weights: config.json, tokenizer, chat template."""

_DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float16: "fp16"}


def save_converted(
    out: Path, parts: Sequence[StoredPart], *, architecture: Architecture, assets: HfAssets
) -> Path:
    """Write the checkpoint directory `out`, which has its name only when it is complete; every rank calls it.

    Args:
        parts: of this process, with keys as in the table of names.
        assets: stored with them, for an export.
    Raises:
        UserError: on every rank: `out` exists, a full disk, a part that could not be read.
    """
    total = sum_over_ranks(sum(part.num_bytes for part in parts))
    with new_directory_together(out, num_bytes=total) as temporary:
        write_parts([replace(part, key=f"policy.{part.key}") for part in parts], temporary)
        on_rank_zero(lambda: store_assets(temporary, assets))
        record = CheckpointRecord(
            trainer=TrainerState(),
            architecture=to_record(architecture),
            dtype=on_rank_zero(lambda: _DTYPE_NAMES[parts[0].dtype]),
            optimizer=None,
            optimizer_step=0,
            reference=None,
            layout={},
            versions={"torch": torch.__version__, "megatron-core": megatron.core.__version__},
            files=hashed_files(temporary),
        )
        on_rank_zero(lambda: (temporary / FILE_NAME).write_text(record.to_json()))
    return out


def store_assets(checkpoint: Path, assets: HfAssets) -> None:
    folder = checkpoint / _ASSETS
    folder.mkdir()
    write_assets(folder, assets)


def stored_assets(checkpoint: Path) -> HfAssets:
    """What was stored beside the weights of a complete checkpoint."""
    folder = checkpoint / _ASSETS
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return HfAssets(files={str(path.relative_to(folder)): path.read_bytes() for path in files})
