"""What tells of a run that learns nothing, and ends one that goes on so or whose gradients are not finite."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence

from megatron_sftrl.engine.objective import StepReport
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


@contextlib.contextmanager
def named_step(step: int) -> Iterator[None]:
    """A step in which the policy's own numbers are not finite ends the run by that name.

    Not as an error of the user: a device may have failed, and a restart goes on from the last checkpoint.

    Args:
        step: the one under way, from 1.
    Raises:
        RuntimeError: where the block raises a FloatingPointError.
    """
    try:
        yield
    except FloatingPointError as error:
        raise RuntimeError(
            f"step {step}: {error}: the policy has diverged, and nothing was trained on it. If this happens "
            "again from the last checkpoint, go back to an earlier one and lower optim.lr"
        ) from error


def tell_skipped(num_skipped: int, *, step: int, suspects: Sequence[str]) -> None:
    """Say on rank 0 that updates of a step were left out.

    Args:
        num_skipped: in this step.
        step: steps done.
        suspects: as for stop_on_nonfinite_streak.
    """
    if num_skipped and int(os.environ.get("RANK", "0")) == 0:
        print(
            f"step {step}: the loss or the gradient was NaN or infinite, and {num_skipped} of its updates "
            f"moved no weight (skipped_steps counts them all); its samples: {_named(suspects)}",
            file=sys.stderr,
            flush=True,
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
    raise UserError(
        f"{streak} steps in a row had a non-finite gradient, the last of them step {step}; its samples: "
        f"{_named(suspects)}. Their updates were skipped; the last checkpoint in {directory} is from before "
        "or within the streak. Look at these samples, lower optim.lr, or raise train.max_nonfinite_steps"
    )


def stop_on_idle_streak(streak: int, *, limit: int, step: int, numbers: Mapping[str, float]) -> None:
    """End the run when its last `limit` steps had nothing to learn from.

    Args:
        streak: consecutive steps, up to now, without an update.
        limit: filters.max_idle_steps.
        step: steps done.
        numbers: of the last step.
    Raises:
        UserError: the streak has reached the limit.
    """
    if streak < limit:
        return
    equal, unknown = numbers.get("reward/zero_variance_groups", 0.0), numbers["reward/unscored"]
    mean = f", mean reward {numbers['reward/mean']:.4g}" if "reward/mean" in numbers else ""
    raise UserError(
        f"{streak} steps in a row had nothing to learn from, the last of them step {step}: "
        f"{numbers['rollout/prompts']:.0f} groups{mean}, equal rewards in {equal:.0%} of them; "
        f"{unknown:.0%} of the responses could not be judged, {numbers['rollout/truncated']:.0%} have no end "
        "token. See rollouts.jsonl: correct the reward or the format that prompts ask for, take easier or "
        "harder prompts or more responses to each (rollout.group_size), or raise filters.max_idle_steps"
    )


def _named(suspects: Sequence[str]) -> str:
    more = f" and {len(suspects) - _NAMED_AT_MOST} more" if len(suspects) > _NAMED_AT_MOST else ""
    return ", ".join(suspects[:_NAMED_AT_MOST]) + more
