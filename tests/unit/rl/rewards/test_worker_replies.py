"""What a worker answers for what a reward returned."""

from __future__ import annotations

import pytest

from megatron_sftrl.errors import UserError
from megatron_sftrl.rl.rewards.registry import RewardOutput
from megatron_sftrl.rl.rewards.worker import _reply


@pytest.mark.parametrize("name", ["lenient", "timeout", "crashed", "error", "nonfinite"])
def test_a_metric_does_not_take_the_name_of_a_number_that_every_reward_has(name: str) -> None:
    """reward/NAME/timeout counts samples; a metric of that name would stand in its place, or be lost."""
    with pytest.raises(UserError, match=f"metric '{name}' is a number that every reward has"):
        _reply(RewardOutput(reward=1.0, metrics={"solved": 1.0, name: 2.0}))
    assert _reply(RewardOutput(reward=1.0, metrics={"solved": 1.0}))["outcome"] == "ok"


def test_metrics_that_are_no_dictionary_are_refused_with_what_they_are() -> None:
    with pytest.raises(UserError, match="expected metrics to be numbers by name, got float"):
        _reply(RewardOutput(reward=1.0, metrics=0.5))  # type: ignore[arg-type]
