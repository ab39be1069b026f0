"""The run's list of rewards: what it must say, whatever the rewards are."""

from __future__ import annotations

import pytest
from pydantic import BaseModel, ValidationError

from megatron_sftrl.config.rewards import RewardList, RewardSection, RewardWorkersSection


class Run(BaseModel):
    rewards: RewardList


def read(*rewards: dict) -> list[RewardSection]:
    return Run.model_validate({"rewards": list(rewards)}).rewards


def test_keys_of_its_own_are_the_reward_s_options() -> None:
    (section,) = read({"name": "length", "weight": 0.1, "max_tokens": 8, "cache": 2})
    assert (section.name, section.weight) == ("length", 0.1)
    assert section.options == {"max_tokens": 8, "cache": 2}


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ([], r"expected at least one, got an empty list; add one"),
        ([{"name": "math"}, {"name": "math"}], r"expected each name once, got 'math' twice"),
        ([{"name": "mean"}], r"'mean' would be written as reward/mean, among .* every step writes"),
        ([{"name": "pass_at_8"}], r"written as reward/pass_at_8, among .* every step writes"),
        ([{"name": "a"}, {"name": "a/timeout"}], r"reward/a/timeout, among .* 'a' writes under its own name"),
        (
            [{"name": "math", "weight": 0}, {"name": "format", "weight": 0}],
            r"every weight is 0.*of math, format",
        ),
        ([{"name": "math", "weight": float("nan")}], r"finite number"),
        ([{"name": "math", "weight": 1e308}], r"less than or equal to 1000000000000000"),
        ([{"weight": 1.0}], r"name\n  Field required"),
    ],
)
def test_a_list_that_trains_nothing_or_cannot_be_told_apart_is_refused(
    rewards: list[dict], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        read(*rewards)


@pytest.mark.parametrize("wrong", [{"num_workers": 0}, {"seconds": 0}, {"memory_gb": 0.1}, {"timeout": 3}])
def test_limits_outside_of_their_range_are_refused(wrong: dict) -> None:
    with pytest.raises(ValidationError):
        RewardWorkersSection.model_validate(wrong)
