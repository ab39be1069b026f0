"""What blocks of some families have and Megatron's do not: norms behind attention and MLP, norms of q and k
over all heads, multipliers, positions that differ from layer to layer.

Modules and hooks around Megatron's own, torch's or Transformer Engine's. decode_step.py has the same for one
new token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_sftrl.engine.megatron_config import scale_cos_and_sin
from megatron_sftrl.engine.packed_sequences import PackedSequences
from megatron_sftrl.models.architecture import Architecture
from megatron_sftrl.models.rope import Rope


class SpanningNorm(torch.nn.Module):
    """RMSNorm over the heads of all tensor-parallel ranks together; a rank holds its own heads' weights.

    With `keeps_fp32` queries and keys leave it in fp32 and are rounded when they have turned to their
    positions, as in transformers' OLMo.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float, num_heads: int, keeps_fp32: bool
    ) -> None:
        super().__init__()
        self.keeps_fp32 = keeps_fp32
        self.group = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp"]).tp
        self.width, self.eps = num_heads * hidden_size, eps
        self.weight = torch.nn.Parameter(
            torch.ones(
                self.width // self.group.size(),
                dtype=config.params_dtype,
                device=torch.cuda.current_device(),
            )
        )
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[..., heads/tp, head_dim]."""
        wide = x.float()
        squares = wide.square().sum(dim=(-2, -1), keepdim=True)
        # The sum's gradient, too, is a sum over ranks: each rank's heads were divided by it.
        squares = reduce_from_tensor_model_parallel_region(squares, group=self.group)
        squares = copy_to_tensor_model_parallel_region(squares, group=self.group)
        normed = wide * torch.rsqrt(squares / self.width + self.eps)
        output = normed * self.weight.view(x.shape[-2:])
        return output if self.keeps_fp32 else output.to(x.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict:
        """The weight, cut over tensor-parallel ranks."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(
            state,
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.group,
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )


def complete_blocks(
    chunk: torch.nn.Module,
    architecture: Architecture,
    frequencies: Mapping[Rope, Tensor],
    norm: Callable[..., Any],
) -> None:
    """Give a chunk that Megatron has built what its blocks lack.

    Args:
        frequencies: of each rope of the architecture, on the device.
        norm: makes a norm behind attention or MLP.
    """
    a, parts = architecture, cast(Any, chunk)
    if a.embedding_multiplier != 1 and parts.pre_process:
        parts.embedding.register_forward_hook(partial(_multiply, a.embedding_multiplier))
    if a.scales_embedding and parts.pre_process:
        scale = torch.tensor(a.hidden_size**0.5, dtype=parts.config.params_dtype)
        parts.embedding.register_forward_hook(partial(_multiply, float(scale)))
    for layer in parts.decoder.layers:
        for name, branch in (("post_self_attn", layer.self_attention), ("post_mlp", layer.mlp)):
            post_norm = None
            if a.norms != "before":
                post_norm = norm(config=layer.config, hidden_size=a.hidden_size, eps=a.norm_eps)
                layer.add_module(f"{name}_layernorm", post_norm)
            if post_norm is not None or a.residual_multiplier != 1:
                branch.register_forward_hook(partial(_finish_branch, post_norm, a.residual_multiplier))
        _set_positions(layer.self_attention, a, frequencies)
        if a.turns_in_fp32:
            layer.self_attention.core_attention.register_forward_pre_hook(_round_turned)


def _multiply(factor: float, _: torch.nn.Module, __: tuple, output: Tensor) -> Tensor:
    return output * factor


def _finish_branch(
    norm: torch.nn.Module | None, factor: float, _: torch.nn.Module, __: tuple, output: tuple
) -> tuple:
    """What the residual stream is given of attention's or the MLP's (output, bias)."""
    branch, bias = output
    assert bias is None
    if norm is not None:
        branch = norm(branch)
    return (branch if factor == 1 else branch * factor), bias


def _round_turned(_: torch.nn.Module, args: tuple) -> tuple:
    query, key, value, *others = args
    return query.to(value.dtype), key.to(value.dtype), value, *others


def _set_positions(attention: Any, architecture: Architecture, frequencies: Mapping[Rope, Tensor]) -> None:
    """Torch's layers turn here, Transformer Engine's in Megatron's way: it has one rope for all layers (or
    none: no_rope_freq). It has no factor on queries.
    """
    layer = attention.layer_number - 1
    rope = architecture.rope_of(layer)
    if rope is None or not architecture.attends(layer):
        return
    group, before = attention.pg_collection.cp, attention.core_attention.register_forward_pre_hook
    if attention.config.transformer_impl == "local":
        if architecture.latent is None:
            before(partial(_turn, rope, frequencies[rope], group), with_kwargs=True)
    elif rope != architecture.rope:
        # Its factor on cos and sin is read from the configuration.
        attention.config = copy.copy(attention.config)
        scale_cos_and_sin(attention.config, rope.attention_factor)
        attention.register_forward_pre_hook(partial(_turn_by, frequencies[rope]), with_kwargs=True)
    if rope.query_beta:
        before(partial(_scale_query, rope, group), with_kwargs=True)


def _turn(
    rope: Rope,
    frequencies: Tensor,
    group: dist.ProcessGroup,
    _: torch.nn.Module,
    args: tuple,
    options: dict[str, Any],
) -> tuple[tuple, dict]:
    query, key, *others = args
    turn = options["packed_seq_params"].turn(rope, frequencies, group, query.dtype)
    return (turn(query), turn(key), *others), options


def _turn_by(frequencies: Tensor, _: torch.nn.Module, args: tuple, options: dict) -> tuple[tuple, dict]:
    packed = options["packed_seq_params"]
    assert isinstance(packed, PackedSequences)
    places = torch.arange(packed.max_seqlen_q, device=frequencies.device, dtype=torch.float32)  # type: ignore[arg-type]
    own = torch.outer(places, frequencies)
    return args, {**options, "rotary_pos_emb": torch.cat((own, own), dim=-1)[:, None, None]}


def _scale_query(
    rope: Rope, group: dist.ProcessGroup, _: torch.nn.Module, args: tuple, options: dict
) -> tuple[tuple, dict]:
    packed, (query, *others) = options["packed_seq_params"], args
    assert isinstance(packed, PackedSequences)
    factors = query_factors(rope, packed.positions_of(group, query.device))
    return (query * factors[:, None, None].to(query.dtype), *others), options


def query_factors(rope: Rope, positions: Tensor) -> Tensor:
    """[T] fp32 by which queries at these positions are multiplied."""
    assert rope.original_length is not None
    return 1 + rope.query_beta * torch.log(1 + torch.floor(positions / rope.original_length))
