"""Layouts of a run that its checks accept and that fit, fastest estimate first."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_sftrl.apps.plan.job import Hardware
from megatron_sftrl.apps.plan.memory import MemoryPlan, plan_memory
from megatron_sftrl.apps.plan.model_state import Grid, grid_of
from megatron_sftrl.apps.plan.step_time import StepEstimate, estimate_step
from megatron_sftrl.config.checks import check_run
from megatron_sftrl.config.layout import stage_layers
from megatron_sftrl.config.schema import TrainingConfig, TrainSection
from megatron_sftrl.errors import UserError
from megatron_sftrl.models.architecture import Architecture
from megatron_sftrl.trainers.checked import check_original_length

_LARGEST_CP = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One layout of a run: its needs, its time, and why it does not fit (`problems`, empty when it does)."""

    config: TrainingConfig
    grid: Grid
    memory: MemoryPlan
    estimate: StepEstimate
    problems: tuple[str, ...]

    @property
    def overrides(self) -> str:
        """key=value words that ask for this layout."""
        parallel = self.config.parallel
        words = [f"parallel.{name}={getattr(parallel, name)}" for name in ("tp", "pp", "vp", "cp")]
        words.append(f"parallel.sequence_parallel={str(parallel.sequence_parallel).lower()}")
        for name in ("first_stage_layers", "last_stage_layers"):
            if (layers := getattr(parallel, name)) is not None:
                words.append(f"parallel.{name}={layers}")
        if self.grid.ep > 1 or parallel.etp is not None:
            words += [f"parallel.ep={parallel.ep}", f"parallel.etp={self.grid.etp}"]
        words.append(f"train.recompute={self.config.train.recompute}")
        if (layers := self.config.train.recompute_layers) is not None:
            words.append(f"train.recompute_layers={layers}")
        return " ".join(words)


def plan_run(
    architecture: Architecture,
    config: TrainingConfig,
    num_gpus: int,
    hardware: Hardware,
    *,
    loss_needs: tuple[str, ...],
    mean_length: int | None = None,
) -> Plan:
    """What the run needs as it is written; UserError for settings that the run itself would refuse."""
    check_original_length(config, architecture)
    check_run(config, architecture, num_gpus, loss_needs=loss_needs)
    grid = grid_of(config.parallel, num_gpus - num_generating(config))
    memory = plan_memory(architecture, config, grid, hardware)
    estimate = estimate_step(
        architecture, config, grid, hardware, rollout=memory.rollout, mean_length=mean_length
    )
    problems = tuple(_problems(memory, hardware))
    return Plan(config=config, grid=grid, memory=memory, estimate=estimate, problems=problems)


def num_generating(config: TrainingConfig) -> int:
    """GPUs of the job whose processes only generate."""
    return config.grpo.rollout.devices if config.grpo is not None else 0


def search_layouts(
    architecture: Architecture,
    config: TrainingConfig,
    num_gpus: int,
    hardware: Hardware,
    *,
    loss_needs: tuple[str, ...],
    mean_length: int | None = None,
) -> list[Plan]:
    """Every layout that fits, with the recomputation that costs least in it, fastest first.

    tp and etp stay inside a node.
    """
    found = []
    for layout in candidates(architecture, config, max(1, num_gpus - num_generating(config)), hardware):
        try:
            check_run(layout, architecture, num_gpus, loss_needs=loss_needs)
        except UserError:  # the run's own checks refuse this layout
            continue
        grid = grid_of(layout.parallel, num_gpus - num_generating(layout))
        ways = _recomputations(layout, max(stage_layers(grid, architecture.num_layers)) // grid.vp)
        fitting = _first_that_fits(architecture, ways, grid, hardware)
        if fitting is not None:
            needs, length = loss_needs, mean_length
            found.append(
                plan_run(architecture, fitting, num_gpus, hardware, loss_needs=needs, mean_length=length)
            )
    return sorted(found, key=lambda plan: plan.estimate.total)


def _first_that_fits(
    architecture: Architecture, ways: Sequence[TrainingConfig], grid: Grid, hardware: Hardware
) -> TrainingConfig | None:
    """Of ways to recompute that need less and less memory."""

    def fits(config: TrainingConfig) -> bool:
        return not any(_problems(plan_memory(architecture, config, grid, hardware), hardware))

    place = bisect.bisect_left(range(len(ways)), True, key=lambda index: fits(ways[index]))
    return ways[place] if place < len(ways) else None


def _recomputations(config: TrainingConfig, num_layers: int) -> list[TrainingConfig]:
    """Of the same run, cheapest in time first: nothing, what is elementwise, more and more whole blocks."""
    modules = config.train.recompute_modules
    ways: list[dict[str, object]] = [
        {"recompute": "none"},
        {"recompute": "selective", **({} if modules is None else {"recompute_modules": modules})},
        *({"recompute": "full", "recompute_layers": count} for count in range(1, num_layers)),
        {"recompute": "full"},
    ]
    # Copied without the keys that would be idle beside some of these.
    ours = {"recompute", "recompute_modules", "recompute_layers"}
    train = TrainSection.model_validate(config.train.model_dump(exclude_unset=True, exclude=ours))
    return [config.model_copy(update={"train": train.model_copy(update=way)}) for way in ways]


def candidates(
    architecture: Architecture, config: TrainingConfig, num_gpus: int, hardware: Hardware
) -> Iterator[TrainingConfig]:
    """The run in every layout worth asking about: sizes that divide what they cut."""
    a = architecture
    experts = a.mixture.num_experts if a.mixture else 1
    (plain, *_) = _recomputations(config, 1)
    for tp in _divisors(a.num_attention_heads, most=min(num_gpus, hardware.gpus_per_node)):
        for pp in _divisors(num_gpus // tp, most=a.num_layers):
            for cp in _divisors(num_gpus // (tp * pp), most=_LARGEST_CP):
                for vp, first, last in _stages(a.num_layers, pp):
                    for ep in _divisors(experts, most=num_gpus):
                        for etp in sorted({1, tp}) if a.mixture else [None]:
                            sizes = {"tp": tp, "pp": pp, "vp": vp, "cp": cp, "ep": ep, "etp": etp}
                            ends = {"first_stage_layers": first, "last_stage_layers": last}
                            yield _in_layout(plain, {**sizes, **ends, "sequence_parallel": tp > 1})


def _stages(num_layers: int, pp: int) -> Iterator[tuple[int, int | None, int | None]]:
    """(vp, first_stage_layers, last_stage_layers): equal stages, and a last one that has fewer."""
    if pp == 1:
        yield 1, None, None
        return
    for vp in range(1, num_layers // pp + 1):
        if num_layers % (pp * vp) == 0:
            yield vp, None, None
            each = num_layers // pp
            if pp > 2 and each > vp:
                yield vp, each + vp, each - vp
                continue
        # The smallest stages of which the last one gets less than the others.
        each = (num_layers // (pp * vp) + 1) * vp
        if (last := num_layers - each * (pp - 1)) > 0 and last % vp == 0:
            yield vp, None, last


def _in_layout(config: TrainingConfig, sizes: Mapping[str, object]) -> TrainingConfig:
    return config.model_copy(update={"parallel": config.parallel.model_copy(update=sizes)})


def _problems(memory: MemoryPlan, hardware: Hardware) -> Iterator[str]:
    limit = hardware.gpu_memory
    for stage in memory.stages:
        phase = stage.fullest
        if phase.total > limit:
            largest = sorted(phase.items.items(), key=lambda item: -item[1])[:3]
            named = ", ".join(f"{name} {size / 1e9:.1f} GB" for name, size in largest)
            yield (
                f"pipeline stage {stage.stage} needs {phase.total / 1e9:.1f} GB of {limit / 1e9:.1f} GB in "
                f"the phase {phase.name!r} (largest: {named})"
            )
    phase = max(memory.generators, key=lambda phase: phase.total, default=None)
    if phase is not None and phase.total > limit:
        yield (
            f"a generator of rollout.devices needs {phase.total / 1e9:.1f} GB of {limit / 1e9:.1f} GB in the "
            f"phase {phase.name!r}: raise its tp (rollout.tp, or rollout.vllm.tp), or answer fewer at once"
        )
    rollout = memory.rollout
    if rollout is not None and rollout.weights and rollout.num_concurrent == 0:
        yield (
            f"vLLM's share of the memory holds its weights ({rollout.weights / 1e9:.1f} GB) and "
            f"{rollout.cache / 1e9:.1f} GB of cache, less than one response needs: raise "
            "rollout.vllm.gpu_memory_utilization or rollout.vllm.tp"
        )


def _divisors(number: int, *, most: int | None = None) -> Sequence[int]:
    return [each for each in range(1, min(number, most or number) + 1) if number % each == 0]


# What to change in a run that does not fit: only what the planner has tried and found to fit.

_MORE_GPUS = (2, 4, 8)
_SMALLER_SHARES = (0.45, 0.4, 0.35, 0.3)

Search = Callable[[Sequence[str], int], Sequence[Plan]]
"""From further overrides and a number of GPUs to the layouts that fit, fastest first."""
Attempt = Callable[[Sequence[str]], Plan | None]
"""From further overrides to the plan in the run's own layout; None where the run's checks refuse it."""


def advice(config: TrainingConfig, num_gpus: int, *, attempt: Attempt, search: Search) -> list[str]:
    """Lines that each name one way to make the run fit: a setting, else a layout, else more GPUs.

    The planner's `attempt` and `search` try what is named, for this run and machine.
    """
    words = list(_savings(config))
    lines = []
    for word in words:
        plan = attempt([word])
        if plan is not None and not plan.problems:
            lines.append(f"{word} ({_needs(plan)})")
    if lines:
        return lines
    for also in ([], words):
        if found := search(also, num_gpus):
            return [f"{' '.join([*also, found[0].overrides])} ({_needs(found[0])})"]
    for factor in _MORE_GPUS:
        if found := search(words, num_gpus * factor):
            overrides = " ".join([*words, found[0].overrides])
            return [f"{num_gpus * factor} GPUs with {overrides} ({_needs(found[0])})"]
    return [
        f"nothing that the planner knows makes it fit on up to {num_gpus * _MORE_GPUS[-1]} GPUs: shorten "
        f"{config.length_keys} (and batch.max_tokens), or take GPUs with more memory"
    ]


def _savings(config: TrainingConfig) -> Iterator[str]:
    """Settings that save memory and are not in use, the cheapest in time first."""
    parallel = config.parallel
    if parallel.tp > 1 and not parallel.sequence_parallel:
        yield "parallel.sequence_parallel=true"
    if not parallel.distributed_optimizer and config.optim.name == "adamw":
        yield "parallel.distributed_optimizer=true"
    if (grpo := config.grpo) is not None and grpo.rollout.engine == "vllm":
        share = grpo.rollout.vllm.gpu_memory_utilization
        for smaller in (each for each in _SMALLER_SHARES if each < share):
            yield f"rollout.vllm.gpu_memory_utilization={smaller}"
    if config.reference is not None and config.reference.placement == "resident":
        yield "reference.placement=offload"
    if config.train.recompute == "none":
        yield "train.recompute=selective"
    if config.train.recompute != "full":
        yield "train.recompute=full"
    elif config.train.recompute_layers is not None:
        yield "train.recompute_layers=null"


def _needs(plan: Plan) -> str:
    return f"{plan.memory.fullest.fullest.total / 1e9:.1f} GB"
