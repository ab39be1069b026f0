"""`sftrl doctor reward`: what constant and other wrong answers earn on a run's rows, beside right ones."""

from __future__ import annotations

import argparse
import json
import statistics
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_sftrl.apps.doctor.reward_candidates import Judged, Mathematics, judge_all
from megatron_sftrl.apps.doctor.reward_findings import Findings, RewardFinding, is_full
from megatron_sftrl.apps.doctor.reward_rows import DoctorRows, check_rows, rows_of_files, rows_of_tasks
from megatron_sftrl.config.load import load_config, options_of
from megatron_sftrl.config.rewards import RewardSection, RewardWorkersSection
from megatron_sftrl.config.schema import GrpoConfig
from megatron_sftrl.data.tokenizer import load_tokenizer
from megatron_sftrl.errors import UserError
from megatron_sftrl.observability.run_directory import write_atomically
from megatron_sftrl.registry import load_module
from megatron_sftrl.rl.rewards.pool import RewardPool
from megatron_sftrl.rl.rewards.registry import DEFAULT_REGISTRY, Reward


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardRequest:
    """What `sftrl doctor reward` is asked: a run, or a reward by name with files or tasks of reasoning_gym.

    Args:
        rows: of the sample; with tasks, of each.
        json: file for everything that was found.
    """

    config: str | None
    overrides: Sequence[str]
    reward: str | None
    options: Sequence[str]
    modules: Sequence[str]
    data: Sequence[Path]
    tasks: Sequence[str]
    rows: int
    seed: int
    json: Path | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Examined:
    """What was found of one reward; `full` is the score that counts as full marks, row by row."""

    judged: Sequence[Judged]
    findings: Sequence[RewardFinding]
    full: Sequence[float]


def request_of(parsed: argparse.Namespace) -> RewardRequest:
    """The request that a command line makes (add_reward_arguments)."""
    return RewardRequest(
        config=parsed.config,
        overrides=parsed.overrides,
        reward=parsed.reward,
        options=parsed.option,
        modules=parsed.module,
        data=parsed.data,
        tasks=parsed.task,
        rows=parsed.rows,
        seed=parsed.seed,
        json=parsed.json,
    )


def run_reward_doctor(request: RewardRequest) -> bool:
    """Print for each reward what every candidate earns, and what is found; whether all properties hold.

    Raises:
        UserError: a request that does not fit together, a configuration, row or reward that cannot be used.
    """
    sections, workers, sample = _what_is_asked(request)
    told = "made" if sample.is_made else f"of {sample.num_rows}"
    print(f"doctor: {len(sample.rows)} rows {told}, seed {request.seed}", flush=True)
    found: dict[str, Examined] = {}
    mathematics = RewardPool([RewardSection(name="math")], workers)
    with RewardPool(sections, workers) as pool, mathematics:
        check_rows(pool.rewards, sample.rows)
        for index, reward in enumerate(pool.rewards):
            judged = judge_all(pool, index, sample, request.seed)
            examined = Findings(reward, sample.rows, judged, Mathematics(mathematics))
            found[reward.name] = Examined(judged=judged, findings=examined.all(), full=examined.full_marks)
            _print(reward, found[reward.name])
    data = [_data_finding(sample)] if sample.is_made else []
    for finding in data:
        _print_finding(finding)
    everything = [*data, *(finding for one in found.values() for finding in one.findings)]
    num_bad = sum(bool(finding.problems) for finding in everything)
    print(
        f"{num_bad} of {len(everything)} properties FAILED"
        if num_bad
        else f"all {len(everything)} properties hold"
    )
    if request.json is not None:
        values = _as_json(request, sample, found, data)
        write_atomically(request.json, json.dumps(values, indent=2) + "\n")
    return not num_bad


# What is examined, on what.


def _what_is_asked(
    request: RewardRequest,
) -> tuple[Sequence[RewardSection], RewardWorkersSection, DoctorRows]:
    """The rewards with the limits of their workers, and the rows."""
    if request.json is not None and not request.json.parent.is_dir():
        raise UserError(f"--json: no such directory {request.json.parent}")
    if request.rows < 1:
        raise UserError(f"--rows: expected at least 1, got {request.rows}")
    own = (request.reward, *request.options, *request.modules, *request.data, *request.tasks)
    if request.config is not None:
        if any(own):
            raise UserError(
                "doctor reward: expected run.yaml, or --reward with --data or --task, got both; options of "
                "the run's rewards and its data are changed by key=value"
            )
        return _of_run(request, request.config)
    if bool(request.data) == bool(request.tasks):
        raise UserError(
            "doctor reward: expected run.yaml, or --reward NAME --data FILE, or --task NAME, "
            f"got {'both --data and --task' if request.data else 'none of them'}"
        )
    if request.tasks and request.reward not in (None, "reasoning_gym"):
        raise UserError(f"--task: expected --reward reasoning_gym or none, got {request.reward}")
    name = "reasoning_gym" if request.tasks else request.reward or _only_reward_of(request.modules)
    options = options_of(request.options)
    if taken := sorted(options.keys() & RewardSection.model_fields.keys()):
        raise UserError(
            f"--option {taken[0]}: expected an option of the reward {name!r}, got one of its section"
        )
    section = RewardSection.model_validate({**options, "name": name, "modules": list(request.modules)})
    if request.tasks:
        sample = rows_of_tasks(request.tasks, count=request.rows, seed=request.seed)
    else:
        sample = rows_of_files(request.data, count=request.rows, seed=request.seed, key="--data")
    return [section], RewardWorkersSection(), sample


def _of_run(
    request: RewardRequest, path: str
) -> tuple[Sequence[RewardSection], RewardWorkersSection, DoctorRows]:
    config = load_config(path, request.overrides, schema=GrpoConfig)
    sample = rows_of_files(
        config.data.train_paths,
        count=request.rows,
        seed=request.seed,
        key="data.train",
        tokenizer=load_tokenizer(config.tokenizer),
        columns=config.data.columns,
    )
    return config.rewards, config.reward_workers, sample


def _only_reward_of(modules: Sequence[str]) -> str:
    """The one reward that the modules register."""
    if not modules:
        raise UserError("doctor reward: expected --reward NAME or --module FILE beside --data, got neither")
    files = [str(Path(load_module(module, key="--module").__file__ or "").resolve()) for module in modules]
    names = [name for name in DEFAULT_REGISTRY.names() if DEFAULT_REGISTRY.get(name).origin in files]
    if len(names) != 1:
        raise UserError(
            f"doctor reward: expected one reward registered in {', '.join(modules)}, got "
            f"{', '.join(names) or 'none'}; choose with --reward NAME"
        )
    return names[0]


# What is told.


def _print(reward: Reward, examined: Examined) -> None:
    table = Table(title=f"reward {reward.name}", title_justify="left")
    table.add_column("answer")
    table.add_column("written as", overflow="fold")
    for name in ("rows", "mean", "full marks", "failed", "median ms", "max ms"):
        table.add_column(name, justify="right")
    for one in examined.judged:
        numbers = _numbers(one, examined.full)
        mean, full = numbers["mean"], numbers["full_marks"]
        table.add_row(
            one.candidate.name,
            escape(one.candidate.form.replace("\n", " ")),
            str(numbers["rows"]),
            "-" if mean is None else f"{mean:.3f}",
            "-" if full is None else f"{full:.0%}",
            str(sum(numbers["failed"].values())),
            f"{1000 * numbers['median_s']:.1f}",
            f"{1000 * numbers['max_s']:.1f}",
        )
    Console(width=None if Console().is_terminal else 120).print(table)
    for finding in examined.findings:
        _print_finding(finding)


def _print_finding(finding: RewardFinding) -> None:
    print(f"{finding.property:<8}{'FAILED' if finding.problems else 'ok':<8}{finding.says}")
    for line in (*finding.problems, *finding.notes):
        print(textwrap.indent(line, " " * 4), flush=True)


def _numbers(one: Judged, full: Sequence[float]) -> dict[str, Any]:
    """What the table has of a candidate: scores of the first pass, failures and times of both."""
    scores = [(score, most) for place, most in enumerate(full) if (score := one.score(place)) is not None]
    seconds = [part.seconds for part in one.parts]
    return {
        "rows": sum(part is not None for part in one.first),
        "mean": one.mean,
        "full_marks": sum(is_full(score, most) for score, most in scores) / len(scores) if scores else None,
        "failed": dict(Counter(part.outcome for part in one.parts if part.outcome != "ok")),
        "median_s": statistics.median(seconds),
        "max_s": max(seconds),
    }


def _as_json(
    request: RewardRequest, sample: DoctorRows, found: Mapping[str, Examined], data: Sequence[RewardFinding]
) -> dict[str, Any]:
    return {
        "seed": request.seed,
        "rows": [row.source for row in sample.rows],
        "num_rows": sample.num_rows,
        "rewards": {
            name: {
                "candidates": [
                    {
                        "name": one.candidate.name,
                        "form": one.candidate.form,
                        **_numbers(one, examined.full),
                        "scores": [one.score(place) for place in range(len(sample.rows))],
                    }
                    for one in examined.judged
                ],
                "findings": [asdict(finding) for finding in examined.findings],
            }
            for name, examined in found.items()
        },
        "data": [asdict(finding) for finding in data],
    }


def _data_finding(sample: DoctorRows) -> RewardFinding:
    return RewardFinding(property="data", says="the same seed makes the same rows", problems=sample.problems)
