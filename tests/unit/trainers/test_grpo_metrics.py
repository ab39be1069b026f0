"""The numbers of a step against counts by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from megatron_sftrl.data.prompts import PromptRow
from megatron_sftrl.rl.rewards import Part, Scored
from megatron_sftrl.trainers.experience import Response
from megatron_sftrl.trainers.grpo_numbers import (
    filling_metrics,
    mismatch_metrics,
    response_metrics,
    staleness,
)
from megatron_sftrl.trainers.rollouts import Collected, Draws
from megatron_sftrl.types import Rollout


def response(
    group: int,
    strict: float,
    *,
    lenient: float,
    length: int,
    is_finished: bool,
    apart: tuple[float, ...] = (),
) -> Response:
    """Its second reward is -1 with weight 0.75; our log-probabilities are the engine's + `apart`."""
    tokens = tuple(range(length))
    return Response(
        group=group,
        row=PromptRow(tokens=(1,), values={}, source="rows.jsonl:1"),
        rollout=Rollout(
            prompt_tokens=(1,), response_tokens=tokens, logprobs=(-1.0,) * length, is_finished=is_finished
        ),
        scored=Scored(
            reward=strict - 0.75,
            lenient=lenient - 0.75,
            parts=(
                Part(name="math", outcome="ok", reward=strict, lenient=lenient),
                Part(name="length", outcome="ok", reward=-1.0, lenient=-1.0),
            ),
        ),
        old_logprobs=tuple(-1.0 + value for value in apart),
    )


RESPONSES = (
    response(7, 1.0, lenient=1.0, length=2, is_finished=True),
    response(9, 0.0, lenient=1.0, length=4, is_finished=False),
    response(7, 0.0, lenient=0.0, length=3, is_finished=True),
    response(9, 0.0, lenient=0.0, length=3, is_finished=True),
    response(9, 0.0, lenient=0.0, length=8, is_finished=False),
)


def test_rewards_pass_at_k_and_lengths_are_over_all_that_was_generated() -> None:
    numbers = response_metrics(
        Collected(responses=(RESPONSES[0], RESPONSES[2]), generated=RESPONSES, num_prompts=2)
    )
    expected = {
        "reward/mean": 0.2 - 0.75,
        "reward/lenient_mean": 0.4 - 0.75,
        "reward/std": math.sqrt((0.8**2 + 4 * 0.2**2) / 4),
        "reward/zero_variance_groups": 0.5,
        # A success by the first reward before its weight, whatever the others take off.
        "reward/pass_at_1": (1 / 2 + 0) / 2,
        "reward/pass_at_2": (1 + 0) / 2,
        "reward/math": 0.2,
        "reward/math/lenient": 0.4,
        "reward/length": -1.0,
        "rollout/prompts": 2,
        "rollout/trained_responses": 2,
        "rollout/response_tokens": 4.0,
        "rollout/longest_response": 8,
        "rollout/truncated": 0.4,
    }
    assert {name: numbers[name] for name in expected} == pytest.approx(expected)


def test_what_no_verifier_could_judge_is_neither_right_nor_wrong() -> None:
    """Groups [1, ?, 0], [0, 0, 0] and [?, ?, ?]: 5 of 9 are known, one of them is right."""
    unknown = Part(name="math", outcome="timeout")
    lost = Scored(reward=None, lenient=None, parts=(unknown, RESPONSES[0].scored.parts[1]))
    groups = {7: (1.0, None, 0.0), 9: (0.0, 0.0, 0.0), 8: (None, None, None)}
    made = [
        response(group, reward or 0.0, lenient=reward or 0.0, length=2, is_finished=True)
        if reward is not None
        else replace(response(group, 0.0, lenient=0.0, length=2, is_finished=True), scored=lost)
        for group, rewards in groups.items()
        for reward in rewards
    ]
    numbers = response_metrics(Collected(responses=tuple(made[:6]), generated=tuple(made), num_prompts=3))
    expected = {
        "reward/mean": 0.2 - 0.75,
        "reward/lenient_mean": 0.2 - 0.75,
        "reward/std": math.sqrt((0.8**2 + 4 * 0.2**2) / 4),
        "reward/unscored": 4 / 9,
        "reward/zero_variance_groups": 0.5,
        "reward/pass_at_1": (1 / 2 + 0) / 2,
        "reward/pass_at_3": 0.0,  # the group of 9 alone has three
        "reward/math": 0.2,
        "reward/math/timeout": 4,
        "reward/length": -1.0,  # it judged all
        "rollout/trained_responses": 5,
    }
    assert {name: numbers[name] for name in expected} == pytest.approx(expected)


def test_where_nothing_could_be_judged_there_is_no_mean() -> None:
    lost = Scored(reward=None, lenient=None, parts=(Part(name="math", outcome="crashed"),))
    made = (replace(RESPONSES[0], scored=lost),)
    numbers = response_metrics(Collected(responses=made, generated=made, num_prompts=1))
    assert (numbers["reward/unscored"], numbers["reward/math/crashed"]) == (1, 1)
    missing = {"reward/mean", "reward/lenient_mean", "reward/std", "reward/pass_at_1", "reward/math"}
    assert not missing & numbers.keys()


def test_how_a_step_of_dynamic_sampling_was_filled() -> None:
    collected = Collected(
        responses=RESPONSES, generated=RESPONSES, num_prompts=7, draws=Draws(drawn=10, useful=4), num_rounds=2
    )
    assert filling_metrics(collected, wanted=4) == {
        "rollout/rounds": 2,
        "rollout/useful_groups": 0.4,
        "rollout/filled": 0.5,
        "rollout/put_back": 3,
    }
    assert filling_metrics(replace(collected, num_rounds=0), wanted=4) == {}


def test_the_mismatch_is_over_the_tokens_of_all_responses() -> None:
    apart = ((0.5, -0.25), (0.0,))
    found = mismatch_metrics(
        [response(1, 0.0, lenient=0.0, length=len(each), is_finished=True, apart=each) for each in apart]
    )
    exponentials = (math.exp(0.5) + math.exp(0.25) + 1) / 3
    assert found == pytest.approx(
        {
            "mismatch/mean": 0.25,
            "mismatch/max": 0.5,
            "mismatch/p999": 0.5,
            "mismatch/multiplicative_error": exponentials,
        }
    )


def test_a_demonstration_is_no_response_but_a_member_of_its_group() -> None:
    shown = [
        replace(response(group, 1.0, lenient=1.0, length=20, is_finished=True), is_demonstration=True)
        for group in (7, 9)
    ]
    plain = Collected(responses=RESPONSES, generated=RESPONSES, num_prompts=2)
    found = response_metrics(
        Collected(responses=(*RESPONSES, *shown), generated=(*shown, *RESPONSES), num_prompts=2)
    )
    # Group 9 is all wrong without its demonstration.
    assert found.pop("reward/zero_variance_groups") == 0.0
    assert found.pop("reward/demonstrations") == 1.0 - 0.75
    expected = response_metrics(plain)
    assert expected.pop("reward/zero_variance_groups") == 0.5
    assert found == expected
    apart = [replace(each, old_logprobs=(-5.0,) * 20) for each in shown]
    own = [response(7, 1.0, lenient=1.0, length=1, is_finished=True, apart=(0.5,))]
    assert mismatch_metrics([*apart, *own])["mismatch/max"] == 0.5


def test_staleness_is_over_what_the_policy_has_sampled() -> None:
    old, new = replace(RESPONSES[0], version=6), replace(RESPONSES[1], version=7)
    shown = replace(old, is_demonstration=True)
    assert staleness([old, new, new, new, shown], step=7) == 0.25
