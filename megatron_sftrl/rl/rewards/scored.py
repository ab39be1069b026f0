"""The rewards of a response, and the numbers that a step logs about them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

Outcome: TypeAlias = Literal["ok", "timeout", "crashed", "error", "nonfinite"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one reward said about one response.

    Args:
        name: the reward.
        outcome: ok, or what went wrong: out of time (wall clock or processor), the worker died, the reward
            raised an exception, a number was not finite or above 1e15 in size.
        reward: strict, before its weight; 0 unless ok.
        lenient: by the lenient reading; 0 unless ok.
        metrics: the reward's own numbers; empty unless ok.
        seconds: wall-clock time in the worker.
        detail: what went wrong, for a human.
    """

    name: str
    outcome: Outcome
    reward: float = 0.0
    lenient: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """The reward of one response.

    Args:
        reward: sum of weight * strict reward over the parts: what is trained.
        lenient: the same sum of the lenient readings.
        parts: one for each reward, in the run's order.
    """

    reward: float
    lenient: float
    parts: tuple[Part, ...]

    @property
    def outcome(self) -> Outcome:
        """ok, or the first thing that went wrong."""
        for part in self.parts:
            if part.outcome != "ok":
                return part.outcome
        return "ok"


def reward_metrics(scored: Sequence[Scored]) -> dict[str, float]:
    """Numbers of a step.

    Returns:
        reward/mean and reward/lenient_mean of the weighted sums; for each reward reward/NAME and
        reward/NAME/lenient, means over all samples in which a failure counts 0; reward/NAME/METRIC, means
        over the samples that have it; reward/NAME/timeout, /crashed, /error, /nonfinite, numbers of samples;
        reward/slowest_seconds, of one reward of one sample.
    """
    if not scored:
        return {}
    values: dict[str, list[float]] = defaultdict(list)
    counts: dict[str, float] = {}
    for one in scored:
        values["reward/mean"].append(one.reward)
        values["reward/lenient_mean"].append(one.lenient)
        for part in one.parts:
            values[f"reward/{part.name}"].append(part.reward)
            values[f"reward/{part.name}/lenient"].append(part.lenient)
            for name, value in part.metrics.items():
                values[f"reward/{part.name}/{name}"].append(value)
            for outcome in OUTCOMES[1:]:
                key = f"reward/{part.name}/{outcome}"
                counts[key] = counts.get(key, 0.0) + (part.outcome == outcome)
    means = {key: sum(numbers) / len(numbers) for key, numbers in values.items()}
    slowest = max((part.seconds for one in scored for part in one.parts), default=0.0)
    return means | counts | {"reward/slowest_seconds": slowest}


def describe_failures(scored: Sequence[Scored], *, most: int = 3) -> list[str]:
    """One line for each of the first samples that a reward could not judge, with the reason."""
    lines = [
        f"sample {index}: reward {part.name!r}: {part.outcome}: {part.detail}"
        for index, one in enumerate(scored)
        for part in one.parts
        if part.outcome != "ok"
    ]
    hidden = len(lines) - most
    return lines[:most] + ([f"and {hidden} more"] if hidden > 0 else [])
