"""Numbers of an evaluation against exhaustive computations, and intervals against what they promise."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from megatron_sftrl.apps.evaluate.statistics import (
    Answer,
    estimate,
    measure,
    measure_demonstrations,
    repetition,
)
from megatron_sftrl.errors import UserError


def answer(
    is_right: bool | None,
    *,
    lenient: bool | None = None,
    text: str | None = None,
    tokens: int = 3,
    entropies: tuple[float, ...] = (),
) -> Answer:
    return Answer(
        is_right=is_right,
        is_right_leniently=is_right if lenient is None else lenient,
        answer=text,
        rewards={"first": None if is_right is None else float(is_right), "length": -1.0},
        tokens=list(range(tokens)),
        entropies=entropies,
        is_finished=tokens < 5,
    )


def test_pass_at_k_is_the_mean_over_all_choices_of_k_responses() -> None:
    groups = [[True, False, False, True, False], [False] * 5, [True] * 5, [False, False, False, False, True]]
    answers = [[answer(each) for each in group] for group in groups]
    found = measure(answers, ks=[1, 2, 3, 4, 5], seed=0)
    for k in range(1, 6):
        chosen = [[any(each) for each in itertools.combinations(group, k)] for group in groups]
        expected = math.fsum(sum(group) / len(group) for group in chosen) / len(chosen)
        assert found[f"pass@{k}"].value == pytest.approx(expected, abs=1e-15)
    assert found["accuracy"].value == pytest.approx(found["pass@1"].value, abs=1e-15)


def test_what_was_not_judged_is_neither_right_nor_wrong() -> None:
    answers = [[answer(True), answer(None)], [answer(None), answer(None)], [answer(False), answer(False)]]
    found = measure(answers, ks=[1, 2], seed=0)
    assert (found["accuracy"].value, found["accuracy"].num_prompts) == (0.5, 2)
    assert (found["pass@2"].value, found["pass@2"].num_prompts) == (0.0, 1)
    assert found["unjudged"].value == pytest.approx(0.5)
    assert found["reward/first"].num_prompts == 2
    assert (found["reward/length"].value, found["reward/length"].num_prompts) == (-1.0, 3)


def test_the_majority_is_the_most_frequent_answer_and_ties_are_shared() -> None:
    right, wrong, other = answer(True, text="4"), answer(False, text="5"), answer(False, text="6")
    silent, unjudged = answer(False), answer(None, text="5")
    groups = [
        [right, right, wrong, other],  # 4
        [right, wrong, wrong, other],  # 5
        [right, wrong, silent, silent],  # 4 or 5
        [right, unjudged, unjudged, silent],  # 4
        [silent] * 4,  # none
    ]
    found = measure(groups, ks=[1], seed=0)
    assert found["majority@4"].value == pytest.approx((1 + 0 + 0.5 + 1 + 0) / 5)
    assert "majority@4" not in measure([[silent] * 4], ks=[1], seed=0)


def test_the_other_numbers_of_responses() -> None:
    answers = [
        [
            answer(False, lenient=True, tokens=2, entropies=(1.0, 0.0)),
            answer(True, tokens=6, entropies=(0.25, 0.5, 4.0, 0.0, 0.0, 0.25)),
        ],
        [answer(True, tokens=1, entropies=(3.0,)), answer(True, tokens=1, entropies=(1.0,))],
    ]
    found = measure(answers, ks=[], seed=0)
    assert found["lenient"].value == 1.0
    assert found["tokens"].value == (4 + 1) / 2
    assert found["finished"].value == (0.5 + 1) / 2
    assert found["entropy"].value == pytest.approx((6.0 / 8 + 2.0) / 2)
    # A fifth of 8 tokens is 2 of them, wherever they stand; of 2 it is one.
    assert found["entropy/top_fifth"].value == pytest.approx(((4.0 + 1.0) / 2 + 3.0) / 2)
    greedy = measure([[answer(True)]], ks=[], seed=0)
    assert not {"entropy", "entropy/top_fifth"} & set(greedy)


@pytest.mark.parametrize(
    ("tokens", "expected"), [([1, 2, 3], 0.0), ([1] * 7, 0.75), ([1, 2, 3, 4, 1, 2, 3, 4], 0.2)]
)
def test_repetition_is_the_share_of_runs_of_four_that_were_there_before(tokens, expected) -> None:
    assert repetition(tokens) == pytest.approx(expected)


def test_a_k_above_the_responses_is_refused() -> None:
    with pytest.raises(UserError, match="k: expected 1 to 2, the responses to a prompt, got 3"):
        measure([[answer(True), answer(False)]], ks=[1, 3], seed=0)
    with pytest.raises(UserError, match="at least one prompt"):
        estimate([], seed=0)


def test_the_interval_of_95_percent_holds_the_truth_in_93_to_97_percent_of_evaluations() -> None:
    """Prompts of different difficulty, 8 responses to each: one over responses would be too narrow."""
    generator = np.random.default_rng(0)
    held, too_narrow, num = 0, 0, 600
    for number in range(num):
        difficulty = generator.beta(0.6, 0.9, size=100)
        right = generator.random((100, 8)) < difficulty[:, None]
        found = estimate(right.mean(axis=1).tolist(), seed=number)
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 0.6 / 1.5 <= found.high
        error = 1.96 * math.sqrt(right.mean() * (1 - right.mean()) / right.size)
        too_narrow += abs(right.mean() - 0.6 / 1.5) <= error
    assert 0.93 <= held / num <= 0.97
    assert too_narrow / num < 0.8


def test_the_interval_is_the_same_for_the_same_seed_and_absent_of_one_prompt() -> None:
    values = [0.0, 0.25, 1.0, 0.5]
    assert estimate(values, seed=3) == estimate(values, seed=3)
    one = estimate([0.5], seed=0)
    assert (one.value, one.low, one.high, one.num_prompts) == (0.5, None, None, 1)


def test_the_likelihood_of_demonstrations_counts_tokens_or_sequences() -> None:
    found = measure_demonstrations([[-1.0, -2.0, -3.0], [-4.0]], seed=0)
    assert found["nll/token"].value == pytest.approx(10 / 4)
    assert found["nll/sequence"].value == pytest.approx(5.0)
    assert (found["nll/token"].low, found["nll/token"].high) == pytest.approx((2.0, 4.0))
    assert "kl_to_base" not in found
    found = measure_demonstrations([[-1.0, -2.0, -3.0], [-4.0]], [[0.1, 0.2, 0.3], [1.0]], seed=0)
    assert found["kl_to_base"].value == pytest.approx(1.6 / 4)
