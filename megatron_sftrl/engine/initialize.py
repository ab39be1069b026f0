"""Random initial weights that depend on the seed and the parameter's name, never on the layout.

megatron-core draws weights rank by rank, so tp2 and pp2 would start from different models. Here each
parameter is drawn whole from a generator seeded by (seed, name, layer), and a rank keeps its slice.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megatron_sftrl.engine.model import LanguageModel
from megatron_sftrl.models.architecture import Architecture


@torch.no_grad()
def initialize_weights(chunks: list[LanguageModel], architecture: Architecture, *, seed: int) -> None:
    """Fill every parameter: normal(0, std) matrices, ones in norms, zeros in biases and padding.

    Output projections of attention and MLP use std / sqrt(2 * num_layers) (GPT-2), as Megatron does.
    """
    for chunk in chunks:
        for shard in _sharded_tensors(chunk.sharded_state_dict()):
            _fill(shard, architecture, seed)


@torch.no_grad()
def zero_weights(chunks: list[LanguageModel]) -> None:
    """Defined values everywhere, rows of vocabulary padding included, before weights are loaded."""
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.zero_()


def _sharded_tensors(state: dict) -> Iterator[ShardedTensor]:
    for value in state.values():
        if isinstance(value, ShardedTensor):
            yield value
        elif isinstance(value, ShardedTensorFactory):
            # The gated MLP's two halves are views into one parameter.
            yield from value.build()  # type: ignore[misc]


def _fill(shard: ShardedTensor, architecture: Architecture, seed: int) -> None:
    data, stacked = shard.data, shard.prepend_axis_num
    assert data is not None
    if shard.key.endswith("bias"):
        data.zero_()
    elif "norm" in shard.key.rsplit("linear_", 1)[-1]:
        # "layer_norm_weight" of Transformer Engine's fused linear, or a norm of its own.
        data.fill_(1.0)
    else:
        whole_shape = shard.global_shape[stacked:]
        offset = shard.global_offset[stacked:]
        whole = _draw(shard.key, shard.global_offset[:stacked], whole_shape, architecture, seed)
        slices = tuple(slice(start, start + size) for start, size in zip(offset, data.shape, strict=True))
        data.copy_(whole[slices])


def _draw(
    key: str, layer: tuple[int, ...], shape: tuple[int, ...], architecture: Architecture, seed: int
) -> Tensor:
    is_vocabulary = shape[0] >= architecture.vocab_size and ("embedding" in key or "output_layer" in key)
    rows = architecture.vocab_size if is_vocabulary else shape[0]
    is_output_projection = key.endswith(("linear_proj.weight", "linear_fc2.weight"))
    std = architecture.init_std / (math.sqrt(2 * architecture.num_layers) if is_output_projection else 1.0)
    digest = hashlib.sha256(f"{seed}:{key}:{layer}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    drawn = torch.zeros(shape)
    drawn[:rows] = torch.randn((rows, *shape[1:]), generator=generator) * std
    return drawn
