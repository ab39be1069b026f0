"""What says that a checkpoint is ready for RL: each number alone beyond its limit."""

from __future__ import annotations

import argparse
from dataclasses import replace

import pytest

from megatron_sftrl.apps.evaluate.command import add_handoff_arguments
from megatron_sftrl.apps.evaluate.handoff import judge
from megatron_sftrl.apps.evaluate.limits import Limits
from megatron_sftrl.apps.evaluate.statistics import Answer, Estimate
from megatron_sftrl.errors import UserError

RIGHT = Answer(
    is_right=True,
    is_right_leniently=True,
    answer=None,
    rewards={"first": 1.0},
    tokens=[1, 2],
    entropies=[0.5, 0.7],
    is_finished=True,
)
WRONG = replace(RIGHT, is_right=False, is_right_leniently=False)
READY = [[RIGHT, WRONG, WRONG, WRONG]] * 12


def flagged(groups: list[list[Answer]], limits: Limits | None = None) -> set[str]:
    return {each.name for each in judge(groups, limits or Limits(), seed=0) if not each.is_kept}


def changed(**changes: object) -> list[list[Answer]]:
    return [[replace(each, **changes) for each in group] for group in READY]  # type: ignore[arg-type]


def test_a_policy_that_is_sometimes_right_is_ready() -> None:
    assert flagged(READY) == set()
    numbers = {each.name: each.found.value for each in judge(READY, Limits(), seed=0)}
    assert numbers == pytest.approx(
        {
            "min_entropy": 0.6,
            "max_equal_groups": 0.0,
            "min_headroom": 0.75,
            "min_finished": 1.0,
            "max_format_loss": 0.0,
        }
    )


@pytest.mark.parametrize(
    ("groups", "names"),
    [
        (changed(entropies=[0.1, 0.2]), {"min_entropy"}),
        ([[RIGHT] * 4] * 50 + [[RIGHT, WRONG, WRONG, WRONG]] * 10, {"max_equal_groups"}),
        ([[WRONG] * 4] * 12, {"max_equal_groups", "min_headroom"}),
        (changed(is_finished=False), {"min_finished"}),
        (changed(is_right_leniently=True), {"max_format_loss"}),
    ],
)
def test_what_leaves_rl_nothing_to_learn_is_flagged(groups, names) -> None:
    assert flagged(groups) == names


def test_a_head_room_that_may_be_chance_is_flagged() -> None:
    """One prompt of twelve: the interval begins at 0."""
    assert "min_headroom" in flagged([[RIGHT, WRONG], *[[WRONG, WRONG]] * 11])


def test_limits_are_options_with_the_same_defaults() -> None:
    parser = argparse.ArgumentParser()
    add_handoff_arguments(parser)
    parsed = vars(parser.parse_args(["--out", "x", "--min-entropy", "0.7"]))
    assert Limits(**{name: parsed[name] for name in Limits.__dataclass_fields__}) == Limits(min_entropy=0.7)
    assert flagged(READY, Limits(min_entropy=0.7)) == {"min_entropy"}


def test_responses_that_nobody_could_judge_are_no_verdict() -> None:
    with pytest.raises(UserError, match="two judged responses"):
        judge(changed(is_right=None), Limits(), seed=0)


def test_the_distance_from_the_base_is_told_and_held_to_a_limit_that_was_given() -> None:
    kl = Estimate(value=0.4, low=0.3, high=0.5, num_prompts=3)
    assert "max_kl" not in {each.name for each in judge(READY, Limits(), seed=0)}
    for limit, is_kept in ((None, True), (0.5, True), (0.3, False)):
        found = judge(READY, Limits(max_kl=limit), seed=0, kl=kl)[-1]
        assert (found.name, found.found, found.limit, found.is_kept) == ("max_kl", kl, limit, is_kept)
