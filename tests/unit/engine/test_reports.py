"""Several steps reported as one."""

from __future__ import annotations

import pytest

from megatron_sftrl.engine.reports import StepReport, combine_reports


def test_losses_add_up_and_metrics_are_averaged_with_their_weights() -> None:
    """Of constant_length the weights of two mini-batches differ: their tokens count alike all the same."""
    parts = [
        StepReport(weight=weight, loss=loss, metrics={"entropy": entropy}, nonfinite_microbatches=())
        for weight, loss, entropy in ((0.25, 0.5, 2.0), (0.75, -1.0, 1.0))
    ]
    whole = combine_reports(parts)
    assert (whole.weight, whole.loss) == (1.0, -0.5)
    assert whole.metrics["entropy"] == pytest.approx(1.25)
