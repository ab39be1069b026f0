"""Limits on what a step measured: crossed for long enough, a gate warns or ends the run."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_sftrl.config.grpo import GateSection
from megatron_sftrl.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossing:
    """A gate that has been crossed for its number of steps.

    Args:
        text: what happened, for people.
        stops: the gate ends the run.
    """

    text: str
    stops: bool


class Gates:
    """Counts for how many steps in a row each gate has been crossed; a resumed run counts anew.

    Args:
        sections: the run's gates.
        held_out: metrics of an evaluation, which only some steps have.
        sometimes: further metrics that a whole step may lack.
    Raises:
        UserError: a gate on a held-out metric that no evaluation has.
    """

    def __init__(
        self, sections: Sequence[GateSection], *, held_out: Sequence[str] = (), sometimes: Sequence[str] = ()
    ) -> None:
        self._sections = tuple(sections)
        self._may_be_missing = frozenset([*held_out, *sometimes])
        for gate in self._sections:
            if gate.metric.startswith("valid/") and gate.metric not in held_out:
                known = f"are {', '.join(held_out)}" if held_out else "need data.valid"
                raise UserError(f"gates: there is no metric {gate.metric!r}; held-out metrics {known}")
        self._streaks = [0] * len(self._sections)

    def check(self, step: int, metrics: Mapping[str, float], *, is_whole: bool) -> list[Crossing]:
        """Look at one step's numbers; a number that is NaN crosses every gate on it.

        Args:
            step: they are of.
            metrics: by name.
            is_whole: the policy was updated, so that every metric of training is there. A gate on one that is
                not there waits for a step that has it.
        Raises:
            UserError: a gate on a metric that a whole step does not have, with those it has.
        """
        crossed = []
        for index, gate in enumerate(self._sections):
            if gate.metric not in metrics:
                if is_whole and gate.metric not in self._may_be_missing:
                    raise UserError(_unknown(gate.metric, metrics))
                continue
            value = metrics[gate.metric]
            is_below = gate.below is not None and value < gate.below
            is_above = gate.above is not None and value > gate.above
            is_crossed = is_below or is_above or math.isnan(value)
            self._streaks[index] = self._streaks[index] + 1 if is_crossed else 0
            if self._streaks[index] >= gate.steps:
                limit = f"below {gate.below}" if gate.below is not None else f"above {gate.above}"
                crossed.append(
                    Crossing(
                        text=f"step {step}: {gate.metric} = {value:.6g} is {limit}, "
                        f"{self._streaks[index]} step(s) in a row",
                        stops=gate.action == "stop",
                    )
                )
        return crossed


def _unknown(name: str, metrics: Mapping[str, float]) -> str:
    near = difflib.get_close_matches(name, list(metrics), n=1)
    meant = f" (did you mean {near[0]!r}?)" if near else ""
    return f"gates: there is no metric {name!r}{meant}; this run has {', '.join(sorted(metrics))}"
