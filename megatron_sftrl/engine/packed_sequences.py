"""Where the tokens of a packed micro-batch stand, known on the host: no layer has to ask the device for it.

A question to the device (`.item()`, `.tolist()`, a boolean index) waits for everything queued there, and the
queue is empty when the answer comes. What depends on lengths is made here, once for all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_sftrl.engine.kv_cache import CacheSlots
from megatron_sftrl.engine.rotary import Turn
from megatron_sftrl.models.rope import Rope
from megatron_sftrl.types import Prefix


@dataclass
class PackedSequences(PackedSeqParams):
    """What Megatron hands to every attention layer of a micro-batch.

    Args:
        lengths: of the whole sequences, before context parallelism cuts them.
        places: of the tokens in a cache of keys and values; None in training.
        experts: as in TokenBatch, of this rank's share under context parallelism.
        prefixes: as in TokenBatch.
    """

    lengths: tuple[int, ...] = ()
    prefixes: tuple[Prefix | None, ...] = ()
    places: CacheSlots | None = None
    experts: Tensor | None = None
    _plans: dict[tuple[int | None, torch.dtype], AttentionPlan] = field(default_factory=dict, repr=False)
    _turns: dict[tuple[Rope, torch.dtype], Turn] = field(default_factory=dict, repr=False)
    _positions: dict[tuple[int, int], Tensor] = field(default_factory=dict, repr=False)
    _rows_with_gaps: Tensor | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        *,
        device: torch.device,
        places: CacheSlots | None = None,
        experts: Tensor | None = None,
        prefixes: tuple[Prefix | None, ...] = (),
    ) -> PackedSequences:
        """The sequences; `device` is where Transformer Engine's layers expect their boundaries."""
        offsets = torch.tensor([0, *lengths]).cumsum(0).int().to(device, non_blocking=True)
        longest = max(map(sum, zip(lengths, _starts(lengths, prefixes), strict=True)))
        return cls(
            qkv_format="thd",
            cu_seqlens_q=offsets,
            cu_seqlens_kv=offsets,
            cu_seqlens_q_padded=offsets,
            cu_seqlens_kv_padded=offsets,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            lengths=tuple(lengths),
            places=places,
            experts=experts,
            prefixes=prefixes,
        )

    def plan(self, *, cp_rank: int, cp_size: int, window: int | None, like: Tensor) -> AttentionPlan:
        """How this rank attends in a layer with that window; made for the first such layer.

        Args:
            like: of the device and dtype of its queries.
        """
        if window is not None and window >= self.max_seqlen_q and cp_size == 1:
            window = None
        key = (window, like.dtype)
        if key not in self._plans:
            self._plans[key] = attention_plan(
                self.lengths,
                prefixes=self.prefixes,
                cp_rank=cp_rank,
                cp_size=cp_size,
                window=window,
                like=like,
            )
        return self._plans[key]

    def positions_of(self, cp_group: dist.ProcessGroup, device: torch.device) -> Tensor:
        """[T/cp] int64 place of each of this rank's tokens in its sequence, prefix included; made once."""
        return self._positions_of((cp_group.size(), cp_group.rank()), device)

    def turn(self, rope: Rope, frequencies: Tensor, cp_group: dist.ProcessGroup, dtype: torch.dtype) -> Turn:
        """How this rank's queries and keys turn in layers of that rope; made for the first such layer."""
        if (rope, dtype) not in self._turns:
            positions = self.positions_of(cp_group, frequencies.device)
            self._turns[rope, dtype] = Turn.of(rope, frequencies, positions, dtype)
        return self._turns[rope, dtype]

    def _positions_of(self, cut: tuple[int, int], device: torch.device) -> Tensor:
        if cut not in self._positions:
            starts = _starts(self.lengths, self.prefixes)
            parts = [
                start + zigzag_positions(length, *cut)
                for start, length in zip(starts, self.lengths, strict=True)
            ]
            self._positions[cut] = torch.cat(parts).to(device, non_blocking=True)
        return self._positions[cut]

    def rows_with_gaps(self, gap: int, device: torch.device) -> Tensor:
        """[T] int64 row of each token where `gap` rows more stand before each sequence; made once."""
        if self._rows_with_gaps is None:
            lengths = torch.tensor(self.lengths)
            gaps = torch.repeat_interleave(torch.arange(1, len(lengths) + 1) * gap, lengths)
            self._rows_with_gaps = (torch.arange(len(gaps)) + gaps).to(device, non_blocking=True)
        return self._rows_with_gaps


def places_of(params: PackedSeqParams | None) -> CacheSlots | None:
    """The cache that a forward works with, None in training."""
    return params.places if isinstance(params, PackedSequences) else None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttentionCall:
    """S sequences of similar length, filled up to the longest; a short one repeats its last row.

    Args:
        queries: [S, q] rows of this rank's packed tokens.
        keys: [S, k] rows of the whole packed tokens.
        mask: [S or 1, 1, q, k] 0 where a query sees a key, else -inf; None where that is the causal mask. Of
            the queries' dtype: from True and False every layer would make and keep one of its own.
    """

    queries: Tensor
    keys: Tensor
    mask: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttentionPlan:
    """The calls of one attention layer over a micro-batch.

    Args:
        whole_order: [T] row, in the tensors of all context-parallel ranks one behind the other, of each token
            of the whole packed order; None where this rank has them all.
        back: [T/cp] row of each of this rank's tokens in what the calls return, one behind the other.
    """

    calls: tuple[AttentionCall, ...]
    whole_order: Tensor | None
    back: Tensor


def attention_plan(
    lengths: Sequence[int],
    *,
    prefixes: Sequence[Prefix | None] = (),
    cp_rank: int,
    cp_size: int,
    window: int | None,
    like: Tensor,
) -> AttentionPlan:
    """Which queries meet which keys, in as few calls as similar lengths allow; `lengths` are whole."""

    def there(made: Tensor) -> Tensor:
        return made.to(like.device, non_blocking=True)

    local = [length // cp_size for length in lengths]
    starts = [sum(local[:index]) for index in range(len(local))]
    inside = _starts(lengths, prefixes)
    calls, back, num_returned = [], torch.empty(sum(local), dtype=torch.int64), 0
    for sequences in _similar_lengths(lengths, inside):
        longest = max(lengths[index] for index in sequences)
        has_prefix = inside[sequences[0]] > 0
        mask = None
        if has_prefix or cp_size > 1 or (window is not None and longest > window):
            is_seen = there(_position_mask(sequences, lengths, inside, cp_size, cp_rank, window))
            mask = torch.zeros_like(is_seen, dtype=like.dtype).masked_fill_(~is_seen, -torch.inf)
        queries = there(_padded_index(sequences, lengths, cp_size))
        keys = queries if cp_size == 1 else there(_padded_index(sequences, lengths, 1))
        if has_prefix:
            keys = torch.cat([there(_prefix_index(sequences, lengths, prefixes)), keys], dim=1)
        calls.append(AttentionCall(queries=queries, keys=keys, mask=mask))
        for index in sequences:
            rows = num_returned + torch.arange(local[index])
            back[starts[index] : starts[index] + local[index]] = rows
            num_returned += longest // cp_size
    whole_order = there(_whole_sequence_order(lengths, cp_size)) if cp_size > 1 else None
    return AttentionPlan(calls=tuple(calls), whole_order=whole_order, back=there(back))


def _starts(lengths: Sequence[int], prefixes: Sequence[Prefix | None]) -> list[int]:
    """[S] position of each sequence's first token: how long its prefix is."""
    return [0 if prefix is None else prefix.length for prefix in prefixes] or [0] * len(lengths)


def _similar_lengths(lengths: Sequence[int], starts: Sequence[int]) -> list[list[int]]:
    """Sequence indices grouped so that padding inside a group less than doubles the work per axis."""
    groups: dict[tuple[int, int], list[int]] = {}
    for sequence, (length, start) in enumerate(zip(lengths, starts, strict=True)):
        if length > 0:
            groups.setdefault((length.bit_length(), start.bit_length()), []).append(sequence)
    return list(groups.values())


def _padded_index(sequences: Sequence[int], lengths: Sequence[int], split: int) -> Tensor:
    """[S, longest / split] row of each token in the packed tensor; short sequences repeat their last row."""
    local = torch.tensor(lengths) // split
    ends, chosen = local.cumsum(0), torch.tensor(sequences)
    steps = torch.arange(max(lengths[index] for index in sequences) // split)
    return (ends - local)[chosen, None] + torch.minimum(steps[None], local[chosen, None] - 1)


def _prefix_index(
    sequences: Sequence[int], lengths: Sequence[int], prefixes: Sequence[Prefix | None]
) -> Tensor:
    """[S, longest prefix] row of each token of a sequence's prefix; a short one repeats its last row."""
    starts = [0, *accumulate(lengths)]
    found = [prefix for index in sequences if (prefix := prefixes[index]) is not None]
    steps = torch.arange(max(prefix.length for prefix in found))
    return torch.stack([starts[prefix.of] + steps.clamp(max=prefix.length - 1) for prefix in found])


def zigzag_positions(length: int, cp_size: int, cp_rank: int) -> Tensor:
    """[length / cp] positions that `cp_rank` holds of a sequence: chunks r and 2 cp - 1 - r of 2 cp."""
    if cp_size == 1:
        return torch.arange(length)
    chunks = torch.arange(length).chunk(2 * cp_size) if length else (torch.arange(0),) * (2 * cp_size)
    return torch.cat([chunks[cp_rank], chunks[2 * cp_size - 1 - cp_rank]])


def _whole_sequence_order(lengths: Sequence[int], cp_size: int) -> Tensor:
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
    sequences: Sequence[int],
    lengths: Sequence[int],
    starts: Sequence[int],
    cp_size: int,
    cp_rank: int,
    window: int | None,
) -> Tensor:
    """[S or 1, 1, q, k] True where the key is at or before the query, fewer than `window` positions away.

    Without context parallelism and prefixes every sequence has the same mask: S is 1 and the memory is one
    sequence's. Keys of prefixes, the longest of the call, stand in front of the sequences' own.
    """
    longest = max(lengths[s] for s in sequences)
    inside = [starts[s] for s in sequences]
    begin = torch.tensor(inside if any(inside) else [0])[:, None]  # [S or 1, 1]
    steps = torch.arange(max(inside))[None]
    # What only fills a shorter prefix up stands behind every query.
    before = torch.where(steps < begin, steps, torch.iinfo(torch.int64).max)
    keys = torch.cat([before, begin + torch.arange(longest)], dim=1)  # [S or 1, k]
    queries = torch.arange(longest)[None]
    if cp_size > 1:
        # A query that only fills up a short sequence sees some key too: the softmax of none is 0 / 0.
        queries = torch.full((len(sequences), longest // cp_size), longest - 1)
        for row, sequence in zip(queries, sequences, strict=True):
            positions = zigzag_positions(lengths[sequence], cp_size, cp_rank)
            row[: positions.numel()] = positions
    queries = (queries + begin)[:, None, :, None]
    keys = keys[:, None, None]
    mask = queries >= keys
    return mask if window is None else mask & (queries - window < keys)
