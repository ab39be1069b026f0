"""Accuracy after every stage, as a table and an HTML report; fails unless each stage raised what it trains.

    python examples/quickstart/report.py runs/quickstart base gift grpo

The base model, fine-tuning and training with rewards, in this order. Of each, this reads
<stage>/metrics.jsonl and answers/<stage>/{greedy,sampled}.jsonl, and the seconds of all in times.tsv.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from task import is_correct

from megatron_sftrl.apps.report.page import Curve, Series, Table, print_table, write_report
from megatron_sftrl.observability.metrics import read_metrics

SMALLEST_RISE = 0.05
"""Of the sampled accuracy, by both stages together: what GIFT is for shows in what GRPO makes of it."""
SMALLEST_REWARD_RISE = 0.05
"""Of the mean reward on held-out problems, by GRPO: three standard errors; seeds 0 to 2 rose 0.18 to 0.27."""
HOW = ("greedy", "sampled")
NUM_ENDS = 5
"""Steps averaged at either end of GRPO's training curve."""
# What the report draws of metrics.jsonl, and what a reader should see in it.
METRICS = {
    "loss": "The stage's own loss, nats per token.",
    "reward/mean": "Of the responses of each step, to problems of its own: some steps have harder ones.",
    "entropy": "Of the next token, nats: how much choice the model leaves to sampling.",
    "gift/label_weight": "Share of GIFT's target on the demonstrated token; the base model has the rest.",
    "rollout/response_tokens": "Mean length of a response.",
    "grad_norm": "Before clipping.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """Share of correct answers after one stage.

    Args:
        stage: the run.
        step: its steps.
        strict: by "greedy" and "sampled"; the answer stands where the demonstrations have it.
        lenient: the same, in whatever format.
        rewards: each problem's share of correct sampled responses (strict): its mean reward.
        answers: the greedy response to each problem, and whether it is correct (strict).
    """

    stage: str
    step: int
    strict: dict[str, float]
    lenient: dict[str, float]
    rewards: tuple[float, ...]
    answers: list[tuple[str, bool]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("directory", type=Path, help="where the stages are")
    parser.add_argument("stages", nargs=3, help="base model, fine-tuning, training with rewards")
    arguments = parser.parse_args()
    directory: Path = arguments.directory
    stages: list[str] = arguments.stages

    base, tuned, rewarded = accuracies = [read_accuracy(directory, stage) for stage in stages]
    tables = [
        accuracy_table(accuracies),
        reward_table(tuned, rewarded, read_metrics(directory / rewarded.stage / "metrics.jsonl")),
        times_table(directory / "times.tsv"),
    ]
    page = directory / "report.html"
    write_report(
        page,
        title="Quick start: a tiny model learns to show its work",
        text=report_text(directory, accuracies),
        tables=tables,
        curves=[accuracy_curve(accuracies), *metric_curves(directory, stages)],
    )
    for table in tables:
        print_table(table)
    print(f"\nreport: {page}")
    failures = [*check_accuracy(base, rewarded), *check_reward(tuned, rewarded)]
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


def read_accuracy(directory: Path, stage: str) -> Accuracy:
    """What the answers of a stage are worth."""
    rows = {how: _read_rows(directory / "answers" / stage / f"{how}.jsonl") for how in HOW}
    strict, lenient = (
        {how: [_share_correct(row, is_strict=is_strict) for row in rows[how]] for how in HOW}
        for is_strict in (True, False)
    )
    return Accuracy(
        stage=stage,
        step=int(read_metrics(directory / stage / "metrics.jsonl")[-1]["step"] or 0),
        strict={how: _mean(strict[how]) for how in HOW},
        lenient={how: _mean(lenient[how]) for how in HOW},
        rewards=tuple(strict["sampled"]),
        answers=[
            (row["responses"][0], share == 1.0)
            for row, share in zip(rows["greedy"], strict["greedy"], strict=True)
        ],
    )


def check_accuracy(before: Accuracy, after: Accuracy) -> list[str]:
    """What is wrong unless the sampled accuracy rose by SMALLEST_RISE."""
    old, new = before.strict["sampled"], after.strict["sampled"]
    if new - old >= SMALLEST_RISE:
        return []
    return [
        f"sampled accuracy went from {old:.1%} to {new:.1%} over both stages; "
        f"expected a rise of {100 * SMALLEST_RISE:.0f} points or more"
    ]


def reward_rise(before: Accuracy, after: Accuracy) -> tuple[float, float]:
    """Mean rise of the reward on the held-out problems, and its standard error."""
    # Not the two ends of the training curve: there each step has other problems, and weights that move. Here
    # both models answer the same problems, so that what is hard about a problem cancels in the difference.
    rises = [new - old for old, new in zip(before.rewards, after.rewards, strict=True)]
    mean = _mean(rises)
    return mean, math.sqrt(sum((rise - mean) ** 2 for rise in rises)) / len(rises)


def check_reward(before: Accuracy, after: Accuracy) -> list[str]:
    """What is wrong unless the mean reward on held-out problems rose by SMALLEST_REWARD_RISE."""
    rise, error = reward_rise(before, after)
    if rise >= SMALLEST_REWARD_RISE:
        return []
    return [
        f"the reward did not rise: on held-out problems its mean went from {_mean(before.rewards):.3f} to "
        f"{_mean(after.rewards):.3f} ({rise:+.3f}, standard error {error:.3f}); expected a rise of "
        f"{SMALLEST_REWARD_RISE} or more"
    ]


def accuracy_table(accuracies: list[Accuracy]) -> Table:
    """One row a stage."""
    rows = [
        (a.stage, *(f"{share[how]:.1%}" for share in (a.strict, a.lenient) for how in HOW))
        for a in accuracies
    ]
    return Table(
        title="Accuracy on held-out problems",
        columns=("after stage", "greedy", "sampled", "greedy, any format", "sampled, any format"),
        rows=tuple(rows),
        note="Judged by reasoning-gym. Sampled: four responses per problem at temperature 1. Any format: the "
        "last number of the response counts, wherever it stands.",
    )


def reward_table(before: Accuracy, after: Accuracy, metrics: list[dict[str, float | None]]) -> Table:
    """Mean reward at the start and at the end of training, on both kinds of problems."""
    curve = [value for _, value in _points(metrics, "reward/mean")]
    ends = (_mean(curve[:NUM_ENDS]), _mean(curve[-NUM_ENDS:]))
    rise, error = reward_rise(before, after)
    return Table(
        title=f"Mean reward of {after.stage}",
        columns=("problems", "start", "end", "rise"),
        rows=(
            (
                "held out",
                f"{_mean(before.rewards):.3f}",
                f"{_mean(after.rewards):.3f}",
                f"{rise:+.3f} +- {error:.3f}",
            ),
            ("trained on", f"{ends[0]:.3f}", f"{ends[1]:.3f}", f"{ends[1] - ends[0]:+.3f}"),
        ),
        note="1 for a correct response in the right format, else 0. Held out: the same problems before and "
        f"after, with the standard error of the rise. Trained on: the first and the last {NUM_ENDS} steps, "
        "each with problems of its own.",
    )


def times_table(path: Path) -> Table:
    """Seconds of each stage, as quickstart.sh wrote them."""
    stages = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    total = sum(int(seconds) for _, seconds in stages)
    rows = [*((name, seconds) for name, seconds in stages), ("all", str(total))]
    return Table(title="Time", columns=("stage", "seconds"), rows=tuple(rows))


def report_text(directory: Path, accuracies: list[Accuracy]) -> list[str]:
    """What was done, and how the answer to one problem changed."""
    prompts = _read_rows(directory / "data" / "prompts.jsonl")
    verdicts = [(accuracies[0].answers[i][1], accuracies[-1].answers[i][1]) for i in range(len(prompts))]
    shown = verdicts.index((False, True)) if (False, True) in verdicts else 0
    answers = "\n\n".join(f"after stage {a.stage}:\n{a.answers[shown][0]}" for a in accuracies)
    return [
        "A small transformer was trained from random weights on sums answered in mixed styles (the base "
        "model), then fine-tuned on demonstrations with the steps written out, by GIFT on two processes "
        "under tensor parallelism, then trained by GRPO on its own answers to new problems, of which it was "
        "only told whether they are right. The same commands, with more processes and a larger model, train "
        "on GPUs.",
        f"The first held-out problem that training turned from wrong to right, answered greedily:\n"
        f"{prompts[shown]['prompt']}\n\n{answers}",
    ]


def accuracy_curve(accuracies: list[Accuracy]) -> Curve:
    """Accuracy after each stage, over the steps of all stages that follow the base model."""
    steps = [0]
    for accuracy in accuracies[1:]:
        steps.append(steps[-1] + accuracy.step)
    later = [accuracy.stage for accuracy in accuracies[1:]]
    return Curve(
        title="Accuracy",
        x_label=f"step of {', then '.join(later)}",
        y_label="% correct",
        series=tuple(
            Series(label=how, x=tuple(steps), y=tuple(100 * a.strict[how] for a in accuracies)) for how in HOW
        ),
        note="Held-out problems, strict format; step 0 is the base model.",
    )


def metric_curves(directory: Path, stages: list[str]) -> list[Curve]:
    """Each metric of each stage, on training data and, where it was evaluated, on held-out data."""
    curves = []
    for stage in stages:
        rows = read_metrics(directory / stage / "metrics.jsonl")
        is_rewarded = any("reward/mean" in row for row in rows)
        for name, note in METRICS.items():
            if name == "loss" and is_rewarded:
                continue  # advantages sum to zero, and so do on-policy losses
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


def _share_correct(row: dict, *, is_strict: bool) -> float:
    return _mean([is_correct(response, row["answer"], is_strict=is_strict) for response in row["responses"]])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _points(rows: list[dict[str, float | None]], key: str) -> list[tuple[float, float]]:
    """(step, value) where the key was logged with a number."""
    return [
        (step, y) for row in rows if (step := row["step"]) is not None and (y := row.get(key)) is not None
    ]


def _read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    sys.exit(main())
