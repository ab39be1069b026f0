"""`sftrl report`: the numbers of runs over each other, their last values, the settings that differ."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sftrl.apps.report.page import Curve, Series, Table, check_matplotlib, print_table, write_report
from megatron_sftrl.errors import UserError, error_of
from megatron_sftrl.observability.metrics import read_metrics
from megatron_sftrl.observability.run_directory import RunDirectory, flat

LOGGER = logging.getLogger(__name__)

_FIRST = ("loss", "reward/mean", "grad_norm", "lr", "tokens_per_second")
_LAST = ("seconds/", "checkpoint/", "ranks/", "peak_memory_bytes", "epoch")
_HELD_OUT = "valid/"
_MOST_POINTS = 1000
"""Of a line, which is 400 pixels wide."""

Row = dict[str, float | None]
"""A line of metrics.jsonl."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunNumbers:
    """A run by the name that tells it from the others.

    Args:
        rows: one a step, in order; none where the run has not finished a step yet.
        settings: of its resolved.yaml by dotted name; empty where there is none.
    """

    label: str
    path: Path
    rows: list[Row]
    settings: dict[str, Any]

    def points(self, name: str) -> list[tuple[float, float]]:
        """(step, value) where `name` has a finite value."""
        return [(row["step"] or 0, value) for row in self.rows if (value := row.get(name)) is not None]


def run_report(paths: Sequence[Path], out: Path) -> None:
    """Write the page, and the last values to standard output.

    Raises:
        UserError: no run directory, no run that has finished a step, no matplotlib, a page that cannot be
            written.
    """
    check_matplotlib()
    if out.is_dir():
        raise UserError(f"--out: expected a file, got the directory {out}")
    runs = read_runs(paths)
    begun = [run for run in runs if run.rows]
    if not begun:
        raise UserError(f"no step is finished in {', '.join(str(run.path) for run in runs)}; try again later")
    tables = [last_values(begun)]
    if len(runs) > 1:
        tables.append(differences(runs))
    write_report(
        out,
        title=", ".join(run.label for run in runs),
        text=[
            *_notes(runs),
            "Numbers that never change are in the table alone. Dashed lines: held-out data.",
        ],
        tables=tables,
        curves=curves(begun),
    )
    for table in tables:
        print_table(table)
    LOGGER.info("written: %s", out)


def read_runs(paths: Sequence[Path]) -> list[RunNumbers]:
    """The runs by the names of their directories, or by their paths where those are the same.

    Raises:
        UserError: a path that is no run directory or is given twice, a file that cannot be read.
    """
    names = [path.resolve().name for path in paths]
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError(f"expected each run once, got {', '.join(map(str, paths))}")
    is_told_apart = len(set(names)) == len(names)
    return [
        _read_run(path, name if is_told_apart else str(path)) for path, name in zip(paths, names, strict=True)
    ]


def _read_run(path: Path, label: str) -> RunNumbers:
    run = RunDirectory(path=path)
    if not run.metrics.exists() and not run.resolved.exists():
        raise UserError(f"expected a run directory, with metrics.jsonl or resolved.yaml in it, got {path}")
    try:
        rows = read_metrics(run.metrics) if run.metrics.exists() else []
        text = run.resolved.read_text(encoding="utf-8") if run.resolved.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise error_of(f"{path} cannot be read: {error}", error) from error
    return RunNumbers(label=label, path=path, rows=rows, settings=flat(text) if text else {})


def _notes(runs: Sequence[RunNumbers]) -> Iterator[str]:
    """How far each run is, and in how many steps a number was not finite."""
    for run in runs:
        far = f"step {run.rows[-1]['step']:,}" if run.rows else "no step is finished yet"
        missing = {name: sum(name in row and row[name] is None for row in run.rows) for name in _names([run])}
        broken = [f"{name} in {count:,} steps" for name, count in missing.items() if count]
        yield f"{run.label} ({run.path}): {far}{'; not finite: ' if broken else ''}{', '.join(broken)}"


def _names(runs: Sequence[RunNumbers]) -> list[str]:
    """Every number of the runs: what a reader looks for first, then what the loss measures, then times."""
    found = list(dict.fromkeys(name for run in runs for row in run.rows for name in row if name != "step"))

    def order(name: str) -> tuple[int, int]:
        plain = name.removeprefix(_HELD_OUT)
        if plain in _FIRST:
            return 0, _FIRST.index(plain)
        return (1 if plain.startswith("reward/") else 3 if plain.startswith(_LAST) else 2), 0

    return sorted(found, key=order)


def last_values(runs: Sequence[RunNumbers]) -> Table:
    """The last value of every number; one that is measured now and then may be older than the last step."""
    rows = [("step", *(f"{run.rows[-1]['step']:,}" for run in runs))]
    for name in _names(runs):
        last = [next((row[name] for row in reversed(run.rows) if name in row), "") for run in runs]
        rows.append((name, *map(_number, last)))
    return Table(title="Last values", columns=("number", *(run.label for run in runs)), rows=tuple(rows))


def differences(runs: Sequence[RunNumbers]) -> Table:
    """The settings in which runs differ, but for their directories."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name != "run_dir")
    rows = [
        (name, *(str(run.settings.get(name, "")) for run in runs))
        for name in names
        if any(run.settings.get(name) != runs[0].settings.get(name) for run in runs)
    ]
    without = [run.label for run in runs if not run.settings]
    return Table(
        title="Settings that differ",
        columns=("setting", *(run.label for run in runs)),
        rows=tuple(rows),
        note=f"No resolved.yaml in {', '.join(without)}." if without else "",
    )


def curves(runs: Sequence[RunNumbers]) -> list[Curve]:
    """One for each number, of training and held-out data together; each run has a color."""
    found = []
    for name in dict.fromkeys(name.removeprefix(_HELD_OUT) for name in _names(runs)):
        lines = []
        for color, run in enumerate(runs):
            for key, is_held_out in ((name, False), (f"{_HELD_OUT}{name}", True)):
                if points := run.points(key):
                    x, y = zip(*thinned(points), strict=True)
                    label = f"{run.label}, held out" if is_held_out else run.label
                    lines.append(Series(label=label, x=x, y=y, color=color, is_dashed=is_held_out))
        values = {value for line in lines for value in line.y}
        if len(values) > 1 or (name in _FIRST and values):
            found.append(Curve(title=name, x_label="step", y_label="", series=tuple(lines)))
    return found


def thinned(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """At most _MOST_POINTS of many points: of neighbours the lowest and the highest, so that peaks stay."""
    if len(points) <= _MOST_POINTS:
        return points
    width = -(-2 * len(points) // _MOST_POINTS)
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), width):
        part = points[start : start + width]
        ends = (min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1]))
        kept += sorted(set(ends))
    return kept


def _number(value: float | str | None) -> str:
    if value is None:
        return "not finite"
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1e5 or value == int(value) else f"{value:.5g}"
