"""Several steps reported as one."""

from __future__ import annotations

import pytest

from megatron_sftrl.engine.objective import StepReport, combine_reports
from megatron_sftrl.errors import UserError


def test_losses_add_up_and_metrics_are_averaged_with_their_weights() -> None:
    """Of constant_length the weights of two mini-batches differ: their tokens count alike all the same."""
    parts = [
        StepReport(weight=weight, loss=loss, metrics={"entropy": entropy}, nonfinite_microbatches=())
        for weight, loss, entropy in ((0.25, 0.5, 2.0), (0.75, -1.0, 1.0))
    ]
    whole = combine_reports(parts, loss_name="grpo")
    assert (whole.weight, whole.loss) == (1.0, -0.5)
    assert whole.metrics["entropy"] == pytest.approx(1.25)


def test_a_metric_that_some_mini_batches_lack_has_no_average() -> None:
    parts = [
        StepReport(weight=0.5, loss=1.0, metrics={"entropy": 1.0, **more}, nonfinite_microbatches=())
        for more in ({"mine/a": 1.0}, {}, {"mine/a": 3.0})
    ]
    told = "loss 'mine': metric 'mine/a' is given for mini-batch 0, mini-batch 2, and not for mini-batch 1"
    with pytest.raises(UserError, match=told):
        combine_reports(parts, loss_name="mine")
