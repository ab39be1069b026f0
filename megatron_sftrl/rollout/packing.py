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
                    longest=min(max(sizes), cache.max_length),
                )
            )
    return batches, rows, places


def pack_new_tokens(
    tokens: Sequence[int], positions: Sequence[int], parallel: ParallelContext, cache: KvCache
) -> Packed:
    """The last token of each response; the cache holds what stands before it.

    Args:
        tokens: of the responses in the slots 0, 1, 2, ...
        positions: of the tokens in their sequences.
        parallel: decides on micro-batches and padding.
        cache: with every earlier token.
    """
    shares = _shares(range(len(tokens)), parallel.pp_size)
    length = max(_round_up(max(map(len, shares)), parallel.tp_size), parallel.tp_size)
    batches, rows, places = [], [], []
    for share in shares:
        first, last = (share[0], share[-1] + 1) if share else (0, 0)
        padding = [0] * (length - len(share))
        batch_positions = torch.tensor([*positions[first:last], *padding])
        batches.append(_batch(torch.tensor([*tokens[first:last], *padding]), batch_positions, [0, length]))
        rows.append(torch.arange(len(share)))
        longest = max(positions[first:last], default=0) + 1
        places.append(
            CacheSlots(
                cache=cache,
                slots=torch.tensor([*share, *[cache.scratch_slot] * len(padding)]),
                positions=batch_positions,
                longest=longest,
                span=(first, last),
                is_even=min(positions[first:last], default=0) + 1 == longest,
            )
        )
    return batches, rows, places


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
