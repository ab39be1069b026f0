"""Advantages against their equations, and the groups on which peers produced noise, NaN or nothing."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_sftrl.rl.advantages import group_advantages

ESTIMATORS = ["group_normalized", "dr_grpo", "leave_one_out"]
GROUPS = {"a": [1.0, 0.0, 0.0, 0.0], "b": [0.3, -1.2, 2.5], "c": [0.1, 0.7]}


def test_each_estimator_equals_its_equation_over_groups_of_unequal_size():
    for name, rewards in GROUPS.items():
        r = torch.tensor(rewards, dtype=torch.float64)
        others = torch.stack([torch.cat([r[:i], r[i + 1 :]]).mean() for i in range(len(r))])
        for estimator, truth in (
            ("group_normalized", (r - r.mean()) / (r.std() + 1e-6)),  # torch.std divides by n - 1
            ("dr_grpo", r - r.mean()),
            ("leave_one_out", r - others),
        ):
            found = torch.tensor(group_advantages(GROUPS, estimator)[name], dtype=torch.float64)
            torch.testing.assert_close(found, truth, rtol=1e-13, atol=1e-15)  # float64 rounding


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1 / 3, -0.7, 1e-8, 1e6 + 0.1])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 16])
def test_equal_rewards_give_exactly_zero(estimator: str, reward: float, size: int):
    single = torch.tensor(reward, dtype=torch.float32).item()  # as a reward that passed through fp32
    for value in (reward, single):
        assert group_advantages({0: [value] * size}, estimator) == {0: [0.0] * size}


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_only_success_of_a_group_is_what_is_reinforced(estimator: str):
    advantages = group_advantages({"p": [1.0, 0.0, 0.0, 0.0]}, estimator)["p"]
    assert advantages[0] > 0
    assert all(value < 0 for value in advantages[1:])
    assert math.fsum(advantages) == pytest.approx(0, abs=1e-12)  # float64 rounding


def test_normalized_advantages_do_not_depend_on_the_unit_of_the_reward():
    small, large = [0.2, 0.9, 0.4], [200.0, 900.0, 400.0]
    found = group_advantages({"s": small, "l": large}, "group_normalized")
    assert found["s"] == pytest.approx(found["l"], rel=1e-5)  # 1e-6 beside a std of 0.36


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_order_of_groups_and_of_responses_changes_nothing(estimator: str):
    forward = group_advantages(GROUPS, estimator)
    backward = group_advantages({k: GROUPS[k][::-1] for k in reversed(GROUPS)}, estimator)
    assert {k: v[::-1] for k, v in backward.items()} == forward  # exact sums do not depend on the order


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({}, "expected at least one group of responses, got none"),
        ({"p7": [1.0], "p8": []}, "group 'p8' has no responses"),
        ({"p7": [1.0, math.nan]}, "group 'p7', sample 1: expected a finite reward .*, got nan"),
        (
            {"p": [0.0, 1e308]},
            "group 'p', sample 1: expected a finite reward of at most 1e\\+32 in",
        ),
        ({3: [math.inf, 0.0]}, "group 3, sample 0: expected a finite reward .*, got inf"),
    ],
)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_what_cannot_be_compared_is_refused_by_its_place(groups: dict, message: str, estimator: str):
    with pytest.raises(ValueError, match=message):
        group_advantages(groups, estimator)


def test_an_unknown_estimator_is_refused_with_the_known_ones():
    with pytest.raises(
        ValueError, match="expected one of group_normalized, dr_grpo, leave_one_out, got 'gae'"
    ):
        group_advantages(GROUPS, "gae")  # type: ignore[arg-type]
