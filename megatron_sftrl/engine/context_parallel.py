"""Splitting a packed micro-batch over the context-parallel axis, in Megatron's zig-zag order."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sftrl.engine.local_layers import zigzag_positions
from megatron_sftrl.engine.parallel import ParallelContext
from megatron_sftrl.types import TokenBatch


def shard_for_context_parallel(batch: TokenBatch, *, cp_rank: int, cp_size: int) -> TokenBatch:
    """This rank's chunks r and 2 cp - 1 - r of every sequence, whose length is a multiple of 2 cp.

    positions stay positions in the whole sequence; cu_seqlens become offsets of the local pieces.
    """
    if cp_size == 1:
        return batch
    rows = local_rows(batch.cu_seqlens, cp_rank=cp_rank, cp_size=cp_size)
    return batch.map(lambda value: value[rows], cu_seqlens=batch.cu_seqlens // cp_size)


def gather_whole(local: Tensor, cu_seqlens: Tensor, parallel: ParallelContext) -> Tensor:
    """[T] values in packed order from each rank's floating point [T/cp] with its cu_seqlens; no gradient."""
    if parallel.cp_size == 1:
        return local
    whole_offsets = cu_seqlens * parallel.cp_size
    rows = local_rows(whole_offsets, cp_rank=parallel.cp_rank, cp_size=parallel.cp_size)
    whole = local.new_zeros(local.numel() * parallel.cp_size)
    whole[rows] = local.detach()
    dist.all_reduce(whole, group=parallel.cp_group)
    return whole


def local_rows(cu_seqlens: Tensor, *, cp_rank: int, cp_size: int) -> Tensor:
    """[T/cp] int64: where this rank's tokens stand in the whole micro-batch, which has these cu_seqlens."""
    lengths, starts = cu_seqlens.diff().tolist(), cu_seqlens[:-1].tolist()
    assert all(length % (2 * cp_size) == 0 for length in lengths) or cp_size == 1, "pad to 2 * cp"
    pieces = [
        start + zigzag_positions(length, cp_size, cp_rank)
        for start, length in zip(starts, lengths, strict=True)
    ]
    return torch.cat(pieces).to(cu_seqlens.device)
