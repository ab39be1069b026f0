"""What losses.py says of its measurements: ratios within a repeat, limits, a table, a JSON file."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tools.benchmarks.loss_contenders import LOSSES, PLAIN, RELEASED_SUFFIX

Turns = Mapping[str, list[dict[str, float]]]
"""Seconds and peak_bytes of each contender, repeat by repeat."""

COLUMNS = {"time": "seconds", "memory": "peak_bytes"}
TIME_LIMITS = {"sft": 1.1, "gift": 1.4, "curiosft": 1.5, **{n: 1.5 for n in LOSSES if n.startswith("pear")}}
LIMITS = {"time": TIME_LIMITS, "memory": {**{name: 0.25 for name in TIME_LIMITS}, "sft": 0.2}}
"""Of plain's."""
LIMITS_OF_RELEASED = {"gift": {"time": 0.5, "memory": 0.1}}


def loss_facts(turns: Turns, left_out: Mapping[str, str]) -> dict[str, Any]:
    """Everything that the table shows, by name.

    Args:
        turns: of every contender that ran, `plain` among them.
        left_out: the others, and why.
    """
    facts: dict[str, Any] = {"turns": turns, "left_out": left_out, "limits": LIMITS, "above_limit": {}}
    for what, key in COLUMNS.items():
        facts[key] = {name: statistics.median(turn[key] for turn in found) for name, found in turns.items()}
        facts[what] = {name: _ratio(turns, name, PLAIN, key) for name in turns}
        limits = LIMITS[what].items()
        facts["above_limit"][what] = [name for name, limit in limits if facts[what].get(name, 0) > limit]
    facts["of_released"] = {
        name: {what: _ratio(turns, name, name + RELEASED_SUFFIX, key) for what, key in COLUMNS.items()}
        for name in turns
        if name + RELEASED_SUFFIX in turns
    }
    facts["limits_of_released"] = LIMITS_OF_RELEASED
    return facts


def report_lines(facts: Mapping[str, Any]) -> list[str]:
    """The table: a line for each contender, then what is above its limit, and who is missing."""
    width = max(len(name) for name in facts["turns"]) + 1
    head = f"{'seconds':>9}{'of plain':>10}{'limit':>7}{'peak MB':>10}{'of plain':>10}{'limit':>7}"
    lines = [" " * width + head]
    for name in facts["turns"]:
        lines.append(
            f"{name:{width}}{facts['seconds'][name]:9.2f}{_columns(facts, 'time', name)}"
            f"{facts['peak_bytes'][name] / 1e6:10.0f}{_columns(facts, 'memory', name)}"
        )
    above = facts["above_limit"]
    lines.append(
        f"above the limit of time: {', '.join(above['time']) or 'none'}; "
        f"of memory: {', '.join(above['memory']) or 'none'}"
    )
    for name, ratios in facts["of_released"].items():
        limits = facts["limits_of_released"].get(name, {})
        parts = [f"{what} {ratio:.2f}{_limit(limits.get(what))}" for what, ratio in ratios.items()]
        lines.append(f"{name}, of the released formula's: {', '.join(parts)}")
    for reason in dict.fromkeys(facts["left_out"].values()):
        names = [name for name, other in facts["left_out"].items() if other == reason]
        lines.append(f"left out: {'; '.join(names)} ({reason})")
    return [line.rstrip() for line in lines]


def fraction_line(what: str, unit: str, scale: float, fractions: Mapping[str, float]) -> str:
    """What each contender reaches of a measured rate, which is the first entry."""
    (_, rate), *shares = fractions.items()
    reached = ", ".join(f"{name} {share:.2f}" for name, share in shares)
    return f"{what} {rate / scale:.0f} {unit}: {reached}"


def write_json(facts: Mapping[str, Any], out: Path) -> None:
    """Under a temporary name first."""
    temporary = out.with_name(out.name + ".tmp")
    temporary.write_text(json.dumps(facts, indent=2) + "\n")
    temporary.replace(out)


def _ratio(turns: Turns, name: str, base: str, key: str) -> float:
    """Median over the repeats of the ratio within a repeat, which a noisy machine disturbs least."""
    pairs: Iterable = zip(turns[name], turns[base], strict=True)
    return statistics.median(turn[key] / other[key] for turn, other in pairs)


def _columns(facts: Mapping[str, Any], what: str, name: str) -> str:
    return f"{facts[what][name]:10.2f}{facts['limits'][what].get(name, ''):>7}"


def _limit(limit: float | None) -> str:
    return "" if limit is None else f" (limit {limit})"
