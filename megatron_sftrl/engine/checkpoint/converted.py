"""Checkpoints and Hugging Face models: one made of the other's weights, and one seen as the other."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import megatron.core
import torch
from torch import Tensor

from megatron_sftrl.engine.checkpoint.directory import (
    FILE_NAME,
    CheckpointRecord,
    TrainerState,
    hashed_files,
)
from megatron_sftrl.engine.checkpoint.format import StoredPart, StoredTensors, write_parts
from megatron_sftrl.engine.together import new_directory_together, on_rank_zero, sum_over_ranks
from megatron_sftrl.errors import UserError, first_of
from megatron_sftrl.models.architecture import Architecture, to_record
from megatron_sftrl.models.hf_output import HfAssets, write_assets
from megatron_sftrl.models.hf_weights import fill_whole
from megatron_sftrl.models.tensors import MegatronTensor, hf_shapes, megatron_tensors

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


class StoredModel:
    """The policy in a checkpoint under the names of a Hugging Face model, tensor by tensor; close it.

    Raises:
        UserError: the checkpoint does not hold the model of this architecture.
    """

    def __init__(self, checkpoint: Path, architecture: Architecture) -> None:
        self._stored = StoredTensors(checkpoint)
        tensors = list(megatron_tensors(architecture))
        _check_stored(checkpoint, self._stored, {tensor.key: tensor for tensor in tensors})
        self._sources: dict[str, list[MegatronTensor]] = {}
        for tensor in tensors:
            for name in dict.fromkeys(run.name for run in tensor.rows):
                self._sources.setdefault(name, []).append(tensor)
        self.shapes: Mapping[str, tuple[int, ...]] = hf_shapes(architecture)
        """Of each tensor, in the order of the model."""
        self.dtypes: Mapping[str, torch.dtype] = {
            name: self._stored.dtypes[f"policy.{sources[0].key}"] for name, sources in self._sources.items()
        }

    def read(self, name: str) -> Tensor:
        """A whole tensor as it is stored, on the CPU."""
        whole = torch.empty(self.shapes[name], dtype=self.dtypes[name])
        self.read_into(whole, name)
        return whole

    def read_into(self, whole: Tensor, name: str) -> None:
        """The same, into contiguous memory of its shape and dtype."""
        for source in self._sources[name]:
            fill_whole(whole, name, source, functools.partial(self._read_part, source))

    def _read_part(self, source: MegatronTensor, part: Tensor, offset: tuple[int, ...]) -> None:
        stacked = part[(None,) * len(source.index)]
        self._stored.read_into(stacked, f"policy.{source.key}", (*source.index, *offset))

    def close(self) -> None:
        self._stored.close()


def _check_stored(path: Path, stored: StoredTensors, by_key: Mapping[str, MegatronTensor]) -> None:
    """All tensors of the table in their shapes; rows of vocabulary padding may follow."""
    problems = []
    for key, tensor in by_key.items():
        expected, found = (*tensor.stack, *tensor.shape), stored.shapes.get(f"policy.{key}")
        if found is None:
            problems.append(f"missing: {key}")
        elif found != expected and not (
            tensor.has_padding and found[0] >= expected[0] and found[1:] == expected[1:]
        ):
            problems.append(f"shape of {key}: expected {expected}, got {found}")
    if problems:
        heading = f"checkpoint {path} does not hold the model it describes:"
        raise UserError("\n  ".join([heading, *first_of(problems)]))
