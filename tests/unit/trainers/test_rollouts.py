"""What the engine hands over is held against what it was asked for."""

from __future__ import annotations

from array import array
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from megatron_sftrl.data.prompts import PromptRow
from megatron_sftrl.observability.watch import Timers
from megatron_sftrl.trainers.answers import Answers, Groups, check_groups
from megatron_sftrl.trainers.guards import named_step
from megatron_sftrl.types import Prompt, Rollout, RolloutGroup, SamplingParams

ROW = PromptRow(tokens=(1, 2), values={}, source="rows.jsonl:1")


def rollout(length: int) -> Rollout:
    return Rollout(
        prompt_tokens=ROW.tokens,
        response_tokens=(3,) * length,
        logprobs=(-1.0,) * length,
        is_finished=False,
    )


def answer(*groups: tuple[int, list[int]]) -> None:
    """Ask for two responses to each of the prompts 4 and 5; the engine gives `groups` of such lengths."""
    made = [
        RolloutGroup(
            prompt=Prompt(id=number, tokens=ROW.tokens), rollouts=tuple(map(rollout, lengths)), version=0
        )
        for number, lengths in groups
    ]
    nothing: Any = None
    answers = Answers(
        cast(Any, SimpleNamespace(generate=lambda *_: made)),
        nothing,
        cast(Any, SimpleNamespace(rank=0, world_size=1)),
        nothing,
        SamplingParams(num_samples=2),
        "dr_grpo",
        Timers(),
    )
    answers.answer([(4, ROW), (5, ROW)])


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ((5, []), r"expected 2 responses .* to prompt 5, got responses of \[\] tokens to prompt 5"),
        ((5, [3]), r"got responses of \[3\] tokens to prompt 5"),
        ((5, [3, 0]), r"at least one token to prompt 5, got responses of \[3, 0\] tokens"),
        ((6, [3, 3]), r"to prompt 5, got responses of \[3, 3\] tokens to prompt 6"),
    ],
)
def test_a_group_that_is_empty_incomplete_or_of_another_prompt_is_refused(
    second: tuple[int, list[int]], message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        answer((4, [1, 2]), second)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), float("inf")])
def test_log_probabilities_that_are_not_finite_end_the_step_by_name(bad: float) -> None:
    prompt = Prompt(id=4, tokens=ROW.tokens)
    whole, spoilt = rollout(2), replace(rollout(2), logprobs=(-1.0, bad))
    groups = [RolloutGroup(prompt=prompt, rollouts=(whole, spoilt), version=0)]
    said = "step 3: the engine's log-probabilities of its responses to prompt 4 are NaN or infinite"
    with pytest.raises(RuntimeError, match=said), named_step(3):
        check_groups(groups, [prompt], size=2)


def test_demonstrations_take_the_place_of_responses_where_a_row_has_one() -> None:
    shown, plain = replace(ROW, demonstration=array("i", (7, 8))), replace(ROW, tokens=(1, 3))
    asked: list[tuple[list[int], int]] = []

    def generate(prompts: list[Prompt], sampling: SamplingParams, on_response: object) -> list[RolloutGroup]:
        asked.append(([prompt.id for prompt in prompts], sampling.num_samples))
        return [
            RolloutGroup(
                prompt=prompt, rollouts=tuple(map(rollout, [1 + prompt.id] * sampling.num_samples)), version=3
            )
            for prompt in prompts
        ]

    engine: Any = SimpleNamespace(generate=generate)
    rows = [(4, shown), (5, plain), (6, shown)]
    members = Groups(engine, rows, SamplingParams(num_samples=3), copies=1).members()
    assert asked == [([5], 3), ([4, 6], 2)]
    assert [each.place for each in members] == [0, 1, 2] * 3
    assert {each.version for each in members} == {3}
    assert [(each.prompt, each.is_demonstration) for each in members] == [
        *((4, False), (4, False), (4, True)),
        *((5, False), (5, False), (5, False)),
        *((6, False), (6, False), (6, True)),
    ]
    for number, _, made, is_shown, _ in members:
        expected = (7, 8) if is_shown else (3,) * (1 + number)
        assert (made.response_tokens, made.is_finished) == (expected, is_shown)
    asked.clear()
    plain_members = Groups(engine, rows, SamplingParams(num_samples=3), copies=0).members()
    assert asked == [([4, 5, 6], 3)]
    assert not any(each.is_demonstration for each in plain_members)
