"""Prefixes and new tokens as micro-batches: every token in its place, padding out of everybody's way."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from megatron_sftrl.engine.kv_cache import KvCache, runs_of
from megatron_sftrl.engine.parallel import ParallelContext
from megatron_sftrl.rollout.in_process import Packed, pack_new_tokens, pack_prefixes

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


@pytest.mark.parametrize("sizes", LAYOUTS)
def test_every_rank_holds_a_multiple_of_the_tokens_that_eight_bits_want(sizes: dict[str, int]) -> None:
    batches, _, _ = pack_prefixes(PREFIXES, layout(**sizes), None, token_multiple=16)
    assert all(batch.num_tokens % (16 * sizes.get("tp", 1) * sizes.get("cp", 1)) == 0 for batch in batches)
    assert [batch.tokens.tolist() for batch in pack_prefixes(PREFIXES, layout(**sizes), None)[0]] == [
        batch.tokens[: small.num_tokens].tolist()
        for batch, small in zip(batches, pack_prefixes(PREFIXES, layout(**sizes), None)[0], strict=True)
    ]


def kept_tokens(packed: Packed, cache: KvCache) -> tuple[dict[int, dict[int, int]], list[int]]:
    """Each token that is written to the cache, by slot and position; the slot of each row that is drawn."""
    kept: dict[int, dict[int, int]] = {}
    drawn = []
    for batch, rows, at in zip(*packed, strict=True):
        assert at.slots.shape == at.positions.shape == batch.tokens.shape
        assert int(at.positions.max()) < cache.max_length
        for slot, position, token in zip(
            at.slots.tolist(), at.positions.tolist(), batch.tokens.tolist(), strict=True
        ):
            if slot != cache.scratch_slot:
                assert position < at.longest
                assert position not in kept.setdefault(slot, {})
                kept[slot][position] = token
        drawn += at.slots[rows].tolist()
    return kept, drawn


CACHED_LAYOUTS = [each for each in LAYOUTS if "cp" not in each]


@pytest.mark.parametrize("sizes", CACHED_LAYOUTS)
def test_prefixes_go_to_the_slots_of_their_numbers(sizes: dict[str, int]) -> None:
    cache = KvCache(num_slots=6, max_length=8)
    packed = pack_prefixes(PREFIXES, layout(**sizes), cache)
    kept, drawn = kept_tokens(packed, cache)
    assert all(at.span is None for at in packed[2])
    assert drawn == list(PREFIXES)
    assert kept == {slot: dict(enumerate(prefix)) for slot, prefix in PREFIXES.items()}


@pytest.mark.parametrize("sizes", CACHED_LAYOUTS)
@pytest.mark.parametrize("positions", [[4, 0, 6, 2, 1], [3, 3, 3, 3, 3]])
def test_new_tokens_go_behind_their_prefixes(sizes: dict[str, int], positions: list[int]) -> None:
    cache = KvCache(num_slots=5, max_length=8)
    tokens = [51, 11, 71, 31, 21]
    packed = pack_new_tokens(tokens, positions, layout(**sizes), cache)
    kept, drawn = kept_tokens(packed, cache)
    assert drawn == [0, 1, 2, 3, 4]
    assert kept == {slot: {positions[slot]: tokens[slot]} for slot in range(5)}
    slots = []
    for at in packed[2]:
        assert at.span is not None
        mine = list(range(*at.span))
        assert at.slots[: len(mine)].tolist() == mine, "the tokens of the span stand first"
        assert at.longest == max((positions[slot] + 1 for slot in mine), default=1)
        assert at.runs == runs_of([positions[slot] + 1 for slot in mine])
        slots += mine
    assert slots == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("is_first", [True, False])
def test_a_replica_without_responses_takes_part_with_padding(is_first: bool) -> None:
    cache = KvCache(num_slots=0, max_length=3)
    parallel = layout(tp=2, pp=2)
    packed = pack_prefixes({}, parallel, cache) if is_first else pack_new_tokens([], [], parallel, cache)
    for batch, rows, at in zip(*packed, strict=True):
        assert batch.num_tokens == 2
        assert rows.numel() == 0
        assert at.slots.tolist() == [cache.scratch_slot] * 2
        assert not torch.any(batch.loss_mask)
