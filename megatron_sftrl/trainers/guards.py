"""What ends a run that has stopped learning: a streak of steps whose gradients are not finite."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_sftrl.errors import UserError

_NAMED_AT_MOST = 16


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
