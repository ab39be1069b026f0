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
        assert packed_seq_params is not None and attention_mask is None and attention_bias is None
        cp_size, cp_rank = self.cp_group.size(), self.cp_group.rank()
        # Whole lengths: cu_seqlens speak of the sequences before they were split over cp.
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        if cp_size > 1:
            order = _whole_sequence_order(lengths, cp_size).to(query.device)
            key = gather_from_sequence_parallel_region(key, group=self.cp_group)[order]
            value = gather_from_sequence_parallel_region(value, group=self.cp_group)[order]
        outputs, rows = [], []
        for sequences in _similar_lengths(lengths):
            q_index = _padded_index(sequences, lengths, cp_size).to(query.device)  # [S, q]
            k_index = _padded_index(sequences, lengths, 1).to(query.device)  # [S, k]
            mask = None
            if cp_size > 1 or (self.window is not None and k_index.shape[1] > self.window):
                mask = _position_mask(sequences, lengths, cp_size, cp_rank, self.window).to(query.device)
            attended = F.scaled_dot_product_attention(
                query[q_index].transpose(1, 2),
                key[k_index].transpose(1, 2),
                value[k_index].transpose(1, 2),
                attn_mask=mask,
                is_causal=mask is None,
                scale=self.scale,
                enable_gqa=query.shape[1] != key.shape[1],
            ).transpose(1, 2)  # [S, q, heads/tp, head_dim]
            real = _real_entries(sequences, lengths, cp_size).to(query.device)  # [S, q]
            outputs.append(attended[real])
            rows.append(q_index[real])
        back_in_order = torch.cat(rows).argsort()
        return torch.cat(outputs)[back_in_order].flatten(1)  # [T, heads/tp * head_dim]


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


def _similar_lengths(lengths: list[int]) -> list[list[int]]:
    """Sequence indices grouped so that padding inside a group less than doubles the work per axis."""
    groups: dict[int, list[int]] = {}
    for sequence, length in enumerate(lengths):
        if length > 0:
            groups.setdefault(length.bit_length(), []).append(sequence)
    return list(groups.values())


def _padded_index(sequences: list[int], lengths: list[int], split: int) -> Tensor:
    """[S, longest / split] row of each token in the packed tensor; short sequences repeat their last row."""
    local = torch.tensor(lengths) // split
    starts = F.pad(local.cumsum(0), (1, 0))[:-1]
    chosen = torch.tensor(sequences)
    steps = torch.arange(int(local[chosen].max()))
    return starts[chosen, None] + torch.minimum(steps[None], local[chosen, None] - 1)


def _real_entries(sequences: list[int], lengths: list[int], split: int) -> Tensor:
    """[S, longest / split] False where _padded_index repeats a row."""
    local = (torch.tensor(lengths) // split)[torch.tensor(sequences)]
    return torch.arange(int(local.max()))[None] < local[:, None]


def zigzag_positions(length: int, cp_size: int, cp_rank: int) -> Tensor:
    """[length / cp] positions that `cp_rank` holds of a sequence: chunks r and 2 cp - 1 - r of 2 cp."""
    if cp_size == 1:
        return torch.arange(length)
    chunks = torch.arange(length).chunk(2 * cp_size) if length else (torch.arange(0),) * (2 * cp_size)
    return torch.cat([chunks[cp_rank], chunks[2 * cp_size - 1 - cp_rank]])


def _whole_sequence_order(lengths: list[int], cp_size: int) -> Tensor:
    """[T] row of the rank-by-rank gathered tensor at which each token of the whole packed order stands."""
    num_local = sum(lengths) // cp_size
    source = torch.empty(sum(lengths), dtype=torch.int64)
    start = 0
    for length in lengths:
        for rank in range(cp_size):
            local = rank * num_local + start // cp_size + torch.arange(length // cp_size)
            source[start + zigzag_positions(length, cp_size, rank)] = local
        start += length
    return source


def _position_mask(
    sequences: list[int], lengths: list[int], cp_size: int, cp_rank: int, window: int | None
) -> Tensor:
    """[S or 1, 1, q, k] True where the key is at or before the query, fewer than `window` positions away.

    Without context parallelism every sequence has the same mask: S is 1 and the memory is one sequence's.
    """
    longest = max(lengths[s] for s in sequences)
    keys = torch.arange(longest)
    queries = keys[None]
    if cp_size > 1:
        # A query that only fills up a short sequence sees some key too: the softmax of none is 0 / 0.
        queries = torch.full((len(sequences), longest // cp_size), longest - 1)
        for row, sequence in zip(queries, sequences, strict=True):
            positions = zigzag_positions(lengths[sequence], cp_size, cp_rank)
            row[: positions.numel()] = positions
    queries = queries[:, None, :, None]
    mask = queries >= keys
    return mask if window is None else mask & (queries - window < keys)
