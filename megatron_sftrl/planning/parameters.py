"""The parameters of one model chunk on one rank, in the order in which Megatron's DDP meets them."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

from megatron_sftrl.models.architecture import Architecture, padded_vocab_size
from megatron_sftrl.models.tensors import MegatronTensor, megatron_tensors
from megatron_sftrl.planning.grid import Grid

# The order of torch.nn.Module.named_parameters in a block of engine/local_layers.py. Transformer Engine's
# blocks have norms elsewhere; that moves padding, of at most 63 elements a tensor.
_ORDER = (
    "linear_qkv.layer_norm_weight",
    "linear_proj.weight",
    "linear_qkv.weight",
    "linear_qkv.bias",
    "q_layernorm.weight",
    "k_layernorm.weight",
    "linear_fc1.layer_norm_weight",
    "pre_mlp_layernorm.weight",
    "router.weight",
    "linear_fc1.weight",
    "linear_fc2.weight",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One rank's part of one tensor.

    Args:
        key: of the tensor, see architectures/tensors.py.
        num_elements: held by the rank.
        is_expert: lives on the experts' grid.
        is_shared: the embedding of a tied model that the first and the last stage both hold.
    """

    key: str
    num_elements: int
    is_expert: bool = False
    is_shared: bool = False


@functools.lru_cache(maxsize=64)
def chunk_parameters(
    architecture: Architecture, grid: Grid, *, has_embedding: bool, has_output: bool
) -> tuple[Parameter, ...]:
    """The parameters of a chunk.

    Args:
        architecture: of the model.
        grid: of the job.
        has_embedding: it is the first chunk of the first pipeline stage.
        has_output: it is the last chunk of the last stage.
    """
    vocabulary = padded_vocab_size(architecture.vocab_size, grid.tp) // grid.tp * architecture.hidden_size
    is_shared = architecture.tie_embeddings and grid.pp > 1
    block = _block(architecture, tp=grid.tp, ep=grid.ep, etp=grid.etp)
    found = [*block * (architecture.num_layers // grid.num_chunks)]
    if has_embedding:
        key = "embedding.word_embeddings.weight"
        found.insert(0, Parameter(key=key, num_elements=vocabulary, is_shared=is_shared))
    if has_output:
        found.append(Parameter(key="decoder.final_layernorm.weight", num_elements=architecture.hidden_size))
    if has_output and (is_shared or not architecture.tie_embeddings):
        found.append(Parameter(key="output_layer.weight", num_elements=vocabulary, is_shared=is_shared))
    return tuple(found)


@functools.lru_cache(maxsize=256)
def _block(architecture: Architecture, *, tp: int, ep: int, etp: int) -> tuple[Parameter, ...]:
    """The parameters of one block on any rank."""
    # One block tells for all: the table of a large mixture has tens of thousands of lines.
    one = replace(architecture, num_layers=1, sliding_window=None, window_layers=())
    tensors = [tensor for tensor in megatron_tensors(one) if tensor.index]
    num_experts = architecture.mixture.num_experts // ep if architecture.mixture else 0
    mine = [tensor for tensor in tensors if not tensor.is_expert or tensor.index[1] < num_experts]
    return tuple(
        Parameter(
            key=tensor.key,
            num_elements=math.prod(tensor.shape) // _cuts(tensor, tp=tp, etp=etp),
            is_expert=tensor.is_expert,
        )
        for tensor in sorted(mine, key=_place)
    )


def _cuts(tensor: MegatronTensor, *, tp: int, etp: int) -> int:
    if tensor.shard is None:
        return 1
    return etp if tensor.is_expert else tp


def _place(tensor: MegatronTensor) -> tuple[int, int]:
    """Experts follow each other, each with both of its matrices."""
    within = next(place for place, name in enumerate(_ORDER) if tensor.key.endswith(name))
    return (len(_ORDER) + tensor.index[1], within) if tensor.is_expert else (within, 0)
