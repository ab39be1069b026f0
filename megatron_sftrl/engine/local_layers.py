"""Norm, attention and biased projection for machines without Transformer Engine: plain PyTorch, any device.

megatron-core's own local modules do not fit: its norm refuses sequence parallelism, its attention
builds masks on "cuda", refuses context parallelism and does not know packed sequences, its linear layer
rounds to bf16 once more than anyone else's before it adds a bias.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_sftrl.engine.packed_sequences import PackedSequences


class RMSNorm(torch.nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps) in fp32, rounded once, as Transformer Engine's.

    With layernorm_zero_centered_gamma 1 + weight takes the place of the weight.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps, self.is_from_zero = eps, config.layernorm_zero_centered_gamma
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        # finalize_model_grads sums the gradient over tp where this is set: each rank saw its own tokens.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, is_from_zero=self.is_from_zero).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, *, is_from_zero: bool = False) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension, fp32; from zero it is 1 + weight."""
    if weight is not None:
        weight = 1 + weight.float() if is_from_zero else weight.float()
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """F.rms_norm of x.float(), which would keep x and x / rms in fp32: this keeps x as it is, and 1 / rms."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        # Keys are a part of q, k and v in one tensor, all of which a view would keep.
        x = x.contiguous()
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        normed = x * scale  # fp32, as its factor
        return normed if weight is None else normed.mul_(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        normed, grad_weight = x * scale, None
        if weight is not None and ctx.needs_input_grad[1]:
            grad_weight = (grad * normed).flatten(0, -2).sum(0)
        grad = grad.clone() if weight is None else grad * weight
        along = (grad * normed).mean(-1, keepdim=True)
        grad.sub_(normed.mul_(along)).mul_(scale)
        return grad.to(x.dtype), grad_weight, None


class BiasedColumnParallelLinear(ColumnParallelLinear):
    """x W^T + b, rounded once. Megatron rounds x W^T before it adds b: 6 % more error in a Qwen2's bf16
    logits (measured).
    """

    def _forward_impl(
        self,
        input: Tensor,  # [T, 1, H], under sequence parallelism this rank's share of T
        weight: Tensor,  # [rows/tp, H]
        *_: object,
        bias: Tensor | None,
        sequence_parallel: bool,
        allreduce_dgrad: bool,
        tp_group: torch.distributed.ProcessGroup,
        **__: object,
    ) -> Tensor:
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, group=tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=tp_group)
        return F.linear(input, weight, bias)


class PackedAttention(torch.nn.Module):
    """Causal attention over packed sequences that never crosses a boundary, also under context parallelism.

    Sequences of similar length share one call of scaled_dot_product_attention. Under context parallelism each
    rank holds chunks r and 2 cp - 1 - r of every sequence (Megatron's zig-zag order); keys and values are
    gathered over the group and the rank's queries are masked by position; so are the queries of a layer with
    a sliding window, in sequences longer than it.

    With softmax_type learnable each head's sink, a logit without a value, is one more key: the one before a
    sequence, whose product with a query is the sink. So it needs no other kernel and no mask of its own.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__()
        assert pg_collection is not None and attn_mask_type == AttnMaskType.causal
        assert config.kv_channels is not None
        self.cp_group = pg_collection.cp
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.window = layer_window(config, layer_number)
        self.softmax_offset = None
        if config.softmax_type == "learnable":
            self.tp_group = pg_collection.tp
            heads = config.num_attention_heads // self.tp_group.size()
            self.softmax_offset = torch.nn.Parameter(
                torch.zeros(heads, dtype=config.params_dtype, device=torch.cuda.current_device())
            )
            set_tensor_model_parallel_attributes(self.softmax_offset, True, 0, 1)

    def forward(
        self,
        query: Tensor,  # [T, heads/tp, head_dim]
        key: Tensor,  # [T, groups/tp, head_dim]
        value: Tensor,  # [T, groups/tp, head_dim]
        attention_mask: Tensor | None,
        /,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        assert isinstance(packed_seq_params, PackedSequences)
        assert attention_mask is None and attention_bias is None
        cp_rank, cp_size = self.cp_group.rank(), self.cp_group.size()
        plan = packed_seq_params.plan(cp_rank=cp_rank, cp_size=cp_size, window=self.window, like=query)
        if plan.whole_order is not None:
            key = gather_from_sequence_parallel_region(key, group=self.cp_group)[plan.whole_order]
            value = gather_from_sequence_parallel_region(value, group=self.cp_group)[plan.whole_order]
        outputs = []
        for call in plan.calls:
            attended = self._attend(query[call.queries], key[call.keys], value[call.keys], call.mask)
            outputs.append(attended.flatten(0, 1))
        return torch.cat(outputs)[plan.back].flatten(1)  # [T, heads/tp * head_dim]

    def _attend(
        self,
        query: Tensor,  # [S, q, heads/tp, head_dim]
        key: Tensor,  # [S, k, groups/tp, head_dim]
        value: Tensor,  # [S, k, groups/tp, head_dim]
        mask: Tensor | None,
    ) -> Tensor:
        """[S, q, heads/tp, head_dim]."""
        head_dim = query.shape[-1]
        if self.softmax_offset is not None:
            # One more dimension, 1 in the sink's key alone; a query before the others keeps the mask causal.
            sinks = (self.softmax_offset / self.scale)[:, None].expand(*query.shape[:3], 1)
            query = F.pad(torch.cat((query, sinks), dim=-1), (0, 0, 0, 0, 1, 0))
            key = F.pad(key, (0, 1, 0, 0, 1, 0))
            key[:, 0, :, -1] = 1
            value = F.pad(value, (0, 1, 0, 0, 1, 0))
            mask = None if mask is None else F.pad(mask, (1, 0, 1, 0))
        attended = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=query.shape[2] != key.shape[2],
        ).transpose(1, 2)
        return attended if self.softmax_offset is None else attended[:, 1:, :, :head_dim]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict:
        """The sinks, cut over tensor-parallel ranks; nothing without them."""
        if self.softmax_offset is None:
            return {}
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )


def layer_window(config: TransformerConfig, layer_number: int) -> int | None:
    """Positions that a query of this layer sees, its own included; None for all.

    Args:
        layer_number: Megatron's, over all stages, from 1 on.
    """
    if config.window_size is None:
        return None
    assert config.window_attn_skip_freq is not None
    is_cut = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
    return config.window_size[0] + 1 if is_cut else None
