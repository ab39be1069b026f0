"""Fills a model's shards straight from Hugging Face files: each rank reads its own part, nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_sftrl.engine.checkpoint.tensors import model_tensors
from megatron_sftrl.engine.model import LanguageModel
from megatron_sftrl.models.architecture import Architecture
from megatron_sftrl.models.hf_weights import HfWeights, fill_part
from megatron_sftrl.models.tensors import hf_shapes, megatron_tensors


@torch.no_grad()
def load_hf_weights(chunks: Sequence[LanguageModel], weights: HfWeights, architecture: Architecture) -> None:
    """Fill this rank's chunks; dtypes are cast, rows of vocabulary padding become zero.

    An optimizer over bf16 weights keeps fp32 copies: build it after this call, or call its
    reload_model_params().

    Args:
        chunks: this rank's chunks, without DDP, in any layout.
        weights: of a model of this architecture.
        architecture: of the chunks.
    Raises:
        UserError: every missing, extra or differently shaped tensor, before anything is changed.
    """
    weights.check(hf_shapes(architecture), tied=architecture.tie_embeddings)
    table = {(tensor.key, tensor.index): tensor for tensor in megatron_tensors(architecture)}
    num_stacked = {key: len(index) for key, index in table}
    for part in model_tensors(chunks, prefix=""):
        key = part.key.removeprefix(".")
        stacked = num_stacked[key]
        tensor = table[key, tuple(part.global_offset[:stacked])]
        offset, shape = part.global_offset[stacked:], part.local_shape[stacked:]
        assert part.data is not None
        fill_part(part.data.view(shape), tensor, offset, weights)
