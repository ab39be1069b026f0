"""Prefixes and new tokens as micro-batches: every token in its place, padding out of everybody's way."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from megatron_sftrl.engine.kv_cache import KvCache
from megatron_sftrl.engine.parallel import ParallelContext
from megatron_sftrl.rollout.packing import pack_new_tokens, pack_prefixes

PREFIXES = {3: (31, 32, 33), 0: (1,), 5: (51, 52, 53, 54, 55), 1: (11, 12)}


def layout(*, tp: int = 1, pp: int = 1, cp: int = 1) -> ParallelContext:
    return cast(ParallelContext, SimpleNamespace(tp_size=tp, pp_size=pp, cp_size=cp))


LAYOUTS = [{}, {"pp": 2}, {"pp": 3}, {"tp": 4}, {"cp": 2}, {"tp": 2, "pp": 2, "cp": 3}]


@pytest.mark.parametrize("sizes", LAYOUTS)
def test_each_prefix_stands_whole_in_a_sequence_of_its_own(sizes: dict[str, int]) -> None:
    batches, last_rows, places = pack_prefixes(PREFIXES, layout(**sizes), None)
    assert places == []
    assert len(batches) == len(last_rows) == sizes.get("pp", 1)
    assert len({batch.num_tokens for batch in batches}) == 1, "pipeline stages exchange tensors of one size"
    found = []
    for batch, rows in zip(batches, last_rows, strict=True):
        offsets = batch.cu_seqlens.tolist()
        assert batch.num_tokens % sizes.get("tp", 1) == 0
        for start, stop in itertools.pairwise(offsets):
            assert batch.positions[start:stop].tolist() == list(range(stop - start))
            assert (stop - start) % (2 * sizes["cp"] if sizes.get("cp", 1) > 1 else 1) == 0
        for row in rows.tolist():
            start = max(offset for offset in offsets if offset <= row)
            found.append(tuple(batch.tokens[start : row + 1].tolist()))
    assert found == list(PREFIXES.values())


@pytest.mark.parametrize("sizes", [each for each in LAYOUTS if "cp" not in each])
def test_prefixes_and_new_tokens_go_to_their_own_slots(sizes: dict[str, int]) -> None:
    cache = KvCache(num_slots=6, max_length=8)
    for pack in (pack_prefixes, pack_new_tokens):
        batches, last_rows, places = pack(PREFIXES, layout(**sizes), cache)
        kept: dict[int, dict[int, int]] = {}
        order = []
        for batch, rows, at in zip(batches, last_rows, places, strict=True):
            assert at.is_first == (pack is pack_prefixes)
            assert at.slots.shape == at.positions.shape == batch.tokens.shape
            assert int(at.positions.max()) < cache.max_length
            for slot, position, token in zip(
                at.slots.tolist(), at.positions.tolist(), batch.tokens.tolist(), strict=True
            ):
                if slot != cache.scratch_slot:
                    assert position < at.longest
                    assert position not in kept.setdefault(slot, {})
                    kept[slot][position] = token
            order += at.slots[rows].tolist()
        assert order == list(PREFIXES)
        whole = {slot: dict(enumerate(prefix)) for slot, prefix in PREFIXES.items()}
        last = {slot: {len(prefix) - 1: prefix[-1]} for slot, prefix in PREFIXES.items()}
        assert kept == (whole if pack is pack_prefixes else last)


@pytest.mark.parametrize("pack", [pack_prefixes, pack_new_tokens])
def test_a_replica_without_responses_takes_part_with_padding(pack) -> None:  # type: ignore[no-untyped-def]
    cache = KvCache(num_slots=0, max_length=3)
    batches, last_rows, places = pack({}, layout(tp=2, pp=2), cache)
    for batch, rows, at in zip(batches, last_rows, places, strict=True):
        assert batch.num_tokens == 2
        assert rows.numel() == 0
        assert at.slots.tolist() == [cache.scratch_slot] * 2
        assert not torch.any(batch.loss_mask)
