"""Keys and values of tokens that a model has already seen, so that the next token costs one token's work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

_GROWTH = 128
"""Tokens of memory that a layer takes at least beyond what it must hold."""
_SHORT = 128
"""Sequences up to this length are read together: another call of attention costs more than it saves."""


class KvCache:
    """One slot a sequence, in every layer of this rank's pipeline stage.

    Memory follows the longest sequence so far: most responses end long before max_length (prompt included).
    """

    def __init__(self, *, num_slots: int, max_length: int) -> None:
        self.max_length = max_length
        # Tokens that only fill a batch up are written to one slot more, which is never read.
        self.scratch_slot = num_slots
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._states: dict[tuple[int, str], Tensor] = {}

    def write(self, layer: int, at: CacheSlots, key: Tensor, value: Tensor) -> None:
        """Keep keys and values, [T, groups/tp, head_dim] each, of the tokens that `at` places."""
        if layer not in self._layers or self._layers[layer][0].shape[2] < at.longest:
            self._layers[layer] = (self._grown(layer, 0, at, key), self._grown(layer, 1, at, value))
        keys, values = self._layers[layer]
        keys[at.slots, :, at.positions] = key
        values[at.slots, :, at.positions] = value

    def read(self, layer: int, what: Reading) -> tuple[Tensor, Tensor]:
        """Keys and values, [S, groups/tp, L, head_dim] each, in place."""
        keys, values = self._layers[layer]
        return keys[what.slots, :, what.positions], values[what.slots, :, what.positions]

    def write_state(self, layer: int, name: str, slots: Tensor, values: Tensor) -> None:
        """Keep what a layer without keys and values has of whole sequences: [N, ...], one in each slot."""
        if (layer, name) not in self._states:
            self._states[layer, name] = values.new_zeros(self.scratch_slot + 1, *values.shape[1:])
        self._states[layer, name][slots] = values

    def state(self, layer: int, name: str, at: CacheSlots) -> Tensor:
        """The same, [S, ...] of the sequences in `at.span`, in place: a new token changes it."""
        assert at.span is not None
        return self._states[layer, name][slice(*at.span)]

    def copy(self, source: int, targets: Sequence[int], length: int) -> None:
        """Give the slots `targets` the first `length` tokens of the slot `source`, in every layer; states
        are those behind its last token.
        """
        for state in self._states.values():
            for target in targets:
                state[target] = state[source]
        for pair in self._layers.values():
            for kept in pair:
                for target in targets:
                    kept[target, :, :length] = kept[source, :, :length]

    def reorder(self, order: Sequence[int], length: int) -> None:
        """Give the slot i what the slot order[i] holds, the first `length` tokens, in every layer."""
        num = len(order)
        for state in self._states.values():
            state[:num] = state[list(order)]
        for pair in self._layers.values():
            for kept in pair:
                kept[:num, :, :length] = kept[list(order), :, :length]

    def _grown(self, layer: int, which: int, at: CacheSlots, like: Tensor) -> Tensor:
        before = self._layers[layer][which] if layer in self._layers else None
        held = 0 if before is None else before.shape[2]
        length = min(max(2 * held, at.longest + _GROWTH), max(self.max_length, at.longest))
        # Zeros: attention multiplies what stands behind a sequence by 0, and 0 times garbage may be NaN.
        grown = like.new_zeros(self.scratch_slot + 1, like.shape[1], length, like.shape[2])
        if before is not None:
            grown[:, :, :held] = before
        return grown


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSlots:
    """Where the tokens of one micro-batch stand in a cache.

    Args:
        slots, positions: [T] int64, each token's sequence and its place in it.
        longest: largest position + 1.
        span: None where the micro-batch holds whole sequences from position 0. Otherwise it holds one new
            token of each sequence, and attention is to the cache: the first tokens are of the slots first to
            last in order, and `span` is (first, last + 1); the others only fill the batch up.
        runs: what attention reads of the sequences of `span`, in their order.
    """

    cache: KvCache
    slots: Tensor
    positions: Tensor
    longest: int
    span: tuple[int, int] | None = None
    runs: tuple[Run, ...] = ()

    def map(self, function: Callable[[Tensor], Tensor]) -> CacheSlots:
        return replace(self, slots=function(self.slots), positions=function(self.positions))


@dataclass(frozen=True, slots=True)
class Run:
    """Sequences beside each other that attention reads to one length.

    Args:
        first, last: the first of them in a span, and the first behind them.
        shortest, longest: of them, in tokens.
    """

    first: int
    last: int
    shortest: int
    longest: int

    @property
    def num_read(self) -> int:
        """Tokens that attention reads without a window: all sequences to the longest."""
        return (self.last - self.first) * self.longest


def runs_of(lengths: Sequence[int]) -> tuple[Run, ...]:
    """Neighbours that attention reads together; the fewer tokens, the more the longest stand first.

    Behind longer ones alone, at most a third of a run's tokens (beyond _SHORT) belongs to no sequence.
    """
    # Of each sequence and those behind it: a shorter one before a longer one is read as long as that one.
    longest = list(accumulate(reversed(lengths), max))[::-1]
    runs, first = [], 0
    for _, group in groupby(longest, key=_size_class):
        last = first + len(list(group))
        runs.append(Run(first, last, min(lengths[first:last]), longest[first]))
        first = last
    return tuple(runs)


def _size_class(length: int) -> int:
    """The least of _SHORT times 1, 1.5, 2, 3, 4, 6, ... that `length` does not pass."""
    power = _SHORT
    while power < length:
        power *= 2
    return power * 3 // 4 if _SHORT < length <= power * 3 // 4 else power


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A run's part of the cache.

    Args:
        rows: of the run's queries in the micro-batch.
        positions: that any of them sees.
        mask: [S, 1, 1, L] True where a query sees a position; None where each sees all.
    """

    rows: slice
    slots: slice
    positions: slice
    mask: Tensor | None


def readings(at: CacheSlots, *, window: int | None) -> list[Reading]:
    """What attention reads for new tokens.

    Args:
        at: with a span.
        window: positions that a token sees, its own included; None for all.
    """
    assert at.span is not None
    found = []
    for run in at.runs:
        start = 0 if window is None else max(0, run.shortest - window)
        mask = None
        if run.shortest < run.longest:
            positions = at.positions[run.first : run.last, None]
            distance = positions - torch.arange(start, run.longest, device=positions.device)  # [S, L]
            is_seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
            mask = is_seen[:, None, None]
        found.append(
            Reading(
                rows=slice(run.first, run.last),
                slots=slice(at.span[0] + run.first, at.span[0] + run.last),
                positions=slice(start, run.longest),
                mask=mask,
            )
        )
    return found


def why_no_cache(config: TransformerConfig) -> str | None:
    """What keeps this model from running a new token alone; None where nothing does."""
    if config.context_parallel_size > 1:
        return f"parallel.cp is {config.context_parallel_size}"
    if config.fp8 or config.fp4:
        return "the layers compute in fp8 or fp4"
    return None
