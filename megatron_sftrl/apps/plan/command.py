"""`sftrl plan`: read a run, plan it, say what it needs, and refuse what cannot fit."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_sftrl.apps.plan.job import Hardware, parse_bytes
from megatron_sftrl.apps.plan.memory import Phase
from megatron_sftrl.apps.plan.search import Plan, advice, num_generating, plan_run, search_layouts
from megatron_sftrl.config.load import load_any_config
from megatron_sftrl.config.placement import with_engine
from megatron_sftrl.config.schema import TrainingConfig
from megatron_sftrl.errors import UserError
from megatron_sftrl.losses import build_loss
from megatron_sftrl.models import architecture_of
from megatron_sftrl.observability.run_directory import write_atomically
from megatron_sftrl.trainers.checked import sft_term_loss

# A plan as tables for people and as JSON for programs; estimates are called estimates in both.

_GB = 1e9


def print_plan(plan: Plan, hardware: Hardware, console: Console) -> None:
    """The fullest stage item by item, the other stages in one line each, then the estimates."""
    grid = plan.grid
    sizes = f"tp {grid.tp}, pp {grid.pp}, vp {grid.vp}, cp {grid.cp}, dp {grid.dp}"
    if plan.config.parallel.ep > 1 or plan.config.parallel.etp is not None:
        sizes += f"; experts: ep {grid.ep}, etp {grid.etp}, dp {grid.edp}"
    layers = [plan.config.parallel.first_stage_layers, plan.config.parallel.last_stage_layers]
    for name, count in zip(("first", "last"), layers, strict=True):
        sizes += "" if count is None else f"; {count} layers on the {name} stage"
    console.print(f"{grid.world_size} GPUs: {sizes}", highlight=False)
    stage = plan.memory.fullest
    title = f"GB a GPU on pipeline stage {stage.stage}, the fullest"
    console.print(_memory_table(title, stage.phases, hardware))
    if plan.memory.generators:
        title = f"GB a GPU on {num_generating(plan.config)} more GPUs, which generate (rollout.devices)"
        console.print(_memory_table(title, plan.memory.generators, hardware))
    others = [
        f"stage {stage.stage}: {stage.fullest.total / _GB:.1f} ({stage.fullest.name})"
        for stage in plan.memory.stages
    ]
    if len(others) > 1:
        console.print("GB at the fullest moment: " + ", ".join(others), highlight=False)
    rollout = plan.memory.rollout
    if rollout is not None and (grpo := plan.config.grpo) is not None:
        console.print(
            f"Rollouts by {grpo.rollout.engine}: {rollout.num_concurrent} responses of full length at once "
            "per engine, "
            f"{rollout.bytes_per_token} bytes of keys and values a token and GPU",
            highlight=False,
        )
    if plan.memory.host_reference:
        console.print(
            f"Host memory: {plan.memory.host_reference / _GB:.1f} GB a node for the offloaded reference",
            highlight=False,
        )
    if plan.memory.host_optimizer:
        console.print(
            f"Host memory: {plan.memory.host_optimizer / _GB:.1f} GB a node for the optimizer's share of "
            "optim.cpu_offload",
            highlight=False,
        )
    if plan.memory.host_checkpoint:
        console.print(
            f"Host memory: at most {plan.memory.host_checkpoint / _GB:.1f} GB a node for the copies of an "
            "asynchronous save (more where torch rounds pinned blocks up to powers of two)",
            highlight=False,
        )
    if plan.memory.host_experts:
        console.print(
            f"Host memory: at most {plan.memory.host_experts / _GB:.1f} GB a node for the experts of "
            "rollout.router_replay",
            highlight=False,
        )
    console.print(_time_table(plan))
    for line in assumptions(plan, hardware):
        console.print(line, highlight=False)


def print_layouts(plans: Sequence[Plan], console: Console, *, num_shown: int) -> None:
    """The fastest layouts, one row each."""
    table = Table(title=f"{len(plans)} layouts fit; fastest by estimate", title_justify="left")
    for column in ("seconds (est.)", "MFU (est.)", "bubble", "GB", "layout"):
        table.add_column(column, justify="left" if column == "layout" else "right", overflow="fold")
    for plan in plans[:num_shown]:
        estimate = plan.estimate
        table.add_row(
            f"{estimate.total:.2f}",
            f"{estimate.utilisation:.1%}",
            f"{estimate.bubble:.1%}",
            f"{plan.memory.fullest.fullest.total / _GB:.1f}",
            plan.overrides,
        )
    console.print(table)


def as_json(plan: Plan, hardware: Hardware, layouts: Sequence[Plan]) -> dict[str, Any]:
    """Everything that the tables show, in bytes and seconds."""
    return {
        "hardware": asdict(hardware),
        "assumptions": assumptions(plan, hardware),
        "plan": _plan_values(plan),
        "layouts": [_plan_values(each) for each in layouts],
    }


def assumptions(plan: Plan, hardware: Hardware) -> list[str]:
    """What the numbers rest on."""
    h = hardware
    kernels = {
        "transformer_engine": "activations: formula for Transformer Engine (arXiv:2205.05198), not measured",
        "torch": "activations: the package's own layers, within 15 % of measured CPU peaks",
    }[h.kernels]
    return [
        "Parameters, gradients and optimizer are exact; " + kernels + ".",
        f"Estimates assume {h.peak_flops / 1e12:.0f} TFLOP/s and {h.memory_bandwidth / 1e9:.0f} GB/s at "
        f"{h.efficiency:.0%}, NVLink {h.nvlink / 1e9:.0f} and network {h.network / 1e9:.0f} GB/s a GPU at "
        f"{h.link_efficiency:.0%}, {h.gpus_per_node} GPUs a node, and sequences of "
        f"{plan.estimate.sequence_length} tokens.",
    ]


def _memory_table(title: str, phases: Sequence[Phase], hardware: Hardware) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for phase in phases:
        table.add_column(phase.name, justify="right")
    names = list(dict.fromkeys(name for phase in phases for name in phase.items))
    for name in names:
        values = [phase.items.get(name) for phase in phases]
        table.add_row(name, *("" if value is None else f"{value / _GB:.2f}" for value in values))
    table.add_section()
    table.add_row("total", *(f"{phase.total / _GB:.2f}" for phase in phases))
    table.add_row("of", *(f"{hardware.gpu_memory / _GB:.2f}" for _ in phases))
    return table


def _time_table(plan: Plan) -> Table:
    estimate = plan.estimate
    table = Table(title="Estimate of one step", title_justify="left")
    table.add_column("")
    table.add_column("", justify="right")
    for name, seconds in estimate.seconds.items():
        table.add_row(name, f"{seconds:.2f} s")
    table.add_row("step", f"{estimate.total:.2f} s")
    table.add_section()
    table.add_row("model FLOPs utilisation while training", f"{estimate.utilisation:.1%}")
    table.add_row("pipeline bubble", f"{estimate.bubble:.1%}")
    table.add_row("micro-batches a rank and update", str(estimate.num_microbatches))
    num_gpus = plan.grid.world_size + (
        plan.config.grpo.rollout.devices if plan.config.grpo is not None else 0
    )
    table.add_row("tokens a second and GPU", f"{estimate.tokens / estimate.total / num_gpus:.0f}")
    for axis, size in estimate.gigabytes.items():
        table.add_row(f"sent by a GPU over {axis}", f"{size:.2f} GB")
    return table


def _plan_values(plan: Plan) -> dict[str, Any]:
    return {
        "overrides": plan.overrides,
        "grid": asdict(plan.grid),
        "fits": not plan.problems,
        "problems": list(plan.problems),
        "host_reference": plan.memory.host_reference,
        "host_optimizer": plan.memory.host_optimizer,
        "host_checkpoint": plan.memory.host_checkpoint,
        "host_experts": plan.memory.host_experts,
        "stages": [
            {phase.name: {**phase.items, "total": phase.total} for phase in stage.phases}
            for stage in plan.memory.stages
        ],
        "generators": {phase.name: {**phase.items, "total": phase.total} for phase in plan.memory.generators},
        "estimate": {**asdict(plan.estimate), "total_seconds": plan.estimate.total},
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """What `sftrl plan` is asked.

    Args:
        overrides: key=value words.
        mean_length: tokens of a sequence in estimates; the longest when not given.
        is_search: look for layouts, too, of which the table has num_shown.
        json: file for everything that was found.
    """

    config: str
    overrides: Sequence[str]
    num_gpus: int
    hardware: Hardware
    mean_length: int | None = None
    is_search: bool = False
    num_shown: int = 8
    json: Path | None = None


def request_of(parsed: argparse.Namespace) -> PlanRequest:
    """The request that a command line makes; UserError for a size without a unit or a rate not positive."""
    hardware = Hardware(
        gpu_memory=parse_bytes(parsed.gpu_memory),
        reserve=parse_bytes(parsed.reserve),
        gpus_per_node=parsed.gpus_per_node,
        peak_flops=parsed.peak_tflops * 1e12,
        fp8_flops=parsed.fp8_tflops * 1e12,
        memory_bandwidth=parsed.hbm * 1e9,
        nvlink=parsed.nvlink * 1e9,
        network=parsed.network * 1e9,
        host_link=parsed.host_link * 1e9,
        host_memory=parsed.host_memory * 1e9,
        efficiency=parsed.efficiency,
        link_efficiency=parsed.link_efficiency,
        kernels=parsed.kernels,
    )
    return PlanRequest(
        config=parsed.config,
        overrides=parsed.overrides,
        num_gpus=parsed.gpus,
        hardware=hardware,
        mean_length=parsed.mean_length,
        is_search=parsed.search,
        num_shown=parsed.top,
        json=parsed.json,
    )


def run_plan(request: PlanRequest) -> None:
    """Print the plan, and with is_search the layouts that fit.

    Raises:
        UserError: settings that the run itself would refuse, or a run that does not fit; then with changes
            that were tried and do.
    """
    console = Console(width=None if Console().is_terminal else 160)
    planner = _Planner(request)
    config = planner.config_with([])
    layouts: Sequence[Plan] = []
    if request.is_search:
        layouts = planner.search([], request.num_gpus)
        print_layouts(layouts, console, num_shown=request.num_shown)
    plan = planner.plan(config)
    print_plan(plan, request.hardware, console)
    if request.json is not None:
        values = as_json(plan, request.hardware, layouts)
        write_atomically(request.json, json.dumps(values, indent=2) + "\n")
    if plan.problems:
        changes = advice(config, request.num_gpus, attempt=planner.attempt, search=planner.search)
        raise UserError(
            "\n  ".join(
                [
                    f"{request.config} does not fit on {request.num_gpus} GPUs:",
                    *plan.problems,
                    "it fits with any one of:" if len(changes) > 1 else "what to change:",
                    *changes,
                ]
            )
        )


class _Planner:
    """The request's run under further overrides."""

    def __init__(self, request: PlanRequest) -> None:
        self._request = request
        config = self.config_with([])
        self._architecture = architecture_of(config.model)
        self._needs = build_loss(config.loss.name, config.loss.options, modules=config.loss.modules).needs
        sft_loss = None if config.grpo is None else sft_term_loss(config.grpo)
        self._needs += () if sft_loss is None else sft_loss.needs

    def config_with(self, words: Sequence[str]) -> TrainingConfig:
        """The run's configuration; it generates as on GPUs with vLLM where it leaves the engine open."""
        config = load_any_config(self._request.config, [*self._request.overrides, *words])
        if config.grpo is None:
            return config
        place = "on the GPUs that are planned for"
        return with_engine(config.grpo, is_cuda=True, has_vllm=True, place=place)[0]

    def plan(self, config: TrainingConfig) -> Plan:
        """The plan in the configuration's own layout."""
        return plan_run(
            self._architecture,
            config,
            self._request.num_gpus,
            self._request.hardware,
            loss_needs=self._needs,
            mean_length=self._request.mean_length,
        )

    def attempt(self, words: Sequence[str]) -> Plan | None:
        """The same under further overrides; None where the run's checks refuse them."""
        try:
            return self.plan(self.config_with(words))
        except UserError:
            return None

    def search(self, words: Sequence[str], num_gpus: int) -> list[Plan]:
        """Layouts that fit."""
        return search_layouts(
            self._architecture,
            self.config_with(words),
            num_gpus,
            self._request.hardware,
            loss_needs=self._needs,
            mean_length=self._request.mean_length,
        )
