"""Attention of new tokens to a cache, and what the cache gives back, against dense attention in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_sftrl.engine.kv_cache import CacheSlots, KvCache, attend_to_cache

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


def places(cache: KvCache, slots: list[int], positions: list[int], *, is_first: bool) -> CacheSlots:
    return CacheSlots(
        cache=cache,
        slots=torch.tensor(slots),
        positions=torch.tensor(positions),
        longest=max(positions) + 1,
        is_first=is_first,
    )


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("num_groups", [1, 2, 4])
def test_new_tokens_see_what_full_attention_shows_them(num_groups: int, window: int | None) -> None:
    torch.manual_seed(num_groups)
    num_heads, lengths = 4, [5, 1, 9]
    cache = KvCache(num_slots=3, max_length=12)
    whole = [
        (normal(length, num_groups, HEAD_DIM), normal(length, num_groups, HEAD_DIM)) for length in lengths
    ]
    # Prefixes in one packed write, in another order than their slots; then one new token of each.
    order = [2, 0, 1]
    before = [(slot, position) for slot in order for position in range(lengths[slot] - 1)]
    prefix = places(cache, [s for s, _ in before], [p for _, p in before], is_first=True)
    cache.write(0, prefix, *(torch.cat([whole[s][i][:-1] for s in order]) for i in (0, 1)))
    new = places(cache, order, [lengths[slot] - 1 for slot in order], is_first=False)
    cache.write(0, new, *(torch.stack([whole[s][i][-1] for s in order]) for i in (0, 1)))

    query = normal(3, num_heads, HEAD_DIM)
    keys, values = cache.read(0, new)
    found = attend_to_cache(query, keys, values, new.positions, scale=SCALE, window=window)
    for row, slot in enumerate(order):
        expected = dense_attention(query[row], *whole[slot], window=window)
        # float64, sums of at most 9 terms.
        torch.testing.assert_close(found[row].view(num_heads, HEAD_DIM), expected, rtol=1e-12, atol=1e-12)


def test_what_stands_behind_a_token_in_the_cache_does_not_reach_it() -> None:
    """A shorter sequence beside a longer one: its rows behind the end are of no one, or of an older use."""
    torch.manual_seed(0)
    keys, values, query = normal(2, 2, 7, HEAD_DIM), normal(2, 2, 7, HEAD_DIM), normal(2, 4, HEAD_DIM)
    positions = torch.tensor([2, 6])
    clean = attend_to_cache(query, keys, values, positions, scale=SCALE, window=None)
    keys[0, :, 3:], values[0, :, 3:] = 1e6, -1e6
    assert torch.equal(attend_to_cache(query, keys, values, positions, scale=SCALE, window=None), clean)
    keys[0, :, 2] = 1.0
    assert not torch.equal(attend_to_cache(query, keys, values, positions, scale=SCALE, window=None), clean)


def test_layers_and_slots_are_kept_apart_and_padding_harms_no_one() -> None:
    cache = KvCache(num_slots=2, max_length=4)
    ones = torch.ones(1, 1, HEAD_DIM)
    for layer in (0, 1):
        for slot in (0, 1):
            at = places(cache, [slot], [0], is_first=True)
            cache.write(layer, at, ones * (10 * layer + slot), -ones * (10 * layer + slot))
    cache.write(0, places(cache, [cache.scratch_slot], [0], is_first=True), ones * 99, ones * 99)
    for layer in (0, 1):
        keys, values = cache.read(layer, places(cache, [1, 0], [0, 0], is_first=False))
        assert keys.shape == (2, 1, 1, HEAD_DIM)
        assert keys[:, 0, 0, 0].tolist() == [10 * layer + 1, 10 * layer]
        assert values[:, 0, 0, 0].tolist() == [-10 * layer - 1, -10 * layer]
