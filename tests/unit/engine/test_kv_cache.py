"""Attention of new tokens to a cache, and what the cache gives back, against dense attention in float64."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sftrl.engine.kv_cache import CacheSlots, KvCache, seen_positions, why_no_cache

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
        is_even=len(set(lengths)) == 1,
    )


def attend(query: Tensor, keys: Tensor, values: Tensor, at: CacheSlots, *, window: int | None) -> Tensor:
    """[S, heads, head_dim], as the decoding step asks for it."""
    return torch.nn.functional.scaled_dot_product_attention(
        query.unflatten(1, (keys.shape[1], -1)),
        keys,
        values,
        attn_mask=seen_positions(at, window=window),
        scale=SCALE,
    ).flatten(1, 2)


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("num_groups", [1, 2, 4])
@pytest.mark.parametrize("lengths", [[5, 1, 9], [6, 6, 6]])
def test_new_tokens_see_what_full_attention_shows_them(
    lengths: list[int], num_groups: int, window: int | None
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
    found = attend(query, *cache.read(0, new), new, window=window)
    for row, kept in enumerate(whole):
        expected = dense_attention(query[row], *kept, window=window)
        # float64, sums of at most 9 terms.
        torch.testing.assert_close(found[row], expected, rtol=1e-12, atol=1e-12)


def test_what_stands_behind_a_token_in_the_cache_does_not_reach_it() -> None:
    """A shorter sequence beside a longer one: its rows behind the end are of no one, or of an older use."""
    torch.manual_seed(0)
    keys, values, query = normal(2, 2, 7, HEAD_DIM), normal(2, 2, 7, HEAD_DIM), normal(2, 4, HEAD_DIM)
    at = new_tokens(KvCache(num_slots=2, max_length=7), [3, 7])
    clean = attend(query, keys, values, at, window=None)
    keys[0, :, 3:], values[0, :, 3:] = 1e6, -1e6
    assert torch.equal(attend(query, keys, values, at, window=None), clean)
    keys[0, :, 2] = 1.0
    assert not torch.equal(attend(query, keys, values, at, window=None), clean)


def test_layers_and_slots_are_kept_apart_and_padding_harms_no_one() -> None:
    cache = KvCache(num_slots=2, max_length=4)
    ones = torch.ones(1, 1, HEAD_DIM)
    for layer in (0, 1):
        for slot in (0, 1):
            at = written(cache, [slot], [0])
            cache.write(layer, at, ones * (10 * layer + slot), -ones * (10 * layer + slot))
    cache.write(0, written(cache, [cache.scratch_slot], [0]), ones * 99, ones * 99)
    for layer in (0, 1):
        keys, values = cache.read(layer, new_tokens(cache, [1, 1]))
        assert keys.shape == (2, 1, 1, HEAD_DIM)
        assert keys[:, 0, 0, 0].tolist() == [10 * layer, 10 * layer + 1]
        assert values[:, 0, 0, 0].tolist() == [-10 * layer, -10 * layer - 1]


def test_a_cache_that_grows_keeps_what_it_holds_and_adds_zeros() -> None:
    cache = KvCache(num_slots=1, max_length=10_000)
    first, later = torch.randn(1, 2, HEAD_DIM), torch.randn(1, 2, HEAD_DIM)
    cache.write(3, written(cache, [0], [0]), first, -first)
    last = 700  # beyond what one growth gives
    cache.write(3, written(cache, [0], [last]), later, -later)
    keys, values = cache.read(3, new_tokens(cache, [last + 1]))
    assert keys.shape == (1, 2, last + 1, HEAD_DIM)
    for kept, sign in ((keys, 1), (values, -1)):
        assert torch.equal(kept[:, :, 0], sign * first)
        assert torch.equal(kept[:, :, last], sign * later)
        assert not kept[:, :, 1:last].any()


def test_a_copied_slot_holds_the_same_in_every_layer_and_not_more_than_was_asked_for() -> None:
    cache = KvCache(num_slots=4, max_length=6)
    for layer in (1, 2):
        rows = torch.randn(4, 2, HEAD_DIM)
        cache.write(layer, written(cache, [1] * 4, [0, 1, 2, 3]), rows, -rows)
    cache.copy(1, [0, 3], 3)
    for layer in (1, 2):
        for kept in cache.read(layer, new_tokens(cache, [4, 4, 4, 4])):
            assert kept[1].all()
            for target in (0, 3):
                assert torch.equal(kept[target, :, :3], kept[1, :, :3])
                assert not kept[target, :, 3:].any()
            assert not kept[2].any()


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
