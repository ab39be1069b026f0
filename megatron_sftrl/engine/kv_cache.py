"""Keys and values of tokens that a model has already seen, so that the next token costs one token's work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


class KvCache:
    """One slot a sequence, in every layer of this rank's pipeline stage; memory is taken layer by layer.

    Args:
        num_slots: sequences.
        max_length: tokens of the longest, prompt and response together.
    """

    def __init__(self, *, num_slots: int, max_length: int) -> None:
        self.max_length = max_length
        # Tokens that only fill a batch up are written to one slot more, which nobody reads.
        self.scratch_slot = num_slots
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def write(self, layer: int, at: CacheSlots, key: Tensor, value: Tensor) -> None:
        """Keep keys and values, [T, groups/tp, head_dim] each, of the tokens that `at` places."""
        if layer not in self._layers:
            shape = (self.scratch_slot + 1, key.shape[1], self.max_length, key.shape[2])
            self._layers[layer] = (key.new_zeros(shape), value.new_zeros(shape))
        keys, values = self._layers[layer]
        keys[at.slots, :, at.positions] = key
        values[at.slots, :, at.positions] = value

    def read(self, layer: int, at: CacheSlots) -> tuple[Tensor, Tensor]:
        """Keys and values, [S, groups/tp, L, head_dim] each, of the sequences of `at`; L is the longest."""
        keys, values = self._layers[layer]
        where = at.slots if at.span is None else slice(*at.span)
        return keys[where, :, : at.longest], values[where, :, : at.longest]


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSlots:
    """Where the tokens of one micro-batch stand in a cache.

    Args:
        cache: of this generation.
        slots: [T] int64, of each token's sequence.
        positions: [T] int64, in it.
        longest: largest position + 1.
        is_first: the micro-batch holds whole sequences from position 0; otherwise it holds one new token of
            each sequence, and attention is to the cache.
        span: (first, last + 1) where the slots are neighbours in order: they are then read in place. None
            where they are not: reading copies.
    """

    cache: KvCache
    slots: Tensor
    positions: Tensor
    longest: int
    is_first: bool
    span: tuple[int, int] | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> CacheSlots:
        """The same places with `function` applied to both tensors."""
        return CacheSlots(
            cache=self.cache,
            slots=function(self.slots),
            positions=function(self.positions),
            longest=self.longest,
            is_first=self.is_first,
            span=self.span,
        )


@dataclass
class CachedSequences(PackedSeqParams):
    """What Megatron hands to every attention layer, and the cache with it."""

    places: CacheSlots | None = None

    @classmethod
    def of(cls, params: PackedSeqParams, places: CacheSlots) -> CachedSequences:
        """The same sequences, with their places in a cache."""
        return cls(**{each.name: getattr(params, each.name) for each in fields(params)}, places=places)


def places_of(params: PackedSeqParams | None) -> CacheSlots | None:
    """The cache that a forward works with, None in training."""
    return params.places if isinstance(params, CachedSequences) else None


def attend_to_cache(
    query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, *, scale: float, window: int | None
) -> Tensor:
    """One new token of each sequence looks at everything up to itself.

    Args:
        query: [S, heads/tp, head_dim].
        keys, values: [S, groups/tp, L, head_dim], the new token's included.
        positions: [S] of the new tokens.
        scale: multiplies the scores.
        window: positions that a token sees, its own included; None for all.
    Returns:
        [S, heads/tp * head_dim].
    """
    distance = positions[:, None] - torch.arange(keys.shape[2], device=query.device)  # [S, L]
    is_seen = distance >= 0
    if window is not None:
        is_seen &= distance < window
    # The query heads of a group stand where other tokens would: the group's keys are read once for all.
    grouped = query.unflatten(1, (keys.shape[1], -1))  # [S, groups/tp, heads per group, head_dim]
    attended = torch.nn.functional.scaled_dot_product_attention(
        grouped, keys, values, attn_mask=is_seen[:, None, None], scale=scale
    )
    return attended.flatten(1)
