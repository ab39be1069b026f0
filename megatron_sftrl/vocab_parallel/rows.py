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

from megatron_sftrl.vocab_parallel.output_layer import OutputLayer
from megatron_sftrl.vocab_parallel.shard import VocabShard

# Bytes of one chunk's buffers: half of a CPU core's share of cache, and enough to fill a GPU.
CPU_CHUNK_BYTES = 2 * 1024**2
CUDA_CHUNK_BYTES = 256 * 1024**2


@dataclass(slots=True, kw_only=True, eq=False)
class Scratch:
    """Logits that nobody needs after the loss: their gradient takes their place.

    Args:
        num_readers: evaluations that will read the logits again in their backward; with more than one, the
            first may not overwrite them.
    """

    num_readers: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Source:
    """Sharded logits as the arithmetic needs them: z = logits[:, :num_columns] * inverse_tau.

    Args:
        origin: [T, V_local] logits of any floating dtype, or the output layer that makes them.
        shard: which columns these are.
        inverse_tau: [T] one over the temperature, in the working dtype, or None for temperature 1.
        scratch: of logits that may be overwritten; None for those that must stay.
    """

    origin: Tensor | OutputLayer
    shard: VocabShard
    inverse_tau: Tensor | None = None
    scratch: Scratch | None = None

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.origin.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the logits are or will be."""
        return self.origin.device

    @property
    def requires_grad(self) -> bool:
        """Somebody wants d / d logits."""
        return self.origin.requires_grad

    @property
    def key(self) -> tuple[int, ...]:
        """Alike for sources over the same logits, whatever their temperatures, with gradient or without."""
        return self.origin.key if isinstance(self.origin, OutputLayer) else (self.origin.data_ptr(),)

    @property
    def logits(self) -> Tensor:
        """[T, V_local]; only where they exist."""
        assert isinstance(self.origin, Tensor), "logits of an output layer exist for a chunk of rows: at()"
        return self.origin

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of every reduction: float64 for float64 logits, float32 for all others."""
        return torch.float64 if self.origin.dtype == torch.float64 else torch.float32

    @property
    def real_logits(self) -> Tensor:
        """[T, num_columns] the logits without padding; a view."""
        return self.logits[:, : self.shard.num_columns]

    def scaled(self, differences: Tensor) -> Tensor:
        """[T] differences of raw logits, divided by the temperature."""
        return differences if self.inverse_tau is None else differences * self.inverse_tau

    def at(self, rows: slice, logits: Tensor) -> Source:
        """Some of the tokens, whose [rows, V_local] logits were made for them."""
        inverse = None if self.inverse_tau is None else self.inverse_tau[rows]
        return Source(origin=logits, shard=self.shard, inverse_tau=inverse, scratch=Scratch(num_readers=1))


def row_chunks(source: Source, num_buffers: int, dtype: torch.dtype) -> Iterator[slice]:
    """Slices over the tokens, so small that `num_buffers` buffers of the columns fit the chunk bytes."""
    budget = CUDA_CHUNK_BYTES if source.device.type == "cuda" else CPU_CHUNK_BYTES
    row_bytes = max(1, source.shard.num_columns) * dtype.itemsize * num_buffers
    step = max(1, budget // row_bytes)
    for start in range(0, source.num_tokens, step):
        yield slice(start, min(start + step, source.num_tokens))


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
