"""Gates: when a limit counts as crossed, and for how long."""

from __future__ import annotations

import math

import pytest

from megatron_sftrl.config.gates import GRPO_GATES, GateSection
from megatron_sftrl.errors import UserError
from megatron_sftrl.losses.registry import build_loss
from megatron_sftrl.trainers.guards import Gates


def stopped_steps(gate: GateSection, values: list[float]) -> list[int]:
    gates = Gates([gate])
    numbers = [{gate.metric: value} for value in values]
    return [
        step
        for step, metrics in enumerate(numbers, 1)
        if any(crossing.stops for crossing in gates.check(step, metrics, is_whole=True))
    ]


@pytest.mark.parametrize(
    ("limit", "expected"),
    [({"below": 0.5}, [2, 5]), ({"above": 0.5}, [1, 4]), ({"below": 0.1}, [5]), ({"above": 2.0}, [])],
)
def test_a_limit_itself_does_not_cross(limit: dict[str, float], expected: list[int]) -> None:
    gate = GateSection(metric="entropy", action="stop", **limit)  # type: ignore[arg-type]
    assert stopped_steps(gate, [1.0, 0.1, 0.5, 2.0, 0.0]) == expected


def test_steps_count_in_a_row_and_a_good_one_starts_the_count_again() -> None:
    gate = GateSection(metric="entropy", below=1.0, steps=3, action="stop")
    bad, good = 0.0, 2.0
    assert stopped_steps(gate, [bad, bad, good, bad, bad, bad, bad, good]) == [6, 7]


@pytest.mark.parametrize("limit", [{"below": -math.inf}, {"above": math.inf}])
def test_nan_crosses_whatever_the_limit(limit: dict[str, float]) -> None:
    gate = GateSection(metric="loss", action="stop", **limit)  # type: ignore[arg-type]
    assert stopped_steps(gate, [1e30, math.nan, -1e30]) == [2]


def test_a_crossing_says_step_value_and_limit_and_a_warning_does_not_stop() -> None:
    gates = Gates([GateSection(metric="entropy", below=0.05), GateSection(metric="reward", above=1.0)])
    (crossing,) = gates.check(7, {"entropy": 0.012345678, "reward": 1.0}, is_whole=True)
    assert crossing.text == "step 7: entropy = 0.0123457 is below 0.05, 1 step(s) in a row"
    assert not crossing.stops


def test_a_metric_that_a_step_without_update_lacks_neither_counts_nor_clears() -> None:
    gates = Gates([GateSection(metric="loss", above=1.0, steps=2)])
    assert gates.check(1, {"loss": 2.0}, is_whole=True) == []
    assert gates.check(2, {"reward": 0.0}, is_whole=False) == []
    assert len(gates.check(3, {"loss": 2.0}, is_whole=True)) == 1


def test_an_unknown_metric_is_refused_with_the_one_that_was_meant() -> None:
    gates = Gates([GateSection(metric="entropi", below=1.0)])
    with pytest.raises(
        ValueError, match=r"no metric 'entropi' \(did you mean 'entropy'\?\).* entropy, loss$"
    ):
        gates.check(1, {"loss": 1.0, "entropy": 2.0}, is_whole=True)


def test_a_held_out_metric_waits_for_an_evaluation_and_is_known_before() -> None:
    gate = GateSection(metric="valid/reward/mean", below=1.0)
    gates = Gates([gate], held_out=("valid/reward/mean",))
    assert gates.check(1, {"loss": 1.0}, is_whole=True) == []
    assert len(gates.check(2, {"loss": 1.0, "valid/reward/mean": 0.0}, is_whole=True)) == 1
    with pytest.raises(ValueError, match=r"held-out metrics need data\.valid"):
        Gates([gate])
    with pytest.raises(ValueError, match="held-out metrics are valid/loss"):
        Gates([gate], held_out=("valid/loss",))


def test_a_metric_that_a_whole_step_may_lack_is_waited_for() -> None:
    """pass@G of a step in which every group has a response that no verifier could judge."""
    gate = GateSection(metric="reward/pass_at_8", below=0.5)
    gates = Gates([gate], sometimes=("reward/pass_at_8",))
    assert gates.check(1, {"loss": 1.0}, is_whole=True) == []
    assert len(gates.check(2, {"loss": 1.0, "reward/pass_at_8": 0.0}, is_whole=True)) == 1


def test_gates_of_a_loss_warn_after_ever_longer_streaks_and_give_way_to_the_runs_own() -> None:
    default = GateSection(metric="share", above=0.5)
    gates = Gates([], defaults=[default])
    told = [step for step in range(1, 20) if gates.check(step, {"share": 0.6}, is_whole=True)]
    assert told == [1, 2, 4, 8, 16]
    own = Gates([GateSection(metric="share", above=0.9)], defaults=[default])
    assert not own.check(1, {"share": 0.6}, is_whole=True)


def test_where_held_out_metrics_are_those_of_a_step_an_unknown_one_is_refused_in_the_first() -> None:
    step, evaluated = {"loss": 1.0, "lr": 1.0}, {"loss": 1.0, "lr": 1.0, "valid/loss": 2.0}
    gates = Gates([GateSection(metric="valid/loss", above=1.0)], held_out=None)
    assert not gates.check(1, step, is_whole=True)
    assert gates.check(2, evaluated, is_whole=True)
    with pytest.raises(UserError, match="no metric 'valid/los' "):
        Gates([GateSection(metric="valid/los", above=1.0)], held_out=None).check(1, evaluated, is_whole=True)
    with pytest.raises(UserError, match="no metric 'valid/lossy'"):
        Gates([GateSection(metric="valid/lossy", above=1.0)], held_out=None).check(1, step, is_whole=True)
    with pytest.raises(UserError, match="no metric 'valid/lr'"):
        Gates([GateSection(metric="valid/lr", above=1.0)], held_out=None).check(2, evaluated, is_whole=True)


def test_pear_warns_of_shares_of_its_weights_at_their_bounds() -> None:
    pear, plain = build_loss("pear"), build_loss("sft")
    gates = Gates([], defaults=pear.config.default_gates())
    healthy = {"pear/log_weight_at_floor": 0.1, "pear/log_weight_at_ceiling": 0.0}
    assert not gates.check(1, healthy, is_whole=True)
    for name in healthy:
        (crossing,) = gates.check(2, {**healthy, name: 0.6}, is_whole=True)
        assert name in crossing.text
        assert not crossing.stops
    assert plain.config.default_gates() == ()


FALL = GateSection(metric="entropy", falls_by=0.5, between=(3, 6), action="stop")


def test_a_fall_is_measured_from_the_first_step_of_its_range_to_the_last() -> None:
    assert stopped_steps(FALL, [9.0, 8.0, 2.0, 1.0, 0.999, 3.0, 0.0]) == [5]
    # Without a finite number there the next one is the start; what is NaN is crossed.
    assert stopped_steps(FALL, [9.0, 8.0, math.nan, 2.0, 1.1, 0.9]) == [3, 6]
    (crossing,) = (gates := Gates([FALL])).check(3, {"entropy": 2.0}, is_whole=True) or gates.check(
        4, {"entropy": 0.5}, is_whole=True
    )
    assert "entropy = 0.5 is more than 50% below 2, its value at step 3" in crossing.text


def test_a_resumed_run_compares_with_the_value_from_before() -> None:
    before, after = Gates([FALL]), Gates([FALL])
    before.check(3, {"entropy": 2.0}, is_whole=True)
    after.starts = dict(before.starts)
    assert after.starts == {"entropy@3": [3, 2.0]}
    assert after.check(5, {"entropy": 0.9}, is_whole=True)
    assert not Gates([FALL]).check(5, {"entropy": 0.9}, is_whole=True)


def test_a_gate_looks_in_its_range_only_and_a_streak_ends_there() -> None:
    gate = GateSection(metric="entropy", below=1.0, between=(2, 3), action="stop")
    assert stopped_steps(gate, [0.0, 0.0, 0.0, 0.0]) == [2, 3]


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"falls_by": 0.5}, "falls_by is of the value at a step"),
        ({"falls_by": 0.5, "below": 1.0, "between": (1, 2)}, "exactly one of below, above and falls_by"),
        ({"below": 0.5, "between": (5, 2)}, "expected first <= last"),
        ({"falls_by": 1.5, "between": (1, 2)}, "less than 1"),
    ],
)
def test_a_gate_that_says_too_little_or_too_much_is_refused(limits: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GateSection(metric="entropy", **limits)


def test_a_run_of_grpo_is_asked_what_a_hand_off_asks() -> None:
    healthy = {
        "entropy": 0.3,
        "reward/zero_variance_groups": 0.5,
        "rollout/truncated": 0.05,
        "reward/format_loss": 0.0,
        "rollout/entropy_top_fifth": 1.0,
    }
    bad = {
        "entropy": 0.17,
        "reward/zero_variance_groups": 0.9,
        "rollout/truncated": 0.2,
        "reward/format_loss": 0.2,
        "rollout/entropy_top_fifth": 0.4,
    }
    assert {gate.metric for gate in GRPO_GATES} == set(healthy)
    quiet = Gates([], defaults=GRPO_GATES)
    assert not [told for step in range(1, 200) for told in quiet.check(step, healthy, is_whole=True)]
    for name, value in bad.items():
        gates = Gates([], defaults=GRPO_GATES)
        told = [
            crossing
            for step in range(1, 200)
            for crossing in gates.check(
                step,
                {**healthy, name: 1.0 if name.endswith("top_fifth") and step < 100 else value},
                is_whole=True,
            )
        ]
        assert told
        assert all(name in crossing.text and not crossing.stops for crossing in told)
