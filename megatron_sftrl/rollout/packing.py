"""Prefixes and new tokens of many responses, as the micro-batches that the training schedule asks for.

The responses are spread over pp micro-batches of one length, which fills the pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_sftrl.engine.kv_cache import CacheSlots, KvCache
from megatron_sftrl.engine.parallel import ParallelContext
from megatron_sftrl.types import TokenBatch

Packed = tuple[list[TokenBatch], list[Tensor], list[CacheSlots]]
"""Of each micro-batch: its tokens, the row of each response's last token, the places in the cache."""


def pack_prefixes(
    prefixes: Mapping[int, tuple[int, ...]], parallel: ParallelContext, cache: KvCache | None
) -> Packed:
    """Whole prefixes, from their first token on.

    Args:
        prefixes: tokens so far, by number of the response.
        parallel: decides on micro-batches and padding.
        cache: remembers the prefixes where one is given, in the slot of the response's number.
    """
    multiple = 2 * parallel.cp_size if parallel.cp_size > 1 else 1
    shares = _shares(list(prefixes), parallel.pp_size)
    used = [sum(_round_up(len(prefixes[i]), multiple) for i in share) for share in shares]
    # Sequence parallelism splits T over tp; a replica without responses still takes part with padding.
    length = max(_round_up(max(used), multiple * parallel.tp_size), multiple * parallel.tp_size)
    batches, rows, places = [], [], []
    for share in shares:
        batch, last_rows = _prefix_batch([prefixes[i] for i in share], length, multiple)
        batches.append(batch)
        rows.append(last_rows)
        if cache is not None:
            sizes = batch.cu_seqlens.diff().tolist()
            slots = [*share, *[cache.scratch_slot] * (len(sizes) - len(share))]
            places.append(
                CacheSlots(
                    cache=cache,
                    slots=torch.repeat_interleave(torch.tensor(slots), torch.tensor(sizes)),
                    # Padding may be longer than any response; where it is written does not matter.
                    positions=batch.positions.clamp(max=cache.max_length - 1),
                    longest=max(sizes),
                    is_first=True,
                )
            )
    return batches, rows, places


def pack_new_tokens(
    prefixes: Mapping[int, tuple[int, ...]], parallel: ParallelContext, cache: KvCache
) -> Packed:
    """The last token of each prefix; the cache holds what stands before it.

    Args:
        prefixes: as in pack_prefixes().
        parallel: decides on micro-batches and padding.
        cache: with every earlier token of every prefix.
    """
    shares = _shares(list(prefixes), parallel.pp_size)
    length = max(_round_up(max(map(len, shares)), parallel.tp_size), parallel.tp_size)
    batches, rows, places = [], [], []
    for share in shares:
        padding = length - len(share)
        slots = [*share, *[cache.scratch_slot] * padding]
        tokens = torch.tensor([*(prefixes[i][-1] for i in share), *[0] * padding])
        positions = torch.tensor([*(len(prefixes[i]) - 1 for i in share), *[0] * padding])
        batches.append(_batch(tokens, positions, [0, length]))
        rows.append(torch.arange(len(share)))
        places.append(
            CacheSlots(
                cache=cache,
                slots=torch.tensor(slots),
                positions=positions,
                longest=int(positions.max()) + 1,
                is_first=False,
                span=_span(slots),
            )
        )
    return batches, rows, places


def _span(slots: Sequence[int]) -> tuple[int, int] | None:
    first, end = (slots[0], slots[0] + len(slots)) if slots else (0, 0)
    return (first, end) if list(slots) == list(range(first, end)) else None


def _shares(numbers: Sequence[int], num_batches: int) -> list[list[int]]:
    size = -(-len(numbers) // num_batches)
    return [list(numbers[i * size : (i + 1) * size]) for i in range(num_batches)]


def _prefix_batch(
    prefixes: Sequence[tuple[int, ...]], length: int, multiple: int
) -> tuple[TokenBatch, Tensor]:
    """One micro-batch of `length` tokens, and the row of each prefix's last token."""
    tokens = torch.zeros(length, dtype=torch.int64)
    positions = torch.zeros(length, dtype=torch.int64)
    offsets, last_rows = [0], []
    for prefix in prefixes:
        start, size = offsets[-1], _round_up(len(prefix), multiple)
        tokens[start : start + len(prefix)] = torch.tensor(prefix)
        positions[start : start + size] = torch.arange(size)
        offsets.append(start + size)
        last_rows.append(start + len(prefix) - 1)
    if offsets[-1] < length:
        positions[offsets[-1] :] = torch.arange(length - offsets[-1])
        offsets.append(length)
    return _batch(tokens, positions, offsets), torch.tensor(last_rows, dtype=torch.int64)


def _batch(tokens: Tensor, positions: Tensor, offsets: list[int]) -> TokenBatch:
    return TokenBatch(
        tokens=tokens,
        labels=torch.zeros_like(tokens),
        positions=positions,
        loss_mask=torch.zeros_like(tokens, dtype=torch.bool),
        cu_seqlens=torch.tensor(offsets, dtype=torch.int32),
        token_weight=torch.zeros(tokens.numel()),
    )


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
