"""Norm, attention and biased projection for machines without Transformer Engine: plain PyTorch, any device.

megatron-core's own local modules do not fit: its norm refuses sequence parallelism, its attention
builds masks on "cuda", refuses context parallelism and does not know packed sequences, its linear layer
rounds to bf16 once more than anyone else's before it adds a bias.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from megatron_sftrl.engine.packed_sequences import PackedSequences


class RMSNorm(torch.nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps), reduced in fp32."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        # finalize_model_grads sums the gradient over tp where this is set: each rank saw its own tokens.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.eps) * self.weight


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, reduced in fp32, rounded once."""
    return F.rms_norm(x.float(), (x.shape[-1],), None, eps).to(x.dtype)


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
        plan = packed_seq_params.plan(
            cp_rank=cp_rank, cp_size=cp_size, window=self.window, device=query.device
        )
        if plan.whole_order is not None:
            key = gather_from_sequence_parallel_region(key, group=self.cp_group)[plan.whole_order]
            value = gather_from_sequence_parallel_region(value, group=self.cp_group)[plan.whole_order]
        outputs = []
        for call in plan.calls:
            attended = F.scaled_dot_product_attention(
                query[call.queries].transpose(1, 2),
                key[call.keys].transpose(1, 2),
                value[call.keys].transpose(1, 2),
                attn_mask=call.mask,
                is_causal=call.mask is None,
                scale=self.scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )  # [S, heads/tp, q, head_dim]
            outputs.append(attended.transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs)[plan.back].flatten(1)  # [T, heads/tp * head_dim]


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
