"""The arithmetic on one rank's columns: a few token rows at a time, so that they stay in cache.

Nothing here knows of other ranks, and nothing writes into the logits. `shift` is always z - maximum, so that
no sum is taken over large numbers; the maximum is this rank's own in the forward and the global one in the
backward. A logit of -inf in a real column is a probability of exactly zero: 0 * -inf counts as 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sftrl.vocab_parallel.shard import VocabShard

# Bytes of one chunk's buffers: half of a CPU core's share of cache, and enough to fill a GPU.
CPU_CHUNK_BYTES = 2 * 1024**2
CUDA_CHUNK_BYTES = 256 * 1024**2


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Source:
    """Sharded logits as the arithmetic needs them: z = logits[:, :num_columns] * inverse_tau.

    Args:
        logits: [T, V_local] any floating dtype.
        shard: which columns these are.
        inverse_tau: [T] one over the temperature, in the working dtype, or None for temperature 1.
    """

    logits: Tensor
    shard: VocabShard
    inverse_tau: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of every reduction: float64 for float64 logits, float32 for all others."""
        return torch.float64 if self.logits.dtype == torch.float64 else torch.float32

    @property
    def real_logits(self) -> Tensor:
        """[T, num_columns] the logits without padding; a view."""
        return self.logits[:, : self.shard.num_columns]

    def scaled(self, differences: Tensor) -> Tensor:
        """[T] differences of raw logits, divided by the temperature."""
        return differences if self.inverse_tau is None else differences * self.inverse_tau


def row_chunks(source: Source, num_buffers: int, dtype: torch.dtype) -> Iterator[slice]:
    """Slices over the tokens, so small that `num_buffers` buffers of the columns fit the chunk bytes."""
    num_tokens = source.logits.shape[0]
    budget = CUDA_CHUNK_BYTES if source.logits.is_cuda else CPU_CHUNK_BYTES
    row_bytes = max(1, source.shard.num_columns) * dtype.itemsize * num_buffers
    step = max(1, budget // row_bytes)
    for start in range(0, num_tokens, step):
        yield slice(start, min(start + step, num_tokens))


def local_maximum(source: Source, rows: slice, dtype: torch.dtype) -> Tensor:
    """[rows] largest raw logit of this rank; -inf when it holds no real column."""
    real = source.real_logits[rows]
    if real.shape[1] == 0:
        return torch.full((real.shape[0],), -torch.inf, dtype=dtype, device=real.device)
    return real.amax(dim=1).to(dtype)


def shifted(source: Source, rows: slice, maximum: Tensor) -> Tensor:
    """[rows, num_columns] z - maximum in the maximum's dtype, a new buffer.

    A maximum of -inf (no column has any probability) is taken as 0, since -inf - -inf has no value.
    """
    shift = source.real_logits[rows] - finite_maximum(maximum)[rows, None]
    return shift if source.inverse_tau is None else shift.mul_(source.inverse_tau[rows, None])


def finite_maximum(maximum: Tensor) -> Tensor:
    """The maximum, 0 where it is -inf."""
    return maximum.masked_fill(maximum == -torch.inf, 0.0)


def weighted_sum_of(weights: Tensor, values: Tensor, buffer: Tensor) -> Tensor:
    """[rows] sum over the columns of weights * values, where 0 * -inf is 0; `buffer` is overwritten.

    A NaN that is not 0 * -inf needs no care here: it has made the sum of the weights, or the partition
    function of the values, NaN as well.
    """
    return torch.mul(weights, values, out=buffer).nansum(dim=1)


def finite_shift_(shift: Tensor) -> Tensor:
    """Replace -inf by a huge finite number, in place on a buffer of ours, so that 0 * shift is 0."""
    return shift.clamp_(min=-(torch.finfo(shift.dtype).max ** 0.75))
