"""The checks in their order: cheap and local ones first, so that a bad node is named before it can hang."""

from __future__ import annotations

import contextlib
import statistics
import sys
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import cast

import torch
from rich.console import Console
from rich.table import Table

from megatron_sftrl.apps.plan.model_state import grid_of, model_state
from megatron_sftrl.apps.preflight.network import (
    Meeting,
    all_reduce_rate,
    clock_after_barrier,
    unreachable_neighbour,
    world,
)
from megatron_sftrl.apps.preflight.node import (
    NodeFacts,
    existing_ancestor,
    is_leader,
    leave_mark,
    node_facts,
    node_name,
    see_mark,
    space_problem,
)
from megatron_sftrl.config.data import DataSection
from megatron_sftrl.config.schema import GrpoConfig, RunConfig, TrainingConfig
from megatron_sftrl.data.chat import encode_prompt, tokenize_sequences
from megatron_sftrl.data.formats import read_formatted
from megatron_sftrl.data.sources import check_source
from megatron_sftrl.engine.device import check_device, try_transformer_engine
from megatron_sftrl.engine.megatron_config import check_megatron, uses_transformer_engine
from megatron_sftrl.errors import UserError, error_of
from megatron_sftrl.models.architecture import Architecture
from megatron_sftrl.rollout.build import check_engine, engine_here
from megatron_sftrl.trainers.checked import CheckedRun, checked_configuration

# Compares what all nodes found; the odd one is named. Pure functions.

LARGEST_SKEW_S = 5.0
"""Clocks that differ by more make time stamps of files and logs of different nodes useless."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The outcome of one check.

    Args:
        detail: what was seen.
        problems: what is wrong, with the node's name and what to do; empty when all is well.
        failures: what went wrong and may pass, such as a stale file handle; told like the problems.
    """

    check: str
    detail: str
    problems: tuple[str, ...] = ()
    failures: tuple[str, ...] = ()


def compare_processes(facts: Sequence[NodeFacts]) -> Finding:
    """Every node runs the same number of processes on the same GPUs, one each."""
    nodes = {fact.node: fact for fact in facts}
    counts = {name: str(fact.local_processes) for name, fact in nodes.items()}
    problems = [
        f"{name} runs {count} processes, most nodes {usual}: submit to nodes that are alike"
        for name, count, usual in _odd_ones(counts)
    ]
    gpus = {name: "; ".join(fact.gpus) or "none" for name, fact in nodes.items()}
    problems += [
        f"{name} has the GPUs [{found}], most nodes [{usual}]: submit to nodes that are alike, or exclude it"
        for name, found, usual in _odd_ones(gpus)
    ]
    problems += [
        f"{name} has GPUs of several types [{gpus[name]}]: submit to nodes with GPUs of one"
        for name, fact in nodes.items()
        if len(set(fact.gpus)) > 1
    ]
    problems += [
        f"{name} runs {fact.local_processes} processes on {len(fact.gpus)} GPUs: start one a GPU"
        for name, fact in nodes.items()
        if fact.gpus and fact.local_processes > len(fact.gpus)
    ]
    shown = Counter(f"{len(fact.gpus)} GPUs ({fact.gpus[0]})" for fact in nodes.values() if fact.gpus)
    seen = ", ".join(f"{count} x {what}" for what, count in shown.items()) or "no GPU"
    return Finding(
        check="processes and GPUs",
        detail=f"{len(facts)} processes on {len(nodes)} node(s); {seen}",
        problems=tuple(problems),
    )


def compare_versions(facts: Sequence[NodeFacts]) -> Finding:
    """Every process has the same packages."""
    problems = []
    for package in facts[0].versions:
        found = {fact.node: fact.versions[package] for fact in facts}
        problems += [
            f"{node} has {package} {version}, most nodes {usual}: use one environment or image for all"
            for node, version, usual in _odd_ones(found)
        ]
    shown = ("torch", "megatron-core", "transformers")
    detail = ", ".join(f"{name} {facts[0].versions[name]}" for name in shown)
    return Finding(check="versions", detail=detail, problems=tuple(problems))


def compare_clocks(clocks: Mapping[str, float]) -> Finding:
    """The clocks of the nodes, in seconds since 1970, read after one barrier, agree."""
    middle = statistics.median_low(clocks.values())
    skews = {node: clock - middle for node, clock in clocks.items()}
    problems = [
        f"the clock of {node} is {skew:+.1f} s off: let it be set (chrony, NTP), or exclude the node"
        for node, skew in skews.items()
        if abs(skew) > LARGEST_SKEW_S
    ]
    largest = max(map(abs, skews.values()))
    return Finding(check="clocks", detail=f"within {largest:.2f} s", problems=tuple(problems))


def _odd_ones(values: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """(node, its value, the usual value) of every node that is not like most."""
    usual = Counter(values.values()).most_common(1)[0][0]
    return [(node, value, usual) for node, value in values.items() if value != usual]


# The model's state against the memory of a GPU: what can never fit is told before anything is built.


def own_gpu_bytes() -> int | None:
    """Memory of this node's first GPU; None without one."""
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def memory_problem(
    config: TrainingConfig, architecture: Architecture, *, world_size: int, gpu_bytes: int | None
) -> tuple[str, str | None]:
    """(what was seen, what is wrong): a lower bound, without activations, which `sftrl plan` estimates.

    `gpu_bytes` is of this process's GPU, None on the CPU; the run's own checks have accepted `config`.
    """
    num_generators = config.grpo.rollout.devices if config.grpo is not None else 0
    grid = grid_of(config.parallel, world_size - num_generators)
    is_offloaded = config.reference is not None and config.reference.placement == "offload"
    needed = 0
    for stage in range(grid.pp):
        state = model_state(architecture, config, grid, stage=stage)
        reference = 0 if is_offloaded else state.reference
        needed = max(needed, state.parameters + state.gradients + state.optimizer + reference)
    detail = f"weights, gradients and optimizer state take {needed / 1e9:.2f} GB a process"
    if gpu_bytes is None or needed < gpu_bytes:
        return detail, None
    return detail, (
        f"{detail}, its GPU has {gpu_bytes / 1e9:.2f} GB: take more GPUs, or cut the model further "
        "(parallel.tp, parallel.pp, parallel.distributed_optimizer); sftrl plan --search finds layouts"
    )


def run_preflight(config: TrainingConfig, *, timeout_s: float, least_rate: float | None) -> None:
    """Check nodes, network, disks and the configuration; every process of the job calls it.

    Args:
        timeout_s: how long to wait for a process that does not answer.
        least_rate: bytes per second that all-reduce must reach; None only reports it.
    Raises:
        UserError: on every process: all that is wrong, with the names of the nodes.
        RuntimeError: the same, where nothing but failures was found, which may pass.
    """
    with Meeting(timeout_s) as meeting:
        findings = _findings(meeting, config, timeout_s=timeout_s, least_rate=least_rate)
    if meeting.rank == 0:
        Console(stderr=True).print(_table(findings))
    problems = [problem for finding in findings for problem in finding.problems]
    told = [*problems, *(failure for finding in findings for failure in finding.failures)]
    if told:
        kind = UserError if problems else RuntimeError
        raise kind("\n  ".join([f"preflight found {len(told)} problem(s)", *told]))
    if meeting.rank == 0:
        print("preflight: all is well", file=sys.stderr)


def _findings(
    meeting: Meeting, config: TrainingConfig, *, timeout_s: float, least_rate: float | None
) -> list[Finding]:
    facts = [
        NodeFacts(**{**raw, "gpus": tuple(raw["gpus"])})
        for raw in meeting.gather("arriving", asdict(node_facts()))
    ]
    leaders: dict[str, int] = {}
    for rank, fact in enumerate(facts):
        leaders.setdefault(fact.node, rank)
    findings = [compare_processes(facts), compare_versions(facts)]
    findings += _configuration(meeting, config)
    findings += [_shared_directory(meeting, config, leaders), _ports(meeting, leaders)]
    if not any(finding.problems or finding.failures for finding in findings):
        # A group of processes that are not alike might hang.
        findings += _network(meeting, facts, leaders, timeout_s=timeout_s, least_rate=least_rate)
    return findings


def _configuration(meeting: Meeting, config: TrainingConfig) -> list[Finding]:
    """On each node: the configuration and its files, the first rows of the data, memory and disk."""
    runs: list[CheckedRun[TrainingConfig]] = []
    seen = {"device": "", "memory": "", "space": ""}

    def try_device() -> None:
        check_device(config)
        if not torch.cuda.is_available():
            seen["device"] = "no CUDA: the CPU, and PyTorch's operators"
        elif uses_transformer_engine(config.model, is_cuda=True):
            seen["device"] = try_transformer_engine()
        else:
            seen["device"] = "CUDA, and PyTorch's operators"

    def read_configuration() -> None:
        checked = checked_configuration(config if config.grpo is None else engine_here(config.grpo))
        check_megatron(config, checked.architecture, is_cuda=torch.cuda.is_available())
        if (grpo := checked.config.grpo) is not None:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            check_engine(grpo, checked.architecture, device, world_size=meeting.size)
        runs.append(checked)

    def read_data() -> None:
        for checked in runs:
            _read_first_rows(checked)

    def measure_memory() -> None:
        for checked in runs:
            seen["memory"], problem = memory_problem(
                config, checked.architecture, world_size=meeting.size, gpu_bytes=own_gpu_bytes()
            )
            if problem:
                raise UserError(problem)

    def measure_space() -> None:
        for checked in runs:
            seen["space"], problem = space_problem(config, checked.architecture)
            if problem:
                raise UserError(problem)

    checks = {
        "device and layers": try_device,
        "configuration, model and tokenizer": read_configuration,
        "data": read_data,
        "memory for the model": measure_memory,
        "space for checkpoints": measure_space,
    }
    findings = []
    for name, check in checks.items():
        problem, is_users = _problem_of(check) if is_leader() else (None, False)
        said = meeting.gather(name, [node_name(), problem, is_users])
        details = {
            "device and layers": seen["device"],
            "configuration, model and tokenizer": f"{type(config).__name__}, loss {config.loss.name}",
            "data": f"first rows of {len(_data_files(config))} file(s)",
            "memory for the model": seen["memory"],
            "space for checkpoints": seen["space"],
        }
        problems, failures = _merged(said)
        findings.append(Finding(check=name, detail=details[name], problems=problems, failures=failures))
    return findings


def _problem_of(check: Callable[[], None]) -> tuple[str | None, bool]:
    """What a check raised, and whether the user can fix it."""
    try:
        check()
    except UserError as error:
        return str(error), True
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        return text, isinstance(error, OSError) and isinstance(error_of(text, error), UserError)
    return None, False


def _merged(said: Sequence[tuple[str, str | None, bool]]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Problems of the user's and failures with the nodes that have them; what all share is told once."""
    nodes: dict[tuple[bool, str], list[str]] = {}
    for node, problem, is_users in said:
        if problem is not None:
            nodes.setdefault((is_users, problem), []).append(node)
    told = [
        (is_users, f"{', '.join(sorted(set(names)))}: {text}") for (is_users, text), names in nodes.items()
    ]
    return tuple(text for is_users, text in told if is_users), tuple(
        text for is_users, text in told if not is_users
    )


def _data_files(config: TrainingConfig) -> list:
    data = cast(RunConfig | GrpoConfig, config).data
    return [*data.train_paths, *data.valid]


def _read_first_rows(checked: CheckedRun[TrainingConfig]) -> None:
    """The first row of each file becomes tokens; the run itself reads all of them."""
    data = cast(RunConfig | GrpoConfig, checked.config).data
    kind = "demonstrations" if checked.config.grpo is None else "prompts"
    keys = ["train"] * len(data.train_paths) + ["valid"] * len(data.valid)
    for key, path in zip(keys, _data_files(checked.config), strict=True):
        check_source(path, f"data.{key}")
        row = next(read_formatted(path, kind, columns=data.columns, key=f"data.{key}"), None)
        if row is None:
            raise UserError(f"data.{key}: {path} holds no row: expected at least one")
        try:
            if kind == "prompts":
                encode_prompt(checked.tokenizer, row.conversation())
                row.values_with_answer()
            elif isinstance(data, DataSection):
                tokenize_sequences(checked.tokenizer, row.conversation(), data.learning)
        except ValueError as error:
            raise UserError(f"{row.source}: {error}") from error


def _shared_directory(meeting: Meeting, config: TrainingConfig, leaders: dict[str, int]) -> Finding:
    """Rank 0 leaves a file for every node, and every node one for rank 0."""
    directory = existing_ancestor(config.run_dir)
    name = meeting.gather("naming a file", f".preflight-{uuid.uuid4().hex}")[0]
    mine = f"{name}.{leaders[node_name()]}"
    takes_part = leaders[node_name()] == meeting.rank
    try:
        problem, is_users = None, False
        if takes_part:
            problem, is_users = _problem_of(lambda: leave_mark(directory, mine))
            problem = problem and f"cannot write to {directory}: {problem}; choose another run_dir"
        written = meeting.gather("writing to the run directory", [node_name(), problem, is_users])
        unseen = None
        if takes_part and not any(problem for _, problem, _ in written):
            marks = [mine, f"{name}.0"] if meeting.rank else [f"{name}.{rank}" for rank in leaders.values()]
            nodes = {f"{name}.{rank}": node for node, rank in leaders.items()}
            absent = [nodes[mark] for mark in marks if not see_mark(directory, mark)]
            if absent:
                unseen = (
                    f"in {directory} the file that {', '.join(absent)} wrote is not to be seen: run_dir must "
                    "lie on a file system that all nodes share"
                )
        seen = meeting.gather("reading the run directory", [node_name(), unseen, True])
    finally:
        with contextlib.suppress(OSError):
            (directory / mine).unlink()
    detail = f"{directory}, written and read by {len(leaders)} node(s)"
    problems, failures = _merged([*written, *seen])
    return Finding(check="run directory", detail=detail, problems=problems, failures=failures)


def _ports(meeting: Meeting, leaders: dict[str, int]) -> Finding:
    problem = unreachable_neighbour(meeting, leaders)
    said = meeting.gather("connections", [node_name(), problem])
    detail = f"each of {len(leaders)} node(s) reached by the one before it"
    return Finding(check="ports", detail=detail, problems=tuple(problem for _, problem in said if problem))


def _network(
    meeting: Meeting,
    facts: Sequence[NodeFacts],
    leaders: dict[str, int],
    *,
    timeout_s: float,
    least_rate: float | None,
) -> list[Finding]:
    with world(meeting, timeout_s) as device:
        rate = min(meeting.gather("all-reduce", all_reduce_rate(device)))
        clocks = meeting.gather("clocks", clock_after_barrier())
    problems = []
    if least_rate is not None and rate < least_rate:
        problems.append(
            f"all-reduce reaches {rate / 1e9:.2f} GB/s, less than --min-bandwidth {least_rate / 1e9:.2f}: "
            f"run it on halves of the nodes ({', '.join(leaders)}) to find the slow one"
        )
    alone = "one process, nothing to reduce"
    return [
        Finding(
            check="all-reduce over all processes",
            detail=alone if meeting.size == 1 else f"{rate / 1e9:.2f} GB/s of bus bandwidth, {device.type}",
            problems=tuple(problems),
        ),
        compare_clocks({facts[rank].node: clocks[rank] for rank in leaders.values()}),
    ]


def _table(findings: Sequence[Finding]) -> Table:
    table = Table("check", "", "what was seen", title="preflight")
    for finding in findings:
        is_bad = finding.problems or finding.failures
        table.add_row(finding.check, "bad" if is_bad else "ok", finding.detail)
    return table
