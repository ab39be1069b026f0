"""A plan as tables for people and as JSON for programs; estimates are called estimates in both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_sftrl.planning.hardware import Hardware
from megatron_sftrl.planning.search import Plan

_GB = 1e9


def print_plan(plan: Plan, hardware: Hardware, console: Console) -> None:
    """The fullest stage item by item, the other stages in one line each, then the estimates."""
    grid = plan.grid
    sizes = f"tp {grid.tp}, pp {grid.pp}, vp {grid.vp}, cp {grid.cp}, dp {grid.dp}"
    if plan.config.parallel.ep > 1 or plan.config.parallel.etp is not None:
        sizes += f"; experts: ep {grid.ep}, etp {grid.etp}, dp {grid.edp}"
    console.print(f"{grid.world_size} GPUs: {sizes}", highlight=False)
    console.print(_memory_table(plan, hardware))
    others = [
        f"stage {stage.stage}: {stage.fullest.total / _GB:.1f} ({stage.fullest.name})"
        for stage in plan.memory.stages
    ]
    if len(others) > 1:
        console.print("GB at the fullest moment: " + ", ".join(others), highlight=False)
    rollout = plan.memory.rollout
    if rollout is not None:
        console.print(
            f"Rollouts: {rollout.num_concurrent} responses of full length at once per engine, "
            f"{rollout.bytes_per_token} bytes of keys and values a token and GPU",
            highlight=False,
        )
    if plan.memory.host_reference:
        console.print(
            f"Host memory: {plan.memory.host_reference / _GB:.1f} GB a node for the offloaded reference",
            highlight=False,
        )
    if plan.memory.host_checkpoint:
        console.print(
            f"Host memory: at most {plan.memory.host_checkpoint / _GB:.1f} GB a node for the copies of an "
            "asynchronous save (more where torch rounds pinned blocks up to powers of two)",
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


def _memory_table(plan: Plan, hardware: Hardware) -> Table:
    stage = plan.memory.fullest
    table = Table(title=f"GB a GPU on pipeline stage {stage.stage}, the fullest", title_justify="left")
    table.add_column("")
    for phase in stage.phases:
        table.add_column(phase.name, justify="right")
    names = list(dict.fromkeys(name for phase in stage.phases for name in phase.items))
    for name in names:
        values = [phase.items.get(name) for phase in stage.phases]
        table.add_row(name, *("" if value is None else f"{value / _GB:.2f}" for value in values))
    table.add_section()
    table.add_row("total", *(f"{phase.total / _GB:.2f}" for phase in stage.phases))
    table.add_row("of", *(f"{hardware.gpu_memory / _GB:.2f}" for _ in stage.phases))
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
    table.add_row("tokens a second and GPU", f"{estimate.tokens / estimate.total / plan.grid.world_size:.0f}")
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
        "host_checkpoint": plan.memory.host_checkpoint,
        "stages": [
            {phase.name: {**phase.items, "total": phase.total} for phase in stage.phases}
            for stage in plan.memory.stages
        ],
        "estimate": {**asdict(plan.estimate), "total_seconds": plan.estimate.total},
    }
