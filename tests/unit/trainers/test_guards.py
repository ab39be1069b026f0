"""What is told of an update that trained nothing."""

from __future__ import annotations

import pytest

from megatron_sftrl.engine.objective import StepReport
from megatron_sftrl.trainers.guards import no_gradient_warning


@pytest.mark.parametrize(
    ("is_trained", "grad_norm", "told"),
    [
        (True, 1e-30, None),
        (True, float("nan"), None),
        (True, 0.0, "loss 'mine' trains nothing: its gradient is exactly 0"),
        # A load-balancing loss gives a gradient of its own.
        (False, 0.3, "loss 'mine' trains nothing: its token_loss has no gradient"),
    ],
)
def test_an_update_without_a_gradient_from_the_loss_is_told(
    is_trained: bool, grad_norm: float, told: str | None
) -> None:
    report = StepReport(weight=1.0, loss=1.0, metrics={}, nonfinite_microbatches=(), is_trained=is_trained)
    warning = no_gradient_warning(report, grad_norm=grad_norm, loss_name="mine")
    assert (warning is None) == (told is None)
    assert told is None or (warning is not None and warning.startswith(told))
