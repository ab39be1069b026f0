"""The logits of chunk after chunk, the next chunk's made while reductions over this one are under way.

A chunk's two all-reduces are a few numbers per token: all latency, during which a device would do nothing.
The next chunk's product needs none of their results and fills the gap, queued behind the start of a
reduction and ahead of the wait for it. On one stream: this does not depend on how many queues a device has
(CUDA_DEVICE_MAX_CONNECTIONS is 1 where Megatron overlaps its own communication).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from megatron_sftrl.vocab_parallel.output_layer import OutputLayer

# A chunk has two reductions; each gets one part of the next chunk's columns to hide behind.
_PARTS = 2


class NextLogits:
    """Gives out the logits of each chunk once, in order.

    Args:
        layer: makes them.
        chunks: [n] int64 tokens of each chunk; at least one chunk.
    """

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
