"""One new token of each sequence through the weights of Megatron's layers, as few operations as it takes.

Megatron's modules spend more time on one token than its arithmetic does: autograd functions, rotations that
take cosines again in each layer, and on the CPU a look at every call. The equations and roundings are those
of the modules, torch's or Transformer Engine's, which run prompts and training; the contract of rollout
engines compares both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_sftrl.engine import cpu_backend
from megatron_sftrl.engine.blocks import query_factors
from megatron_sftrl.engine.kv_cache import CacheSlots, Reading, readings
from megatron_sftrl.engine.local_layers import layer_window, rms_norm
from megatron_sftrl.engine.rotary import Turn
from megatron_sftrl.models.architecture import Architecture, Latent
from megatron_sftrl.models.rope import Rope


@dataclass(frozen=True, slots=True, kw_only=True)
class _NormWeights:
    """Where a layer keeps the weights of its norms; every other weight has one name in all layers."""

    attention: str
    mlp: str
    experts: str


_NORM_WEIGHTS = {
    "local": _NormWeights(
        attention="input_layernorm.weight",
        mlp="pre_mlp_layernorm.weight",
        experts="pre_mlp_layernorm.weight",
    ),
    "transformer_engine": _NormWeights(
        attention="self_attention.linear_qkv.layer_norm_weight",
        mlp="mlp.linear_fc1.layer_norm_weight",
        experts="pre_mlp_layernorm.weight",
    ),
}
"""By TransformerConfig.transformer_impl."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Positions:
    """Of the new tokens in layers of one rope.

    Args:
        turn: of queries and keys.
        query: [T, 1, 1, 1] factors on queries, None for 1.
    """

    turn: Turn
    query: Tensor | None


@torch.no_grad()
def new_token_states(model: GPTModel, tokens: Tensor, places: CacheSlots) -> Tensor:
    """Hidden states behind this stage's layers, as the model's forward gives them; fills the cache.

    Args:
        model: this stage's chunk, a LanguageModel; kv_cache.why_no_cache finds nothing against it.
        tokens: [T] int64.
        places: with a span.
    Returns:
        [T, 1, H]; [T/tp, 1, H] under sequence parallelism.
    """
    modules: Any = model
    architecture: Architecture = modules.architecture
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
        ropes = [architecture.rope_of(layer.layer_number - 1) for layer in layers]
        # The kernel rounds its result alone.
        turns_in_fp32 = config.apply_rope_fusion or architecture.turns_in_fp32
        dtype = torch.float32 if turns_in_fp32 else hidden.dtype
        stand = {rope: _positions(rope, modules.frequencies, places, dtype) for rope in set(ropes)}
        windows = [layer_window(config, layer.layer_number) for layer in layers]
        read = {window: readings(places, window=window) for window in set(windows)}
        for layer, rope, window in zip(layers, ropes, windows, strict=True):
            attention = layer.self_attention
            normed = _before(hidden, names.attention, layer, architecture)
            attend = _attention if architecture.latent is None else _latent_attention
            if not architecture.attends(layer.layer_number - 1):
                attend = _delta_net
            output = attend(attention, architecture, normed, group, places, stand[rope], read[window])
            hidden = _added(hidden, output, "post_self_attn_layernorm", layer, architecture)
            if isinstance(layer.mlp, MoELayer):
                normed = _before(hidden, names.experts, layer, architecture)
                output = _experts(layer.mlp, normed, group, is_split=is_split)
            else:
                normed = _before(hidden, names.mlp, layer, architecture)
                output = _mlp(layer.mlp, normed, group)
            hidden = _added(hidden, output, "post_mlp_layernorm", layer, architecture)
        if modules.decoder.final_layernorm is not None:
            hidden = _norm(hidden, modules.decoder.final_layernorm.weight, config)
        if is_split:
            hidden = _own_share(hidden, group)
        return hidden[:, None]


def _before(x: Tensor, name: str, layer: Any, architecture: Architecture) -> Tensor:
    """What attention or the MLP is given: its norm of the residual stream, where it has one."""
    return x if architecture.norms == "behind" else _norm(x, attrgetter(name)(layer), layer.config)


def _added(residual: Tensor, output: Tensor, name: str, layer: Any, architecture: Architecture) -> Tensor:
    """The residual stream behind attention or the MLP, with the norm and the factor of blocks.py."""
    if architecture.norms != "before":
        output = _norm(output, getattr(layer, name).weight, layer.config)
    if architecture.residual_multiplier != 1:
        output = output * architecture.residual_multiplier
    return residual + output


def _norm(x: Tensor, weight: Tensor, config: TransformerConfig) -> Tensor:
    is_from_zero = config.layernorm_zero_centered_gamma
    return rms_norm(x, weight, config.layernorm_epsilon, is_from_zero=is_from_zero).to(x.dtype)


def _positions(
    rope: Rope | None, frequencies: Mapping[Rope, Tensor], places: CacheSlots, dtype: torch.dtype
) -> _Positions | None:
    """None where the layers have no positions."""
    if rope is None:
        return None
    query = None
    if rope.query_beta:
        query = query_factors(rope, places.positions.float())[:, None, None, None].to(dtype)
    return _Positions(turn=Turn.of(rope, frequencies[rope], places.positions, dtype), query=query)


def _attention(
    attention: Any,
    architecture: Architecture,
    x: Tensor,  # [T, H]
    group: dist.ProcessGroup,
    places: CacheSlots,
    positions: _Positions | None,
    read: Sequence[Reading],
) -> Tensor:
    config: TransformerConfig = attention.config
    projection = attention.linear_qkv
    head_dim = attention.hidden_size_per_attention_head
    # Transformer Engine has an empty tensor where there is no bias.
    mixed = F.linear(x, projection.weight, projection.bias if config.add_qkv_bias else None)
    mixed = _adapted(projection, x, mixed)
    # [T, groups/tp, heads per group + 2, head_dim]: the query heads of a group, its key, its value.
    mixed, gate = mixed.view(len(x), attention.num_query_groups_per_partition, -1, head_dim), None
    if architecture.has_output_gate:
        num = mixed.shape[2] // 2 - 1
        query, gate, others = mixed.split([num, num, 2], dim=2)
        mixed = torch.cat((query, others), dim=2)
    turned, value = mixed[:, :, :-1], mixed[:, :, -1]
    if architecture.qk_norm_spans_heads:
        query, key = turned[:, :, :-1], turned[:, :, -1]
        query = attention.q_layernorm(query.flatten(1, 2)).view(query.shape)
        turned = torch.cat((query, attention.k_layernorm(key)[:, :, None]), dim=2)
    elif architecture.qk_norm and architecture.norms_from_zero:
        query, key = attention.q_layernorm(turned[:, :, :-1]), attention.k_layernorm(turned[:, :, -1:])
        turned = torch.cat((query, key), dim=2)
    elif architecture.qk_norm:
        turned = rms_norm(turned, None, config.layernorm_epsilon)
        turned[:, :, :-1].mul_(attention.q_layernorm.weight)
        turned[:, :, -1].mul_(attention.k_layernorm.weight)
        turned = turned.to(x.dtype)
    if positions is not None:
        turned = positions.turn(turned)
    turned = turned.to(x.dtype)
    query, key = turned[:, :, :-1], turned[:, :, -1]
    if positions is not None and positions.query is not None:
        query = query * positions.query.to(x.dtype)
    places.cache.write(attention.layer_number, places, key, value)
    return _attended(attention, query, group, places, read, gate)


def _delta_net(
    net: Any,
    _: Architecture,
    x: Tensor,  # [T, H]
    group: dist.ProcessGroup,
    places: CacheSlots,
    __: _Positions | None,
    ___: Sequence[Reading],
) -> Tensor:
    return _row_parallel(net.linear_proj, net.step(_linear(net.in_proj, x), places), group)


def _latent_attention(
    attention: Any,
    _: Architecture,
    x: Tensor,  # [T, H]
    group: dist.ProcessGroup,
    places: CacheSlots,
    positions: _Positions | None,
    read: Sequence[Reading],
) -> Tensor:
    """latent_attention.py's; the cache holds keys and values of each head."""
    latent: Latent = attention.latent
    assert positions is not None
    if latent.query_rank is None:
        query = _linear(attention.linear_q_proj, x)
    else:
        query = attention.q_layernorm(_linear(attention.linear_q_down_proj, x))
        query = _linear(attention.linear_q_up_proj, query)
    small, turning = _linear(attention.linear_kv_down_proj, x).split([latent.rank, latent.rope_dim], -1)
    both = _linear(attention.linear_kv_up_proj, attention.kv_layernorm(small))

    turn = positions.turn
    query, key, value = attention.heads_of(query, turn(turning[:, None]), both, turn)
    query = query[:, :, None]
    if positions.query is not None:
        query = query * positions.query.to(x.dtype)
    places.cache.write(attention.layer_number, places, key, value)
    return _attended(attention, query, group, places, read)


def _attended(
    attention: Any,
    query: Tensor,  # [T, groups/tp, heads per group, head_dim]
    group: dist.ProcessGroup,
    places: CacheSlots,
    read: Sequence[Reading],
    gate: Tensor | None = None,  # as the query
) -> Tensor:
    """[T, H] of the cache, where the new tokens' keys and values are already."""
    projection = attention.linear_proj
    parts = [_attended_to(attention, query[what.rows], places, what) for what in read]
    # A pipeline has more micro-batches than responses are left.
    attended = torch.cat(parts) if parts else query.new_zeros(0, projection.weight.shape[1])
    num = len(attended)
    if gate is not None:
        attended = (attended * torch.sigmoid(gate[:num].float().flatten(1))).to(attended.dtype)
    if num < len(query):
        attended = F.pad(attended, (0, 0, 0, len(query) - num))
    output = _row_parallel(projection, attended, group)
    return output + projection.bias if attention.config.add_bias_linear else output


def _attended_to(attention: Any, query: Tensor, places: CacheSlots, what: Reading) -> Tensor:
    """[S, heads/tp * value_dim] of one run."""
    keys, values = places.cache.read(attention.layer_number, what)
    # The query heads of a group stand where other tokens would: the group's keys are read once for all.
    sinks = getattr(attention.core_attention, "softmax_offset", None)
    if sinks is None:
        scale = attention.config.softmax_scale
        attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=what.mask, scale=scale)
    else:
        scale = attention.core_attention.scale
        attended = _attended_with_sinks(query, keys, values, what.mask, sinks, scale)
    return attended.flatten(1)


def _attended_with_sinks(
    query: Tensor,  # [S, groups/tp, heads per group, head_dim]
    keys: Tensor,  # [S, groups/tp, L, head_dim]
    values: Tensor,  # [S, groups/tp, L, head_dim]
    mask: Tensor | None,
    sinks: Tensor,  # [heads/tp]
    scale: float,
) -> Tensor:
    """As scaled_dot_product_attention, with a logit of each head's own that has no value."""
    logits = (query @ keys.mT).float() * scale
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    own = sinks.float().view(1, *query.shape[1:3], 1).expand(len(query), -1, -1, 1)
    weights = torch.cat((logits, own), dim=-1).softmax(dim=-1)[..., :-1]
    return weights.to(values.dtype) @ values


def _mlp(mlp: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
    gate, up = _linear(mlp.linear_fc1, x).chunk(2, dim=-1)
    if mlp.config.bias_activation_fusion:
        gate = gate.float()  # the kernel rounds its result alone
    return _row_parallel(mlp.linear_fc2, mlp.config.activation_func(gate).mul_(up).to(x.dtype), group)


def _experts(mlp: MoELayer, x: Tensor, group: dist.ProcessGroup, *, is_split: bool) -> Tensor:
    """Megatron's own module: the tokens meet those of other ranks there."""
    if not is_split:
        return mlp(x[:, None])[0][:, 0]
    return gather_from_sequence_parallel_region(mlp(_own_share(x, group)[:, None])[0], group=group)[:, 0]


def _row_parallel(projection: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
    partial = F.linear(x, projection.weight)
    if group.size() > 1:
        dist.all_reduce(partial, group=group)
    return _adapted(projection, x, partial)


def _linear(projection: Any, x: Tensor) -> Tensor:
    return _adapted(projection, x, F.linear(x, projection.weight))


def _adapted(projection: Any, x: Tensor, output: Tensor) -> Tensor:
    """With what the layer's adapters add (engine/lora.py)."""
    for adapter in getattr(projection, "adapters", ()):
        output = output + adapter(x, is_split=False)
    return output


def _own_share(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return x.chunk(group.size())[group.rank()]
