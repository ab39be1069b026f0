"""The numbers of a step against counts by hand."""

from __future__ import annotations

import math

import pytest

from megatron_sftrl.data.prompt_set import PromptRow
from megatron_sftrl.rl.rewards import Part, Scored
from megatron_sftrl.trainers.experience import Response
from megatron_sftrl.trainers.grpo_metrics import mismatch_metrics, response_metrics
from megatron_sftrl.trainers.rollouts import Collected
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
