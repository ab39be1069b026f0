"""Attention of new tokens to a cache, and what the cache gives back, against dense attention in float64."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sftrl.engine import kv_cache
from megatron_sftrl.engine.kv_cache import CacheSlots, KvCache, readings, runs_of, why_no_cache

HEAD_DIM = 6
SCALE = 0.37  # not 1 / sqrt(HEAD_DIM): the one that is given must be used


def dense_attention(query: Tensor, keys: Tensor, values: Tensor, *, window: int | None) -> Tensor:
    """[heads, head_dim] of the last of L positions, written out; keys, values [L, groups, head_dim]."""
    num_heads, num_groups = query.shape[0], keys.shape[1]
    rows = []
    for head in range(num_heads):
        group = head // (num_heads // num_groups)
        first = 0 if window is None else max(0, len(keys) - window)
        scores = keys[first:, group] @ query[head] * SCALE
        rows.append(scores.softmax(0) @ values[first:, group])
    return torch.stack(rows)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def written(cache: KvCache, slots: list[int], positions: list[int]) -> CacheSlots:
    return CacheSlots(
        cache=cache,
        slots=torch.tensor(slots),
        positions=torch.tensor(positions),
        longest=max(positions) + 1,
    )


def new_tokens(cache: KvCache, lengths: list[int]) -> CacheSlots:
    """The last token of each slot."""
    last = [length - 1 for length in lengths]
    return replace(
        written(cache, list(range(len(lengths))), last),
        span=(0, len(lengths)),
        runs=runs_of(lengths),
    )


def attend(query: Tensor, at: CacheSlots, *, window: int | None, layer: int = 0) -> Tensor:
    """[S, heads, head_dim], as the decoding step asks for it."""
    parts = []
    for what in readings(at, window=window):
        keys, values = at.cache.read(layer, what)
        by_group = query[what.rows].unflatten(1, (keys.shape[1], -1))
        parts.append(
            torch.nn.functional.scaled_dot_product_attention(
                by_group, keys, values, attn_mask=what.mask, scale=SCALE
            ).flatten(1, 2)
        )
    return torch.cat(parts)


def kept(cache: KvCache, layer: int, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """[slots, groups, L, head_dim] each, of sequences that are read together."""
    (what,) = readings(new_tokens(cache, lengths), window=None)
    return cache.read(layer, what)


@pytest.fixture(params=[2, 128], ids=["several runs", "one run"])
def short(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Up to which length sequences are read together."""
    monkeypatch.setattr(kv_cache, "_SHORT", request.param)
    return request.param


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("num_groups", [1, 2, 4])
@pytest.mark.parametrize("lengths", [[5, 1, 9], [9, 5, 1], [9, 8, 2], [6, 6, 6]])
def test_new_tokens_see_what_full_attention_shows_them(
    lengths: list[int], num_groups: int, window: int | None, short: int
) -> None:
    torch.manual_seed(num_groups)
    num_heads = 4
    cache = KvCache(num_slots=3, max_length=12)
    whole = [
        (normal(length, num_groups, HEAD_DIM), normal(length, num_groups, HEAD_DIM)) for length in lengths
    ]
    # Prefixes in one packed write, in another order than their slots; then one new token of each.
    order = [2, 0, 1]
    before = [(slot, position) for slot in order for position in range(lengths[slot] - 1)]
    prefix = written(cache, [s for s, _ in before], [p for _, p in before])
    cache.write(0, prefix, *(torch.cat([whole[s][i][:-1] for s in order]) for i in (0, 1)))
    new = new_tokens(cache, lengths)
    cache.write(0, new, *(torch.stack([both[i][-1] for both in whole]) for i in (0, 1)))

    query = normal(3, num_heads, HEAD_DIM)
    assert (len(new.runs) > 1) == (short == 2 and lengths[0] == 9)
    found = attend(query, new, window=window)
    for row, pair in enumerate(whole):
        expected = dense_attention(query[row], *pair, window=window)
        # float64, sums of at most 9 terms.
        torch.testing.assert_close(found[row], expected, rtol=1e-12, atol=1e-12)


def test_what_stands_behind_a_token_in_the_cache_does_not_reach_it() -> None:
    """A shorter sequence beside a longer one: its rows behind the end are of no one, or of an older use."""
    torch.manual_seed(0)
    cache, query = KvCache(num_slots=2, max_length=7), normal(2, 4, HEAD_DIM)
    everything = written(cache, [0] * 7 + [1] * 7, [*range(7), *range(7)])
    cache.write(0, everything, normal(14, 2, HEAD_DIM), normal(14, 2, HEAD_DIM))
    at = new_tokens(cache, [3, 7])
    keys, values = kept(cache, 0, [7, 7])
    clean = attend(query, at, window=None)
    keys[0, :, 3:], values[0, :, 3:] = 1e6, -1e6
    assert torch.equal(attend(query, at, window=None), clean)
    keys[0, :, 2] = 1.0
    assert not torch.equal(attend(query, at, window=None), clean)


def test_sequences_of_similar_length_are_read_together() -> None:
    lengths = [900, 700, 769, 512, 400, 200, 130, 128, 100, 1]
    runs = [(run.first, run.last, run.shortest, run.longest) for run in runs_of(lengths)]
    # 700 stands before 769 and is read as that is; classes are 128, 192, 256, 384, 512, 768, 1024, ...
    assert runs == [
        (0, 3, 700, 900), (3, 5, 400, 512), (5, 6, 200, 200), (6, 7, 130, 130), (7, 10, 1, 128)
    ]  # fmt: skip
    assert sum(run.num_read for run in runs_of(lengths)) == 3 * 900 + 2 * 512 + 200 + 130 + 3 * 128
    assert runs_of([]) == ()


def test_behind_a_window_nothing_is_read() -> None:
    cache = KvCache(num_slots=2, max_length=300)
    uneven, even = (readings(new_tokens(cache, each), window=50)[0] for each in ([290, 280], [290, 290]))
    assert (uneven.positions, even.positions) == (slice(230, 290), slice(240, 290))
    assert uneven.mask is not None
    assert even.mask is None


def test_another_order_of_slots_takes_all_that_they_hold_along() -> None:
    cache = KvCache(num_slots=3, max_length=6)
    for layer in (1, 2):
        rows = torch.randn(12, 2, HEAD_DIM)
        cache.write(layer, written(cache, [0] * 4 + [1] * 4 + [2] * 4, [*range(4)] * 3), rows, -rows)
        cache.write_state(layer, "sums", torch.arange(3), torch.randn(3, 5))
    at = new_tokens(cache, [4, 4, 4])

    def held(layer: int) -> list[Tensor]:
        keys, values = kept(cache, layer, [4, 4, 4])
        return [keys[:, :, :3].clone(), values[:, :, :3].clone(), cache.state(layer, "sums", at).clone()]

    before = {layer: held(layer) for layer in (1, 2)}
    cache.reorder([2, 0, 1], 3)
    for layer in (1, 2):
        for old, new in zip(before[layer], held(layer), strict=True):
            assert torch.equal(new, old[[2, 0, 1]])


def test_layers_and_slots_are_kept_apart_and_padding_harms_no_one() -> None:
    cache = KvCache(num_slots=2, max_length=4)
    ones = torch.ones(1, 1, HEAD_DIM)
    for layer in (0, 1):
        for slot in (0, 1):
            at = written(cache, [slot], [0])
            cache.write(layer, at, ones * (10 * layer + slot), -ones * (10 * layer + slot))
    cache.write(0, written(cache, [cache.scratch_slot], [0]), ones * 99, ones * 99)
    for layer in (0, 1):
        keys, values = kept(cache, layer, [1, 1])
        assert keys.shape == (2, 1, 1, HEAD_DIM)
        assert keys[:, 0, 0, 0].tolist() == [10 * layer, 10 * layer + 1]
        assert values[:, 0, 0, 0].tolist() == [-10 * layer, -10 * layer - 1]


def test_a_cache_that_grows_keeps_what_it_holds_and_adds_zeros() -> None:
    cache = KvCache(num_slots=1, max_length=10_000)
    first, later = torch.randn(1, 2, HEAD_DIM), torch.randn(1, 2, HEAD_DIM)
    cache.write(3, written(cache, [0], [0]), first, -first)
    last = 700  # beyond what one growth gives
    cache.write(3, written(cache, [0], [last]), later, -later)
    keys, values = kept(cache, 3, [last + 1])
    assert keys.shape == (1, 2, last + 1, HEAD_DIM)
    for held, sign in ((keys, 1), (values, -1)):
        assert torch.equal(held[:, :, 0], sign * first)
        assert torch.equal(held[:, :, last], sign * later)
        assert not held[:, :, 1:last].any()


def test_a_copied_slot_holds_the_same_in_every_layer_and_not_more_than_was_asked_for() -> None:
    cache = KvCache(num_slots=4, max_length=6)
    for layer in (1, 2):
        rows = torch.randn(4, 2, HEAD_DIM)
        cache.write(layer, written(cache, [1] * 4, [0, 1, 2, 3]), rows, -rows)
    cache.copy(1, [0, 3], 3)
    for layer in (1, 2):
        for held in kept(cache, layer, [4, 4, 4, 4]):
            assert held[1].all()
            for target in (0, 3):
                assert torch.equal(held[target, :, :3], held[1, :, :3])
                assert not held[target, :, 3:].any()
            assert not held[2].any()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, None),
        ({"context_parallel_size": 2}, "parallel.cp is 2"),
        ({"fp8": "e4m3"}, "the layers compute in fp8 or fp4"),
        ({"fp4": "e2m1"}, "the layers compute in fp8 or fp4"),
    ],
)
def test_what_a_new_token_alone_would_compute_otherwise_has_no_cache(
    changes: dict[str, Any], why: str | None
) -> None:
    config: Any = SimpleNamespace(**{"context_parallel_size": 1, "fp8": None, "fp4": None, **changes})
    assert why_no_cache(config) == why
