"""The plan of micro-batches: nothing lost, nothing twice, nobody left waiting."""

from __future__ import annotations

import random

import pytest

from megatron_sftrl.data.packing import (
    SharedPrompt,
    pieces_of,
    plan_microbatches,
    plan_sharing_microbatches,
)


def random_plans():
    generator = random.Random(5)
    for _ in range(300):
        count = generator.choice([0, 1, 2, 3, 7, 16, 40])
        lengths = [generator.choice([1, 2, generator.randint(1, 64), 64]) for _ in range(count)]
        settings = {
            "dp_size": generator.choice([1, 2, 3, 8]),
            "micro_size": generator.choice([1, 2, 5]),
            "packing": generator.random() < 0.5,
            "max_tokens": generator.choice([64, 100, 256]),
            "microbatch_multiple": generator.choice([1, 2, 4]),
        }
        yield lengths, settings


def test_every_sequence_stands_in_exactly_one_microbatch_and_all_ranks_have_equally_many() -> None:
    for lengths, settings in random_plans():
        plan = plan_microbatches(lengths, **settings)
        assert len(plan) == settings["dp_size"]
        assert sorted(i for rank in plan for group in rank for i in group) == list(range(len(lengths)))
        (count,) = {len(rank) for rank in plan}
        assert count >= 1
        assert count % settings["microbatch_multiple"] == 0
        for group in (group for rank in plan for group in rank):
            if settings["packing"]:
                assert sum(lengths[i] for i in group) <= settings["max_tokens"]
            else:
                assert len(group) <= settings["micro_size"]
        assert plan == plan_microbatches(lengths, **settings)


def test_no_microbatch_more_than_needed() -> None:
    for lengths, settings in random_plans():
        plan = plan_microbatches(lengths, **settings)
        wave = settings["dp_size"] * settings["microbatch_multiple"]
        total = len(plan[0]) * settings["dp_size"]
        if settings["packing"]:
            # Any two groups of a first fit hold more than one group's room, so it makes at most twice the
            # fewest possible, plus one.
            most = 2 * -(-sum(lengths) // settings["max_tokens"]) + 1
            assert total <= max(wave, most + wave - 1)
        else:
            groups = -(-len(lengths) // settings["micro_size"])
            assert total <= max(wave, groups + wave - 1)


def test_packing_fills_exactly_where_that_is_possible_and_spreads_evenly() -> None:
    plan = plan_microbatches([6, 4, 5, 5, 7, 3], dp_size=1, micro_size=1, packing=True, max_tokens=10)
    assert sorted(map(tuple, plan[0])) == [(0, 1), (2, 3), (4, 5)]
    lengths = [8, 8, 8, 8, 2, 2, 2, 2]
    plan = plan_microbatches(lengths, dp_size=4, micro_size=1, packing=True, max_tokens=40)
    assert [[sum(lengths[i] for i in group) for group in rank] for rank in plan] == [[10]] * 4


def test_ranks_carry_nearly_equal_loads_without_packing() -> None:
    lengths = list(range(1, 65))
    plan = plan_microbatches(lengths, dp_size=4, micro_size=2, packing=False, max_tokens=None)
    loads = [sum(lengths[i] for group in rank for i in group) for rank in plan]
    # Dealing back and forth leaves at most one group's spread between ranks; one-way dealing leaves 96.
    assert max(loads) - min(loads) <= 8


def test_a_sequence_longer_than_a_microbatch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_tokens = 10 .* 11 tokens"):
        plan_microbatches([3, 11], dp_size=1, micro_size=1, packing=True, max_tokens=10)


# Responses that share prompts.


def random_groups():
    generator = random.Random(6)
    for _ in range(200):
        num_tokens, shared = [], []
        for number in range(generator.choice([1, 2, 5, 12])):
            length = generator.choice([0, 1, 7, 40])
            for _ in range(generator.choice([1, 2, 4, 9])):
                num_tokens.append(length + 1 + generator.randint(1, 20))
                shared.append(SharedPrompt(number=number, length=length))
        settings = {
            "dp_size": generator.choice([1, 2, 3, 8]),
            "max_tokens": generator.choice([64, 100, 256]),
            "multiple": generator.choice([1, 4]),
            "microbatch_multiple": generator.choice([1, 2]),
        }
        yield num_tokens, shared, settings


def occupied(positions: list[int], num_tokens: list[int], shared: list[SharedPrompt], multiple: int) -> int:
    pieces = pieces_of([num_tokens[i] for i in positions], [shared[i] for i in positions], multiple=multiple)
    return sum(piece.span(multiple) for piece in pieces)


def test_groups_that_share_prompts_are_planned_whole_within_the_room_and_never_worse_than_copies() -> None:
    num_better = 0
    for num_tokens, shared, settings in random_groups():
        multiple = settings["multiple"]
        plan = plan_sharing_microbatches(num_tokens, shared, **settings)
        assert len(plan) == settings["dp_size"]
        assert sorted(i for rank in plan for group in rank for i in group) == list(range(len(num_tokens)))
        (count,) = {len(rank) for rank in plan}
        assert count % settings["microbatch_multiple"] == 0
        loads = [sum(occupied(group, num_tokens, shared, multiple) for group in rank) for rank in plan]
        for group in (group for rank in plan for group in rank):
            assert occupied(group, num_tokens, shared, multiple) <= settings["max_tokens"]
        copies = [-(-(length - 1) // multiple) * multiple for length in num_tokens]
        assert sum(loads) <= sum(copies)
        num_better += sum(loads) < sum(copies)
    assert num_better > 100


def test_a_group_is_cut_where_ranks_would_wait_and_where_it_does_not_fit() -> None:
    num_tokens, shared = [10 + 1 + 20] * 8, [SharedPrompt(number=0, length=10)] * 8

    def sizes(dp_size: int, max_tokens: int) -> list[list[int]]:
        plan = plan_sharing_microbatches(
            num_tokens, shared, dp_size=dp_size, max_tokens=max_tokens, multiple=1
        )
        return [[len(group) for group in rank] for rank in plan]

    assert sizes(1, 1000) == [[8]]
    assert sizes(4, 1000) == [[2]] * 4
    assert sizes(1, 100) == [[4, 4]]  # 10 + 4 * 20 fit
    with pytest.raises(ValueError, match=r"max_tokens = 29 .* 30 tokens"):
        sizes(1, 29)
