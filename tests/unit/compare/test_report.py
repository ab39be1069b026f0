"""What the report says in words: claims where they are due, and none of one seed."""

from __future__ import annotations

from megatron_sftrl.apps.compare.report import words
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
