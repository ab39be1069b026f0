"""Splitting a packed micro-batch over the context-parallel axis, in Megatron's zig-zag order."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sftrl.engine.packed_sequences import zigzag_positions
from megatron_sftrl.engine.parallel import ParallelContext
from megatron_sftrl.types import TokenBatch


def shard_for_context_parallel(batch: TokenBatch, *, cp_rank: int, cp_size: int) -> TokenBatch:
    """This rank's chunks r and 2 cp - 1 - r of every sequence, whose length is a multiple of 2 cp.

    positions stay positions in the whole sequence; cu_seqlens become offsets of the local pieces.
    """
    if cp_size == 1:
        return batch
    rows = local_rows(batch.lengths(), cp_rank=cp_rank, cp_size=cp_size).to(batch.tokens.device)
    return batch.map(lambda value: value[rows], cu_seqlens=batch.cu_seqlens // cp_size)


def gather_whole(local: Tensor, lengths: Sequence[int], parallel: ParallelContext) -> Tensor:
    """[T] values in packed order from each rank's floating point [T/cp]; no gradient.

    Args:
        lengths: of the whole sequences.
    """
    if parallel.cp_size == 1:
        return local
    rows = local_rows(lengths, cp_rank=parallel.cp_rank, cp_size=parallel.cp_size)
    whole = local.new_zeros(local.numel() * parallel.cp_size)
    whole[rows.to(local.device, non_blocking=True)] = local.detach()
    dist.all_reduce(whole, group=parallel.cp_group)
    return whole


def local_rows(lengths: Sequence[int], *, cp_rank: int, cp_size: int) -> Tensor:
    """[T/cp] int64, CPU: where this rank's tokens stand in the whole micro-batch of such sequences."""
    assert all(length % (2 * cp_size) == 0 for length in lengths) or cp_size == 1, "pad to 2 * cp"
    starts = accumulate(lengths, initial=0)
    return torch.cat(
        [
            start + zigzag_positions(length, cp_size, cp_rank)
            for start, length in zip(starts, lengths, strict=False)
        ]
    )
