"""What the report says in words: claims where they are due, and none of one seed."""

from __future__ import annotations

from dataclasses import replace

from megatron_sftrl.apps.compare.report import _share, _tables, words
from megatron_sftrl.apps.compare.results import ArmResult, Difference, Results
from megatron_sftrl.apps.compare.statistics import Mean


def results(num_seeds: int, p_holm: float, value: float = 0.1) -> Results:
    mean = Mean(value=value, low=value - 0.04, high=value + 0.04, num_seeds=num_seeds, num_prompts=50)
    arm = ArmResult(seeds=list(range(num_seeds)), numbers={}, curves={}, failures={}, missing=[])
    return Results(
        seeds=list(range(num_seeds)),
        arms={"sft": arm, "gift": arm},
        differences=[Difference(arm="gift", side="grpo", mean=mean, p=p_holm / 2, p_holm=p_holm)],
        correlations={},
    )


def test_a_difference_is_claimed_below_the_corrected_five_percent_alone() -> None:
    better, noise = words(results(3, 0.04))
    assert (
        better
        == "gift after RL: +10.0 points against sft (95 %, +6.0 to +14.0; p = 0.04 after Holm): "
        + ("better, significantly.")
    )
    assert noise.startswith(
        "With 3 seeds and 50 prompts a difference after RL under 4.0 points cannot be told"
    )
    assert "worse, significantly" in next(words(results(3, 0.01, value=-0.1)))
    assert "cannot be told from sft" in next(words(results(3, 0.06)))


def test_one_seed_claims_nothing_however_small_p_is() -> None:
    told = list(words(results(1, 1e-9)))
    assert len(told) == 1
    assert told[0].startswith("One seed: every interval is over prompts alone.")
    assert not results(1, 1e-9).differences[0].is_significant


def test_failures_and_what_is_missing_are_told() -> None:
    whole = results(3, 0.5)
    failed = ArmResult(
        seeds=[],
        numbers={},
        curves={},
        failures={"gift/seed-0/sft": "no memory"},
        missing=["gift/seed-0/grpo"],
    )
    told = list(words(Results(seeds=[0], arms={"gift": failed}, differences=[], correlations={})))
    assert told[0].startswith("No run has both of its evaluations yet")
    assert told[1:] == [
        "gift/seed-0/sft failed: no memory",
        "gift: 1 stages are not done, the first of them gift/seed-0/grpo.",
    ]
    assert not any("failed" in each for each in words(whole))


def test_seeds_that_failed_and_responses_without_a_verdict_are_told() -> None:
    """Both are left out of the means, which then may be better than the arm is."""
    whole = results(3, 0.5)
    share = Mean(value=0.25, low=0.1, high=0.4, num_seeds=2, num_prompts=50)
    lame = replace(
        whole.arms["gift"],
        seeds=[0, 2],
        numbers={"grpo": {"unjudged": share}},
        failures={"gift/seed-1/grpo": "no gradient"},
    )
    told = list(words(replace(whole, arms={"sft": whole.arms["sft"], "gift": lame})))[2:]
    assert told[0].startswith("gift: its means are over the seeds 0, 2 alone. If the others failed")
    assert told[1].startswith("gift after RL: 25.0 points of the responses could not be judged")
    assert len(told) == 3


def test_equal_arms_have_no_limit_of_noise() -> None:
    whole = results(2, 1.0)
    same = Mean(value=0.0, low=None, high=None, num_seeds=2, num_prompts=50)
    equal = replace(whole, differences=[replace(whole.differences[0], mean=same)])
    (told,) = words(equal)
    assert told.startswith(
        "gift after RL: +0.0 points against sft (the same for all; p = 1 after Holm): cannot"
    )


def test_the_page_says_how_often_luck_orders_the_arms() -> None:
    whole = results(3, 0.5)
    arms = {name: whole.arms["sft"] for name in ("sft", "gift", "pear", "dft")}
    *_, table = _tables(replace(whole, arms=arms, correlations={"entropy": None, "accuracy": None}))
    assert "puts 4 arms into their order, or its reverse, in 1 of 12 cases, and 2 numbers" in table.note
    *_, table = _tables(whole)
    assert "in 1 of" not in table.note


def test_an_interval_of_a_share_stays_between_0_and_100() -> None:
    assert _share(Mean(value=0.75, low=-2.4, high=3.9, num_seeds=2, num_prompts=10)) == "75.0 [0.0, 100.0]"
    assert _share(Mean(value=1.0, low=None, high=None, num_seeds=2, num_prompts=10)) == "100.0"
