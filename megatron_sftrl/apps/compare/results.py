"""From the evaluations and metrics of a comparison's runs to what can be said about its arms."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sftrl.apps.compare.config import BAR, CompareConfig
from megatron_sftrl.apps.compare.launch import files_of, states_of
from megatron_sftrl.apps.compare.plan import Stage
from megatron_sftrl.apps.compare.statistics import (
    Array,
    Correlation,
    Mean,
    correlation_of,
    holm,
    mean_of,
    p_value,
)
from megatron_sftrl.apps.evaluate.run import answers_of
from megatron_sftrl.apps.evaluate.statistics import per_prompt
from megatron_sftrl.errors import UserError
from megatron_sftrl.observability.metrics import read_metrics
from megatron_sftrl.observability.run_directory import RunDirectory

SCORE = "accuracy"
"""What arms are compared by: the share of right responses among those drawn, which is pass@1."""
SIDES = {"sft": "after SFT", "grpo": "after RL"}
GREEDY = "greedy accuracy"
NLL = "nll/token"
UNJUDGED = "unjudged"
_TOLD = (SCORE, GREEDY, "lenient", "entropy", "entropy/top_fifth", "tokens", "finished", "repetition", NLL)
CURVES = ("reward/mean", "entropy")
_SIGNIFICANT = 0.05

Values = dict[str, Array]
"""One value for each prompt, by the number's name; NLL has a single one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """An arm less the bar, paired by seed and prompt; p_holm is corrected for the number of all."""

    arm: str
    side: str
    mean: Mean
    p: float | None
    p_holm: float | None

    @property
    def is_significant(self) -> bool:
        """Nothing is of one seed: it may be the seed's own."""
        return self.mean.num_seeds > 1 and self.p_holm is not None and self.p_holm < _SIGNIFICANT


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmResult:
    """What is known of an arm.

    Args:
        seeds: whose two evaluations are there.
        numbers: by side (sft, grpo), then by name.
        curves: of GRPO, (step, mean over seeds) by the name in metrics.jsonl.
        failures: the last error of each stage that failed.
        missing: stages that are neither done nor failed.
    """

    seeds: list[int]
    numbers: dict[str, dict[str, Mean]]
    curves: dict[str, list[tuple[int, float]]]
    failures: dict[str, str]
    missing: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """A comparison in numbers; correlations are of a number of the SFT checkpoints and the score after RL."""

    seeds: list[int]
    arms: dict[str, ArmResult]
    differences: list[Difference]
    correlations: dict[str, Correlation | None]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"


def results_of(config: CompareConfig, stages: Sequence[Stage]) -> Results:
    """Everything that the finished evaluations say; UserError where an evaluation cannot be read."""
    arms = list(dict.fromkeys(stage.arm for stage in stages if stage.seed is not None))  # the bar first
    found: dict[str, dict[int, dict[str, Values]]] = {arm: {} for arm in arms}
    for stage in stages:
        if stage.kind.startswith("eval_") and stage.is_done and stage.seed is not None:
            side = stage.kind.removeprefix("eval_")
            values = _values_of(stage.done.parent, config.base.eval.all_ks)
            found[stage.arm].setdefault(stage.seed, {})[side] = values
    _check_same_start(config, arms)
    _check_same_evaluation([stage for stage in stages if stage.kind.startswith("eval_") and stage.is_done])
    whole = {
        arm: {seed: each for seed, each in runs.items() if len(each) == 2} for arm, runs in found.items()
    }
    return Results(
        seeds=list(config.seeds),
        arms={arm: _arm_result(config, arm, stages, whole[arm]) for arm in arms},
        differences=_differences(whole),
        correlations=_correlations(whole, config.base.eval.all_ks),
    )


def _values_of(folder: Path, ks: Sequence[int]) -> Values:
    try:
        drawn = per_prompt(answers_of(folder, "sampled"), ks=ks)
        greedy = per_prompt(answers_of(folder, "greedy"), ks=[])
        told = json.loads((folder / "results.json").read_text(encoding="utf-8"))["results"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{folder}: expected an evaluation, got {error!r}; remove it to evaluate again"
        ) from error
    values = {name: np.asarray(each, np.float64) for name, each in drawn.items()}  # None becomes NaN
    values[GREEDY] = np.asarray(greedy["accuracy"], np.float64)
    if "demonstrations" in told:
        values[NLL] = np.asarray([told["demonstrations"][NLL]["value"]])
    return values


def _check_same_start(config: CompareConfig, arms: Sequence[str]) -> None:
    """Refuse to compare runs of one seed that began with different weights."""
    for seed in config.seeds:
        begun = {}
        for arm in arms:
            file = config.out_dir / arm / f"seed-{seed}" / "sft" / "origins.json"
            if file.exists():
                origins = json.loads(file.read_text(encoding="utf-8"))
                start = {key: value["weights"] for key, value in origins.items() if key.startswith("model.")}
                begun[arm] = start
        for arm, start in begun.items():
            if start != begun.get(BAR, start):
                raise UserError(
                    f"seed {seed}: {arm} and {BAR} began with different weights ({start} and {begun[BAR]}); "
                    f"remove {config.out_dir / arm} to train it from those of {BAR}"
                )


_SHARED = ("prompts", "demonstrations", "tokenizer", "rewards", "samples", "rollout", "dtype")
"""Of an evaluation's settings: what all of them have in common."""


def _check_same_evaluation(stages: Sequence[Stage]) -> None:
    """Refuse to compare evaluations of other prompts, by another sampler, or of weights that RL did not have.

    A file may have changed while stages ran, and a run may have been made again.
    """
    first: dict[str, Any] = {}
    for stage in stages:
        folder = stage.done.parent
        settings = json.loads(stage.done.read_text(encoding="utf-8"))["settings"]
        found = {name: settings[name] for name in _SHARED}
        found["rollout"] = {key: value for key, value in found["rollout"].items() if key != "engine"}
        first = first or found
        if different := [name for name in _SHARED if found[name] != first[name]]:
            name = different[0]
            raise UserError(
                f"{folder} was evaluated with {name} {found[name]!r}, and {stages[0].done.parent} with "
                f"{first[name]!r}: they cannot be compared; remove one, and it is evaluated again"
            )
        origins = folder.with_name("grpo") / "origins.json"
        if stage.kind == "eval_sft" and origins.exists():
            begun = json.loads(origins.read_text(encoding="utf-8"))["model.init_checkpoint"]["weights"]
            if settings["weights"] != begun:
                raise UserError(
                    f"{folder} is of other weights than those with which {origins.parent} began: remove "
                    f"{folder.parent}, and this seed is run again"
                )


def _stacked(runs: Mapping[int, dict[str, Values]], seeds: Sequence[int], side: str, name: str) -> Array:
    """[seeds, prompts]."""
    return np.stack([runs[seed][side][name] for seed in seeds])


def _arm_result(
    config: CompareConfig, arm: str, stages: Sequence[Stage], runs: Mapping[int, dict[str, Values]]
) -> ArmResult:
    needed = {name for stage in stages if stage.arm == arm for name in stage.needs}
    own = [stage for stage in stages if stage.arm == arm or stage.name in needed]
    states = states_of(config, own)
    seeds = [seed for seed in config.seeds if seed in runs]
    numbers: dict[str, dict[str, Mean]] = {}
    for side in SIDES if seeds else ():
        names = [
            name for name in runs[seeds[0]][side] if name in (*_TOLD, UNJUDGED) or name.startswith("pass@")
        ]
        means = {name: mean_of(_stacked(runs, seeds, side, name)) for name in names}
        numbers[side] = {name: mean for name, mean in means.items() if mean is not None}
    return ArmResult(
        seeds=seeds,
        numbers=numbers,
        curves={name: _curve(config, arm, name) for name in CURVES},
        failures={
            stage.name: files_of(config, stage).last_error()
            for stage in own
            if states[stage.name] == "failed"
        },
        missing=[name for name, state in states.items() if state in ("missing", "running")],
    )


def _curve(config: CompareConfig, arm: str, name: str) -> list[tuple[int, float]]:
    """The mean over seeds at each step that all of those which have begun have reached."""
    lines = []
    for seed in config.seeds:
        metrics = RunDirectory(path=config.out_dir / arm / f"seed-{seed}" / "grpo").metrics
        rows = read_metrics(metrics) if metrics.exists() else []
        if line := {int(row["step"] or 0): value for row in rows if (value := row.get(name)) is not None}:
            lines.append(line)
    common = sorted(set.intersection(*map(set, lines))) if lines else []
    return [(step, math.fsum(line[step] for line in lines) / len(lines)) for step in common]


def _differences(whole: Mapping[str, Mapping[int, dict[str, Values]]]) -> list[Difference]:
    """Every arm less the bar before and after RL, over the seeds that both have."""
    found: dict[tuple[str, str], tuple[Mean, float | None]] = {}
    bar = whole[BAR]
    for side in SIDES:
        for arm, runs in whole.items():
            seeds = [seed for seed in runs if seed in bar]
            if arm == BAR or not seeds:
                continue
            gap = _stacked(runs, seeds, side, SCORE) - _stacked(bar, seeds, side, SCORE)
            if (mean := mean_of(gap)) is not None:
                found[arm, side] = (mean, p_value(gap))
    told = {f"{arm} {side}": p for (arm, side), (_, p) in found.items() if p is not None}
    corrected = holm(told)
    return [
        Difference(arm=arm, side=side, mean=mean, p=p, p_holm=corrected.get(f"{arm} {side}"))
        for (arm, side), (mean, p) in found.items()
    ]


def _correlations(
    whole: Mapping[str, Mapping[int, dict[str, Values]]], ks: Sequence[int]
) -> dict[str, Correlation | None]:
    """Over the arms that have a seed in common with all others that have any."""
    there = {arm: runs for arm, runs in whole.items() if runs}
    seeds = sorted(set.intersection(*(set(runs) for runs in there.values()))) if there else []
    if not seeds:
        return {}

    def over_arms(side: str, name: str) -> Array:
        return np.stack([_stacked(runs, seeds, side, name) for runs in there.values()])

    sample = next(iter(there.values()))[seeds[0]]["sft"]
    names = [name for name in (*_TOLD, *(f"pass@{k}" for k in ks if k > 1)) if name in sample]
    after = over_arms("grpo", SCORE)
    return {name: correlation_of(over_arms("sft", name), after) for name in names}
