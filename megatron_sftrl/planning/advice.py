"""What to change in a run that does not fit: only what the planner has tried and found to fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from megatron_sftrl.config.schema import GrpoConfig, TrainingConfig
from megatron_sftrl.planning.search import Plan

_MORE_GPUS = (2, 4, 8)
_SMALLER_SHARES = (0.45, 0.4, 0.35, 0.3)

Search = Callable[[Sequence[str], int], Sequence[Plan]]
"""From further overrides and a number of GPUs to the layouts that fit, fastest first."""
Attempt = Callable[[Sequence[str]], Plan | None]
"""From further overrides to the plan in the run's own layout; None where the run's checks refuse it."""


def advice(config: TrainingConfig, num_gpus: int, *, attempt: Attempt, search: Search) -> list[str]:
    """Lines that each name one way to make the run fit: a setting, else a layout, else more GPUs.

    Args:
        config: that does not fit.
        num_gpus: it was planned for.
        attempt, search: of the planner, for this run and machine.
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
    if isinstance(config, GrpoConfig) and config.rollout.engine == "vllm":
        share = config.rollout.vllm.gpu_memory_utilization
        for smaller in (each for each in _SMALLER_SHARES if each < share):
            yield f"rollout.vllm.gpu_memory_utilization={smaller}"
    if config.reference is not None and config.reference.placement == "resident":
        yield "reference.placement=offload"
    if config.train.recompute == "none":
        yield "train.recompute=full"


def _needs(plan: Plan) -> str:
    return f"{plan.memory.fullest.fullest.total / 1e9:.1f} GB"
