"""`sftrl plan`: read a run, plan it, say what it needs, and refuse what cannot fit."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from megatron_sftrl.config.load import load_any_config
from megatron_sftrl.config.schema import TrainingConfig
from megatron_sftrl.errors import UserError
from megatron_sftrl.losses import build_loss
from megatron_sftrl.models import architecture_of
from megatron_sftrl.observability.run_directory import write_atomically
from megatron_sftrl.planning.advice import advice
from megatron_sftrl.planning.hardware import Hardware, parse_bytes
from megatron_sftrl.planning.report import as_json, print_layouts, print_plan
from megatron_sftrl.planning.search import Plan, plan_run, search_layouts


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """What `sftrl plan` is asked.

    Args:
        config: YAML file of a run.
        overrides: key=value words.
        num_gpus: ranks of the job.
        hardware: the machine.
        mean_length: tokens of a sequence in estimates; the longest when not given.
        is_search: look for layouts, too.
        num_shown: layouts in the table.
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
    """The request that a command line makes (planning/arguments.py).

    Raises:
        UserError: a size without a unit, a rate that is not positive.
    """
    hardware = Hardware(
        gpu_memory=parse_bytes(parsed.gpu_memory),
        reserve=parse_bytes(parsed.reserve),
        gpus_per_node=parsed.gpus_per_node,
        peak_flops=parsed.peak_tflops * 1e12,
        memory_bandwidth=parsed.hbm * 1e9,
        nvlink=parsed.nvlink * 1e9,
        network=parsed.network * 1e9,
        host_link=parsed.host_link * 1e9,
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

    def config_with(self, words: Sequence[str]) -> TrainingConfig:
        """The run's configuration."""
        return load_any_config(self._request.config, [*self._request.overrides, *words])

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
