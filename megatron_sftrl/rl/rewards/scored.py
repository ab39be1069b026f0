"""The rewards of a response, and the numbers that a step logs about them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

Outcome: TypeAlias = Literal["ok", "timeout", "crashed", "error", "nonfinite"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one reward said about one response; unless it is ok, its numbers say nothing.

    Args:
        name: the reward.
        outcome: ok, or what went wrong: out of time (wall clock or processor), the worker died, the reward
            raised an exception, a number was not finite or above 1e15 in size.
        reward: strict, before its weight; 0 unless ok.
        lenient: by the lenient reading; 0 unless ok.
        metrics: the reward's own numbers; empty unless ok.
        seconds: wall-clock time in the worker.
        detail: what went wrong, for a human.
        is_retried: it failed once before, in another worker.
    """

    name: str
    outcome: Outcome
    reward: float = 0.0
    lenient: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    detail: str = ""
    is_retried: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """The reward of one response.

    Args:
        reward: sum of weight * strict reward over the parts: what is trained. None: a part with a weight
            failed, so that the response is neither right nor wrong; it is left out of the loss and of every
            mean.
        lenient: the same sum of the lenient readings; None with `reward`.
        parts: one for each reward, in the run's order.
    """

    reward: float | None
    lenient: float | None
    parts: tuple[Part, ...]

    @property
    def first(self) -> float | None:
        """What the run's first reward, which defines success, gave; None when it or the sum is unknown."""
        return self.parts[0].reward if self.reward is not None and self.parts[0].outcome == "ok" else None

    @property
    def outcome(self) -> Outcome:
        """ok, or the first thing that went wrong."""
        for part in self.parts:
            if part.outcome != "ok":
                return part.outcome
        return "ok"


def weighted(weights: Sequence[float], parts: tuple[Part, ...]) -> Scored:
    """The sum of the parts; unknown as soon as one that counts has failed.

    Args:
        weights: of each part. What weighs 0 is measured only, and its failure takes nothing away.
        parts: of one response.
    """
    pairs = [(weight, part) for weight, part in zip(weights, parts, strict=True) if weight != 0]
    if any(part.outcome != "ok" for _, part in pairs):
        return Scored(reward=None, lenient=None, parts=parts)
    return Scored(
        reward=math.fsum(weight * part.reward for weight, part in pairs),
        lenient=math.fsum(weight * part.lenient for weight, part in pairs),
        parts=parts,
    )


def reward_metrics(scored: Sequence[Scored]) -> dict[str, float]:
    """Numbers of a step.

    Returns:
        reward/mean and reward/lenient_mean of the weighted sums, over the samples that have one;
        reward/unscored, the share of those that have none; for each reward reward/NAME and
        reward/NAME/lenient, means over the samples that it could judge, and reward/NAME/METRIC, over those
        that have it; reward/NAME/timeout, /crashed, /error, /nonfinite, numbers of samples, and
        reward/NAME/retried, of those that needed a second try; reward/slowest_seconds, of one reward of one
        sample. A mean over nothing is left out.
    """
    if not scored:
        return {}
    values: dict[str, list[float]] = defaultdict(list)
    counts: dict[str, float] = {}
    for one in scored:
        values["reward/unscored"].append(one.reward is None)
        if one.reward is not None and one.lenient is not None:
            values["reward/mean"].append(one.reward)
            values["reward/lenient_mean"].append(one.lenient)
        for part in one.parts:
            if part.outcome == "ok":
                values[f"reward/{part.name}"].append(part.reward)
                values[f"reward/{part.name}/lenient"].append(part.lenient)
                for name, value in part.metrics.items():
                    values[f"reward/{part.name}/{name}"].append(value)
            flags = {outcome: part.outcome == outcome for outcome in OUTCOMES[1:]}
            for name, flag in {**flags, "retried": part.is_retried}.items():
                key = f"reward/{part.name}/{name}"
                counts[key] = counts.get(key, 0.0) + flag
    means = {key: sum(numbers) / len(numbers) for key, numbers in values.items()}
    slowest = max((part.seconds for one in scored for part in one.parts), default=0.0)
    return means | counts | {"reward/slowest_seconds": slowest}


def failed_everywhere(scored: Sequence[Scored]) -> Part | None:
    """What a reward that could judge no sample said about the first one; None where each judged some."""
    for parts in zip(*(one.parts for one in scored), strict=True):
        if all(part.outcome != "ok" for part in parts):
            return parts[0]
    return None


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
