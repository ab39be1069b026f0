"""What ends a run that has stopped learning: a streak of steps whose gradients are not finite."""

from __future__ import annotations

from collections.abc import Sequence


class NonFiniteGuard:
    """Counts skipped steps; a streak of `limit` of them stops the run and names the samples.

    Args:
        limit: train.max_nonfinite_steps.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._streak = 0

    def check(self, step: int, *, is_skipped: bool, suspects: Sequence[str]) -> None:
        """Take note of a step.

        Args:
            step: 0-based.
            is_skipped: the gradient norm was NaN or infinite.
            suspects: where the samples come from whose loss was not finite; all of the step's when only
                the gradient was.
        Raises:
            RuntimeError: the streak is full.
        """
        self._streak = self._streak + 1 if is_skipped else 0
        if self._streak >= self._limit:
            raise RuntimeError(
                f"{self._streak} steps in a row had a non-finite gradient, the last at step {step}; "
                f"the samples of that step: {', '.join(suspects)}. No checkpoint was written since: look at "
                "these samples, lower optim.lr, or raise train.max_nonfinite_steps"
            )
