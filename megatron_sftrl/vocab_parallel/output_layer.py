"""Logits that exist for a few tokens at a time: hidden states and the output weight in their place.

A vocabulary of 152k at 8k tokens is 5 GB of fp32 a copy, and a loss with a reference makes several. Hidden
states [T, H] are a hundredth of that; a chunk's logits are made of them again wherever they are needed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# The matrix products of an output layer:
#
#     logits              hidden @ weight.T                   [T, H] x [H, V]
#     hidden's gradient   gradient @ weight                   [T, V] x [V, H]
#     weight's gradient   total += gradient.T @ hidden        [V, T] x [T, H]

# Columns of the weight's gradient that are made at a time where it has another dtype than its factors.
_MIXED_COLUMNS = 16_384


def write_logits(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = hidden @ weight.T; hidden [T, H], weight [V_local, H], out [T, V_local], all of one dtype."""
    torch.mm(hidden, weight.t(), out=out)


def add_weight_gradient(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """total += gradient.T @ hidden, summed in the dtype of `total` (fp32 where Megatron keeps gradients).

    total [V_local, H], gradient [T, V_local] of the logits, hidden [T, H] in the gradient's dtype.
    """
    if total.dtype == gradient.dtype:
        total.addmm_(gradient.t(), hidden)
        return
    if _adds_mixed_products(total.dtype, gradient.dtype, gradient.device):
        torch.addmm(total, gradient.t(), hidden, total.dtype, out=total)
        return
    for some, part in zip(gradient.split(_MIXED_COLUMNS, dim=1), total.split(_MIXED_COLUMNS), strict=True):
        if gradient.is_cuda:
            part.add_(torch.mm(some.t(), hidden, out_dtype=total.dtype))
        else:
            part.add_(some.t().to(total.dtype) @ hidden.to(total.dtype))


@functools.cache
def _adds_mixed_products(total: torch.dtype, factors: torch.dtype, device: torch.device) -> bool:
    """Whether torch adds a product to a sum of another dtype in one operation, tried once.

    On CUDA in newer versions: 2.8 wants the sum in the factors' dtype. In two operations a temporary as large
    as the sum is written and read as well, in every chunk.
    """
    some = torch.zeros(16, 16, dtype=factors, device=device)
    sums = torch.zeros(16, 16, dtype=total, device=device)
    try:
        torch.addmm(sums, some, some, total, out=sums)
    except RuntimeError:
        return False
    return True


# One chunk's logits. Each chunk reads the weights and reads and writes their whole gradient once, so it must
# hold many tokens. Its size depends on nothing that changes from run to run, such as free memory: ranks that
# share a vocabulary must cut alike, and a run that resumes has to round as it would have.
CPU_LOGITS_BYTES = 112 * 1024**2
CUDA_LOGITS_BYTES = 512 * 1024**2
CUDA_TOKENS = 4096
"""Below this many a GPU adds up weight gradients for a time that shows beside the products."""


def logits_bytes(row_bytes: int, device_type: str) -> int:
    """How many bytes of logits exist at a time where a layer does not say; row_bytes: of one token's."""
    if device_type == "cuda":
        return max(CUDA_LOGITS_BYTES, CUDA_TOKENS * row_bytes)
    return CPU_LOGITS_BYTES


# Products over tokens are up to a fifth slower where their number is no multiple of what a register holds.
_EVEN_TOKENS = 8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OutputLayer:
    """logits = hidden @ weight.T, made where they are used.

    Args:
        hidden: [T, H], the same on all tensor-parallel ranks. Its gradient is this rank's part of a sum over
            them, which the maker of `hidden` has to take.
        weight: [V_local, H], this rank's rows of the output layer (or of the tied embedding).
        main_grad: [V_local, H] buffer that the weight's gradient is added to, Megatron's convention for its
            parameters; None returns the gradient to autograd.
        is_shared: the weight is also used elsewhere on this rank (the tied embedding), where autograd will
            bring it a gradient.
        chunk_bytes: of the logits that exist at a time; None is a good size for the device.
    """

    hidden: Tensor
    weight: Tensor
    main_grad: Tensor | None = None
    is_shared: bool = False
    chunk_bytes: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(T, V_local), of the logits."""
        return self.hidden.shape[0], self.weight.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits."""
        return self.hidden.dtype

    @property
    def device(self) -> torch.device:
        """Of the logits."""
        return self.hidden.device

    @property
    def requires_grad(self) -> bool:
        """A gradient reaches the hidden states or the weight."""
        return self.hidden.requires_grad or self.weight.requires_grad

    @property
    def key(self) -> tuple[int, ...]:
        """Alike for layers that make the same logits."""
        return self.hidden.data_ptr(), self.weight.data_ptr()

    def detach(self) -> OutputLayer:
        """The same logits without gradient."""
        return OutputLayer(
            hidden=self.hidden.detach(), weight=self.weight.detach(), chunk_bytes=self.chunk_bytes
        )

    def logits(self, rows: slice | Tensor, buffer: Tensor) -> Tensor:
        """[rows, V_local], without gradient, in the first rows of `buffer`."""
        hidden = self.hidden.detach()[rows]
        logits = buffer[: hidden.shape[0]]
        write_logits(hidden, self.weight.detach(), logits)
        return logits

    def logits_by_parts(self, rows: slice | Tensor, buffer: Tensor, num_parts: int) -> Iterator[None]:
        """The same into `buffer`; the columns of one part are made with each step of the iterator."""
        hidden = self.hidden.detach()[rows]
        weights = self.weight.detach().chunk(num_parts)
        columns = buffer[: hidden.shape[0]].split(weights[0].shape[0], dim=1)
        for weight, part in zip(weights, columns, strict=True):
            write_logits(hidden, weight, part)
            yield

    def buffer(self, num_tokens: int) -> Tensor:
        """[num_tokens, V_local] memory for all chunks: fresh pages would cost as much as some arithmetic."""
        return torch.empty(num_tokens, self.shape[1], dtype=self.dtype, device=self.device)

    def chunks(self, num_tokens: int) -> list[slice]:
        """Slices of about equal size over `num_tokens` tokens, whose logits fit the chunk bytes."""
        most = tokens_per_chunk(self.shape[1], self.dtype, self.device, chunk_bytes=self.chunk_bytes)
        if most > _EVEN_TOKENS:
            most -= most % _EVEN_TOKENS
        num_chunks = max(1, -(-num_tokens // most))
        even = -(-num_tokens // (num_chunks * _EVEN_TOKENS)) * _EVEN_TOKENS
        size = max(1, min(most, even))
        return [slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]

    def add_gradients(self, rows: slice | Tensor, gradient: Tensor, sums: GradientSums) -> None:
        """Add a chunk's gradients to `sums`, from [rows, V_local] d loss / d logits in their dtype."""
        if sums.hidden is not None:
            sums.hidden[rows] = gradient @ self.weight.detach()
        if sums.weight is not None:
            add_weight_gradient(sums.weight, gradient, self.hidden.detach()[rows])

    def tell_autograd(self, sums: GradientSums) -> Tensor | None:
        """What a backward returns for the weight: nothing when the gradient is in main_grad already.

        Megatron's DDP then wants to see some param.grad, which it ignores, as after its own fused weight
        gradients; this one occupies no memory.
        """
        if self.main_grad is None:
            return sums.weight
        if not self.is_shared:
            self.weight.grad = self.weight.new_zeros(()).expand_as(self.weight)
            self.weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        return None


@dataclass(slots=True, kw_only=True, eq=False)
class GradientSums:
    """Gradients under construction: [T, H] of the hidden states, [V_local, H] of the weight, where wanted."""

    hidden: Tensor | None
    weight: Tensor | None

    @staticmethod
    def of(layer: OutputLayer) -> GradientSums:
        """Zeros, or the buffer that is there."""
        wanted = layer.weight.requires_grad
        own = torch.zeros_like(layer.weight) if wanted and layer.main_grad is None else layer.main_grad
        return GradientSums(
            hidden=torch.zeros_like(layer.hidden) if layer.hidden.requires_grad else None,
            weight=own if wanted else None,
        )


def tokens_per_chunk(
    num_columns: int, dtype: torch.dtype, device: torch.device, *, chunk_bytes: int | None = None
) -> int:
    """How many tokens' logits exist at a time; micro-batches of no more need no fusion."""
    row_bytes = max(1, num_columns * dtype.itemsize)
    budget = logits_bytes(row_bytes, device.type) if chunk_bytes is None else chunk_bytes
    return max(1, budget // row_bytes)


# The logits of chunk after chunk, the next chunk's made while reductions over this one are under way. A
# chunk's two all-reduces are a few numbers per token: all latency, during which a device would do nothing.
# The next chunk's product needs none of their results and fills the gap, queued behind the start of a
# reduction and ahead of the wait for it. On one stream: this does not depend on how many queues a device has
# (CUDA_DEVICE_MAX_CONNECTIONS is 1 where Megatron overlaps its own communication).

# A chunk has two reductions; each gets one part of the next chunk's columns to hide behind.
_PARTS = 2


class NextLogits:
    """Gives out the logits of each chunk ([n] int64 tokens; at least one chunk) once, in order."""

    def __init__(self, layer: OutputLayer, chunks: Sequence[Tensor]) -> None:
        self._layer = layer
        self._chunks = chunks
        self._longest = max(len(tokens) for tokens in chunks)
        self._buffers = [layer.buffer(self._longest)]
        self._num_taken = 0
        self._begun: Iterator[None] | None = None  # parts of the chunk after those taken

    def take(self) -> Tensor:
        """[n, V_local] of the next chunk, finished now if no reduction had time for it.

        The chunk taken before must have been used up: its memory may serve the one after this.
        """
        tokens = self._chunks[self._num_taken]
        self._num_taken += 1
        if self._begun is None:
            return self._layer.logits(tokens, self._buffers[0])
        for _ in self._begun:
            pass
        self._begun = None
        return self._buffers[0][: len(tokens)]

    def advance(self) -> None:
        """Make a part of the next chunk's; the memory of the chunk taken last stays as it is."""
        if self._num_taken == len(self._chunks):
            return
        if self._begun is None:
            if len(self._buffers) == 1:
                self._buffers.append(self._layer.buffer(self._longest))
            self._buffers.reverse()
            tokens = self._chunks[self._num_taken]
            self._begun = self._layer.logits_by_parts(tokens, self._buffers[0], _PARTS)
        next(self._begun, None)
