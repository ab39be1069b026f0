"""What tells of a run that learns nothing, and ends one that goes on so or whose gradients are not finite."""

from __future__ import annotations

import contextlib
import difflib
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_sftrl.config.gates import GateSection
from megatron_sftrl.engine.objective import StepReport
from megatron_sftrl.errors import UserError

LOGGER = logging.getLogger(__name__)

_NAMED_AT_MOST = 16


def no_gradient_warning(report: StepReport, *, grad_norm: float, loss_name: str) -> str | None:
    """What to tell of the first update of a process, when it trained nothing; None when it trained.

    Args:
        report: of the update, whose samples carry loss (and an advantage, where losses use advantages).
        grad_norm: of all parameters; exactly 0 where no gradient arrived.
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
    """A step (from 1) in which the policy's own numbers are not finite ends the run by that name.

    Not as an error of the user: a device may have failed, and a restart goes on from the last checkpoint.

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
    """Say on rank 0 that updates were left out; `suspects` as for stop_on_nonfinite_streak."""
    if num_skipped and int(os.environ.get("RANK", "0")) == 0:
        LOGGER.warning(
            "step %d: the loss or the gradient was NaN or infinite, and %d of its updates moved no weight "
            "(skipped_steps counts them all); its samples: %s",
            step,
            num_skipped,
            _named(suspects),
        )


def stop_on_nonfinite_streak(
    streak: int, *, limit: int, step: int, suspects: Sequence[str], directory: str
) -> None:
    """Raise UserError when the last `limit` (train.max_nonfinite_steps) steps were all skipped.

    Args:
        streak: consecutive steps, up to now, whose gradient norm was NaN or infinite.
        step: optimizer steps done.
        suspects: where the samples come from whose loss was not finite; all of the step's when only the
            gradient was.
        directory: where the last checkpoint lies.
    """
    if streak < limit:
        return
    raise UserError(
        f"{streak} steps in a row had a non-finite gradient, the last of them step {step}; its samples: "
        f"{_named(suspects)}. Their updates were skipped; the last checkpoint in {directory} is from before "
        "or within the streak. Look at these samples, lower optim.lr, or raise train.max_nonfinite_steps"
    )


def stop_on_idle_streak(streak: int, *, limit: int, step: int, numbers: Mapping[str, float]) -> None:
    """Raise UserError when the last `limit` steps (filters.max_idle_steps) had nothing to learn from.

    Args:
        streak: consecutive steps, up to now, without an update.
        numbers: of the last step.
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


# Limits on what a step measured: crossed for long enough, a gate warns or ends the run.


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossing:
    """A gate that has been crossed for its number of steps, in words; `stops`: it ends the run."""

    text: str
    stops: bool


class Gates:
    """Counts for how many steps in a row each gate has been crossed; a resumed run starts at 0.

    `starts` has [step, value] of each metric that a gate compares with an earlier step, by `metric@first`; a
    resumed run brings it along.

    Args:
        defaults: of the run's loss; those on a metric that the run has a gate on are left out. They warn
            after 1, 2, 4, 8, ... times their steps.
        held_out: metrics of an evaluation, which only some steps have; None where they are those of a step,
            under valid/.
        sometimes: further metrics, or families of them (with their slash), that a whole step may lack.
    Raises:
        UserError: a gate on a held-out metric that no evaluation has.
    """

    def __init__(
        self,
        sections: Sequence[GateSection],
        *,
        defaults: Sequence[GateSection] = (),
        held_out: Sequence[str] | None = (),
        sometimes: Sequence[str] = (),
    ) -> None:
        written = {gate.metric for gate in sections}
        self._sections = (*sections, *(gate for gate in defaults if gate.metric not in written))
        self._num_written = len(sections)
        self._sometimes = tuple(sometimes)
        self._held_out = None if held_out is None else frozenset(held_out)
        for gate in self._sections:
            if held_out is None:
                break
            if gate.metric.startswith("valid/") and gate.metric not in held_out:
                known = f"are {', '.join(held_out)}" if held_out else "need data.valid"
                raise UserError(f"gates: there is no metric {gate.metric!r}; held-out metrics {known}")
        self._streaks = [0] * len(self._sections)
        self.starts: dict[str, list[float]] = {}

    def check(self, step: int, metrics: Mapping[str, float], *, is_whole: bool) -> list[Crossing]:
        """Look at one step's numbers; a number that is NaN crosses every gate on it.

        Args:
            is_whole: the policy was updated, so that every metric of training is there. A gate on one that is
                not there waits for a step that has it.
        Raises:
            UserError: a gate on a metric that a whole step does not have, with those it has.
        """
        crossed = []
        for index, gate in enumerate(self._sections):
            if gate.metric not in metrics:
                if is_whole and not self._may_come(gate.metric, metrics):
                    raise UserError(_unknown(gate.metric, metrics))
                continue
            value = metrics[gate.metric]
            if gate.between is not None and not gate.between[0] <= step <= gate.between[1]:
                self._streaks[index] = 0
                continue
            limit = self._crossed_limit(gate, step, value)
            self._streaks[index] = self._streaks[index] + 1 if limit else 0
            if self._is_told(index, gate):
                crossed.append(
                    Crossing(
                        text=f"step {step}: {gate.metric} = {value:.6g} is {limit}, "
                        f"{self._streaks[index]} step(s) in a row",
                        stops=gate.action == "stop",
                    )
                )
        return crossed

    def _crossed_limit(self, gate: GateSection, step: int, value: float) -> str:
        """What the value is beyond, in words; empty where it keeps the limit."""
        if gate.below is not None:
            return "" if value >= gate.below else f"below {gate.below}"
        if gate.above is not None:
            return "" if value <= gate.above else f"above {gate.above}"
        assert gate.falls_by is not None and gate.between is not None
        name = f"{gate.metric}@{gate.between[0]}"
        if name not in self.starts and math.isfinite(value):
            self.starts[name] = [step, value]
        if name not in self.starts:
            return "not finite"
        first, start = self.starts[name]
        lowest = start - gate.falls_by * abs(start)
        if value >= lowest:
            return ""
        return f"more than {gate.falls_by:.0%} below {start:.6g}, its value at step {first:.0f}"

    def _is_told(self, index: int, gate: GateSection) -> bool:
        times, rest = divmod(self._streaks[index], gate.steps)
        if index < self._num_written:
            return times > 0
        # A user did not ask for it: a line in every step of a long run would hide the rest.
        return rest == 0 and times.bit_count() == 1

    def _may_come(self, name: str, metrics: Mapping[str, float]) -> bool:
        """A metric that this step lacks is one of an evaluation, or one that a step may lack."""
        if name in self._sometimes or f"{name.partition('/')[0]}/" in self._sometimes:
            return True
        if self._held_out is not None:
            return name in self._held_out
        is_evaluated = any(each.startswith("valid/") for each in metrics)
        return name.startswith("valid/") and not is_evaluated and name.removeprefix("valid/") in metrics


def tell(crossings: Sequence[Crossing]) -> None:
    """A warning for each; rank 0 only."""
    for crossing in crossings:
        LOGGER.warning("gate: %s", crossing.text)


def stop_at(crossings: Sequence[Crossing]) -> None:
    """Raise UserError with what happened, after the checkpoint is saved, where a gate ends the run."""
    if texts := [crossing.text for crossing in crossings if crossing.stops]:
        raise UserError(f"a gate ended the run, its checkpoint is saved: {'; '.join(texts)}")


def _unknown(name: str, metrics: Mapping[str, float]) -> str:
    near = difflib.get_close_matches(name, list(metrics), n=1)
    meant = f" (did you mean {near[0]!r}?)" if near else ""
    return f"gates: there is no metric {name!r}{meant}; this run has {', '.join(sorted(metrics))}"
