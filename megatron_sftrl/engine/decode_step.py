"""One new token of each sequence through the weights of Megatron's layers, as few operations as it takes.

Megatron's modules spend more time on one token than its arithmetic does: autograd functions, rotations that
take cosines again in each layer, and on the CPU a look at every call. The equations and roundings are those
of the modules, torch's or Transformer Engine's, which run prompts and training; the contract of rollout
engines compares both.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
    _yarn_get_concentration_factor_from_config,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_sftrl.engine import cpu_backend
from megatron_sftrl.engine.kv_cache import CacheSlots, seen_positions
from megatron_sftrl.engine.local_layers import layer_window, rms_norm


@dataclass(frozen=True, slots=True, kw_only=True)
class _NormWeights:
    """Where a layer keeps the weights of its norms; every other weight has one name in all layers.

    Args:
        rounds_twice: x / rms(x) is rounded before the weight is multiplied with it, not only afterwards.
    """

    attention: str
    mlp: str
    experts: str
    rounds_twice: bool


_NORM_WEIGHTS = {
    "local": _NormWeights(
        attention="input_layernorm.weight",
        mlp="pre_mlp_layernorm.weight",
        experts="pre_mlp_layernorm.weight",
        rounds_twice=True,
    ),
    "transformer_engine": _NormWeights(
        attention="self_attention.linear_qkv.layer_norm_weight",
        mlp="mlp.linear_fc1.layer_norm_weight",
        experts="pre_mlp_layernorm.weight",
        rounds_twice=False,
    ),
}
"""By TransformerConfig.transformer_impl."""


@torch.no_grad()
def new_token_states(model: GPTModel, tokens: Tensor, places: CacheSlots) -> Tensor:
    """Hidden states behind this stage's layers, as the model's forward gives them; fills the cache.

    Args:
        model: this stage's chunk; kv_cache.why_no_cache finds nothing against it.
        tokens: [T] int64.
        places: with a span.
    Returns:
        [T, 1, H]; [T/tp, 1, H] under sequence parallelism.
    """
    modules: Any = model
    config: TransformerConfig = modules.config
    group: dist.ProcessGroup = modules.pg_collection.tp
    is_split = config.sequence_parallel
    names = _NORM_WEIGHTS[config.transformer_impl]
    if modules.pre_process:
        hidden = modules.embedding(input_ids=tokens[None], position_ids=places.positions[None])
    else:
        hidden = modules.decoder.input_tensor
    layers = modules.decoder.layers
    has_experts = any(isinstance(layer.mlp, MoELayer) for layer in layers)
    with contextlib.nullcontext() if has_experts else cpu_backend.without_redirection():
        hidden = hidden[:, 0]  # [T, H]
        if is_split:
            hidden = gather_from_sequence_parallel_region(hidden, group=group)
        turn = _cos_sin(modules, places, hidden.dtype)
        windows = [layer_window(config, layer.layer_number) for layer in layers]
        masks = {window: seen_positions(places, window=window) for window in set(windows)}
        for layer, window in zip(layers, windows, strict=True):
            normed = _norm(hidden, attrgetter(names.attention)(layer), config)
            hidden = hidden + _attention(layer.self_attention, normed, group, places, turn, masks[window])
            if isinstance(layer.mlp, MoELayer):
                normed = _norm(hidden, attrgetter(names.experts)(layer), config)
                hidden = hidden + _experts(layer.mlp, normed, group, is_split=is_split)
            else:
                normed = _norm(hidden, attrgetter(names.mlp)(layer), config)
                hidden = hidden + _mlp(layer.mlp, normed, group)
        if modules.decoder.final_layernorm is not None:
            hidden = _norm(hidden, modules.decoder.final_layernorm.weight, config)
        if is_split:
            hidden = _own_share(hidden, group)
        return hidden[:, None]


def _norm(x: Tensor, weight: Tensor, config: TransformerConfig) -> Tensor:
    return (_divided_by_rms(x, config) * weight).to(x.dtype)


def _divided_by_rms(x: Tensor, config: TransformerConfig) -> Tensor:
    """Over the last dimension; in fp32 where the layer multiplies its weight before it rounds."""
    rounds_twice = _NORM_WEIGHTS[config.transformer_impl].rounds_twice
    return rms_norm(x if rounds_twice else x.float(), config.layernorm_epsilon)


def _cos_sin(modules: Any, places: CacheSlots, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[T, 1, 1, head_dim] each; the sine has the sign with which the other half of a head is added."""
    if modules.config.apply_rope_fusion:
        dtype = torch.float32  # the kernel rounds its result alone
    angles = torch.outer(places.positions.float(), modules.rotary_pos_emb.inv_freq)
    factor = _yarn_get_concentration_factor_from_config(modules.config)
    cos, sin = angles.cos() * factor, angles.sin() * factor
    cos, sin = torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)
    return cos[:, None, None], sin[:, None, None]


def _attention(
    attention: Any,
    x: Tensor,  # [T, H]
    group: dist.ProcessGroup,
    places: CacheSlots,
    turn: tuple[Tensor, Tensor],
    mask: Tensor | None,
) -> Tensor:
    config: TransformerConfig = attention.config
    projection = attention.linear_qkv
    head_dim = attention.hidden_size_per_attention_head
    # Transformer Engine has an empty tensor where there is no bias.
    mixed = F.linear(x, projection.weight, projection.bias if config.add_qkv_bias else None)
    # [T, groups/tp, heads per group + 2, head_dim]: the query heads of a group, its key, its value.
    mixed = mixed.view(len(x), attention.num_query_groups_per_partition, -1, head_dim)
    turned, value = mixed[:, :, :-1], mixed[:, :, -1]
    if config.qk_layernorm:
        turned = _divided_by_rms(turned, config)
        turned[:, :, :-1].mul_(attention.q_layernorm.weight)
        turned[:, :, -1].mul_(attention.k_layernorm.weight)
        turned = turned.to(x.dtype)
    cos, sin = turn
    turned = (turned * cos).add_(turned.roll(head_dim // 2, -1) * sin).to(x.dtype)
    places.cache.write(attention.layer_number, places, turned[:, :, -1], value)
    keys, values = places.cache.read(attention.layer_number, places)
    num = len(keys)
    # The query heads of a group stand where other tokens would: the group's keys are read once for all.
    attended = F.scaled_dot_product_attention(
        turned[:num, :, :-1], keys, values, attn_mask=mask, scale=config.softmax_scale
    ).flatten(1)
    if num < len(x):
        attended = F.pad(attended, (0, 0, 0, len(x) - num))
    return _row_parallel(attention.linear_proj, attended, group)


def _mlp(mlp: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
    gate, up = F.linear(x, mlp.linear_fc1.weight).chunk(2, dim=-1)
    if mlp.config.bias_activation_fusion:
        gate = gate.float()  # the kernel rounds its result alone
    return _row_parallel(mlp.linear_fc2, F.silu(gate).mul_(up).to(x.dtype), group)


def _experts(mlp: MoELayer, x: Tensor, group: dist.ProcessGroup, *, is_split: bool) -> Tensor:
    """Megatron's own module: the tokens meet those of other ranks there."""
    if not is_split:
        return mlp(x[:, None])[0][:, 0]
    return gather_from_sequence_parallel_region(mlp(_own_share(x, group)[:, None])[0], group=group)[:, 0]


def _row_parallel(projection: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
    partial = F.linear(x, projection.weight)
    if group.size() > 1:
        dist.all_reduce(partial, group=group)
    return partial


def _own_share(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return x.chunk(group.size())[group.rank()]
