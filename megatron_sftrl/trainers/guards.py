"""What tells of a run that learns nothing, and ends one whose gradients are not finite any more."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_sftrl.engine.reports import StepReport
from megatron_sftrl.errors import UserError

_NAMED_AT_MOST = 16


def no_gradient_warning(report: StepReport, *, grad_norm: float, loss_name: str) -> str | None:
    """What to tell of the first update of a process, when it trained nothing; None when it trained.

    Args:
        report: of the update, whose samples carry loss (and an advantage, where losses use advantages).
        grad_norm: of all parameters; exactly 0 where no gradient arrived.
        loss_name: as registered.
    """
    if report.is_trained and grad_norm != 0:
        return None
    reason = "its gradient is exactly 0" if report.is_trained else "its token_loss has no gradient"
    return (
        f"loss {loss_name!r} trains nothing: {reason} in the first update. Does it call .detach() or "
        ".item() on what it returns, or is every token's weight 0?"
    )


def stop_on_nonfinite_streak(
    streak: int, *, limit: int, step: int, suspects: Sequence[str], directory: str
) -> None:
    """End the run when its last `limit` steps were all skipped, and name the samples.

    Args:
        streak: consecutive steps, up to now, whose gradient norm was NaN or infinite.
        limit: train.max_nonfinite_steps.
        step: optimizer steps done.
        suspects: where the samples come from whose loss was not finite; all of the step's when only the
            gradient was.
        directory: where the last checkpoint lies.
    Raises:
        UserError: the streak has reached the limit.
    """
    if streak < limit:
        return
    named = ", ".join(suspects[:_NAMED_AT_MOST])
    more = f" and {len(suspects) - _NAMED_AT_MOST} more" if len(suspects) > _NAMED_AT_MOST else ""
    raise UserError(
        f"{streak} steps in a row had a non-finite gradient, the last of them step {step}; its samples: "
        f"{named}{more}. Their updates were skipped; the last checkpoint in {directory} is from before or "
        "within the streak. Look at these samples, lower optim.lr, or raise train.max_nonfinite_steps"
    )
