"""Accuracy of every checkpoint, as a table and an HTML report; fails unless fine-tuning raised it.

    python examples/quickstart/report.py runs/quickstart base gift

The stages are given in the order in which they ran. Of each, this reads <stage>/metrics.jsonl and
answers/<stage>/<checkpoint>/{greedy,sampled}.jsonl, and the seconds of all in times.tsv.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from task import is_correct

from megatron_sftrl.observability.metrics import read_metrics
from megatron_sftrl.observability.report import Curve, Series, Table, write_report

SMALLEST_RISE = 0.10
HOW = ("greedy", "sampled")
# What the report draws of metrics.jsonl, and what a reader should see in it.
METRICS = {
    "loss": "The stage's own loss, nats per token.",
    "entropy": "Of the next token, nats: how much choice the model leaves to sampling.",
    "gift/label_weight": "Share of GIFT's target on the demonstrated token; the base model has the rest.",
    "grad_norm": "Before clipping.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """Share of correct answers of one checkpoint.

    Args:
        stage: the run that wrote it.
        step: optimizer steps of that run.
        strict: by "greedy" and "sampled"; the answer stands where the demonstrations have it.
        lenient: the same, in whatever format.
        answers: the greedy response to each problem, and whether it is correct (strict).
    """

    stage: str
    step: int
    strict: dict[str, float]
    lenient: dict[str, float]
    answers: list[tuple[str, bool]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("directory", type=Path, help="where the stages are")
    parser.add_argument("stages", nargs="+", help="in order; the first is where the accuracy starts from")
    arguments = parser.parse_args()
    directory: Path = arguments.directory
    stages: list[str] = arguments.stages

    accuracies = {stage: read_accuracies(directory, stage) for stage in stages}
    lasts = [accuracies[stage][-1] for stage in stages]
    accuracies_table = accuracy_table(lasts)
    seconds_table = times_table(directory / "times.tsv")
    page = directory / "report.html"
    write_report(
        page,
        title="Quick start: a tiny model learns to show its work",
        text=report_text(directory, lasts),
        tables=[accuracies_table, seconds_table],
        curves=[*accuracy_curve(accuracies), *metric_curves(directory, stages)],
    )
    for table in (accuracies_table, seconds_table):
        print_table(table)
    print(f"\nreport: {page}")
    return check_rise(lasts[0], lasts[-1])


def read_accuracies(directory: Path, stage: str) -> list[Accuracy]:
    """One for each checkpoint of a stage, in the order of the steps."""
    found = []
    for checkpoint in sorted((directory / "answers" / stage).iterdir()):
        answers = {how: _read_rows(checkpoint / f"{how}.jsonl") for how in HOW}
        strict, lenient = (
            {how: _share_correct(answers[how], is_strict=is_strict) for how in HOW}
            for is_strict in (True, False)
        )
        greedy = [
            (row["responses"][0], is_correct(row["responses"][0], row["answer"], is_strict=True))
            for row in answers["greedy"]
        ]
        step = int(checkpoint.name.removeprefix("step-"))
        found.append(Accuracy(stage=stage, step=step, strict=strict, lenient=lenient, answers=greedy))
    return found


def check_rise(before: Accuracy, after: Accuracy) -> int:
    """Exit code 0 when both accuracies rose by SMALLEST_RISE, else 1."""
    for how in HOW:
        rise = after.strict[how] - before.strict[how]
        if rise < SMALLEST_RISE:
            print(
                f"error: {how} accuracy went from {before.strict[how]:.1%} to {after.strict[how]:.1%}; "
                f"expected a rise of {100 * SMALLEST_RISE:.0f} points or more",
                file=sys.stderr,
            )
            return 1
    return 0


def accuracy_table(lasts: list[Accuracy]) -> Table:
    """The last checkpoint of each stage, and what changed from the first to the last stage."""
    rows = [
        (a.stage, *(f"{share[how]:.1%}" for share in (a.strict, a.lenient) for how in HOW)) for a in lasts
    ]
    first, last = lasts[0], lasts[-1]
    changes = [
        100 * (after[how] - before[how])
        for before, after in ((first.strict, last.strict), (first.lenient, last.lenient))
        for how in HOW
    ]
    rows.append(("change", *(f"{change:+.1f}" for change in changes)))
    return Table(
        title="Accuracy on held-out problems",
        columns=("after stage", "greedy", "sampled", "greedy, any format", "sampled, any format"),
        rows=tuple(rows),
        note="Judged by reasoning-gym. Sampled: one response per problem at temperature 1. Any format: the "
        "last number of the response counts, wherever it stands.",
    )


def times_table(path: Path) -> Table:
    """Seconds of each stage, as quickstart.sh wrote them."""
    stages = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    total = sum(int(seconds) for _, seconds in stages)
    rows = [*((name, seconds) for name, seconds in stages), ("all", str(total))]
    return Table(title="Time", columns=("stage", "seconds"), rows=tuple(rows))


def report_text(directory: Path, lasts: list[Accuracy]) -> list[str]:
    """What was done, and how the answer to one problem changed."""
    prompts = _read_rows(directory / "data" / "prompts.jsonl")
    verdicts = [(lasts[0].answers[i][1], lasts[-1].answers[i][1]) for i in range(len(prompts))]
    shown = verdicts.index((False, True)) if (False, True) in verdicts else 0
    answers = "\n\n".join(f"after stage {a.stage}:\n{a.answers[shown][0]}" for a in lasts)
    return [
        "A small transformer was trained from random weights on sums answered in mixed styles (the base "
        "model), then fine-tuned on demonstrations with the steps written out, by GIFT on two processes "
        "under tensor parallelism. The same commands, with more processes and a larger model, train on GPUs.",
        f"The first held-out problem that fine-tuning turned from wrong to right, answered greedily:\n"
        f"{prompts[shown]['prompt']}\n\n{answers}",
    ]


def accuracy_curve(accuracies: dict[str, list[Accuracy]]) -> list[Curve]:
    """Accuracy over the optimizer steps of all stages after the first, which is the point at 0."""
    first, *later = accuracies.values()
    points, offset = [(0, first[-1])], 0
    for stage in later:
        points += [(offset + accuracy.step, accuracy) for accuracy in stage]
        offset = points[-1][0]
    series = [
        Series(label=how, x=tuple(x for x, _ in points), y=tuple(100 * a.strict[how] for _, a in points))
        for how in HOW
    ]
    steps_of = " and ".join(list(accuracies)[1:])
    return [
        Curve(
            title="Accuracy",
            x_label=f"step of {steps_of}",
            y_label="% correct",
            series=tuple(series),
            note="Held-out problems, strict format; step 0 is the base model.",
        )
    ]


def metric_curves(directory: Path, stages: list[str]) -> list[Curve]:
    """Each metric of each stage, on training data and, where it was evaluated, on held-out data."""
    curves = []
    for stage in stages:
        rows = read_metrics(directory / stage / "metrics.jsonl")
        for name, note in METRICS.items():
            series = [
                Series(label=label, x=tuple(x for x, _ in points), y=tuple(y for _, y in points))
                for label, key in (("training", name), ("held out", f"valid/{name}"))
                if (points := _points(rows, key))
            ]
            if series:
                curves.append(
                    Curve(
                        title=f"{stage}: {name}",
                        x_label=f"step of {stage}",
                        y_label=name,
                        series=tuple(series),
                        note=note,
                    )
                )
    return curves


def print_table(table: Table) -> None:
    """The table for a terminal."""
    lines = [table.columns, *table.rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(table.columns))]
    print(f"\n{table.title}")
    for line in lines:
        cells = (cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))
        print("  ".join([line[0].ljust(widths[0]), *cells]))


def _share_correct(rows: list[dict], *, is_strict: bool) -> float:
    verdicts = [
        is_correct(response, row["answer"], is_strict=is_strict)
        for row in rows
        for response in row["responses"]
    ]
    return sum(verdicts) / len(verdicts)


def _points(rows: list[dict[str, float | None]], key: str) -> list[tuple[float, float]]:
    """(step, value) where the key was logged with a number."""
    return [
        (step, y) for row in rows if (step := row["step"]) is not None and (y := row.get(key)) is not None
    ]


def _read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    sys.exit(main())
