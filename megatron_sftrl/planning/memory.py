"""The memory of each pipeline stage, phase by phase, item by item; a run fits when every phase does."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sftrl.config.schema import GrpoConfig, TrainingConfig
from megatron_sftrl.models.architecture import Architecture
from megatron_sftrl.planning.grid import Grid
from megatron_sftrl.planning.hardware import Hardware
from megatron_sftrl.planning.model_state import ModelState, model_state
from megatron_sftrl.planning.peak import StepPeak, microbatch_of, step_peak
from megatron_sftrl.planning.rollout_memory import RolloutMemory, rollout_memory
from megatron_sftrl.planning.workload import workload_of

VLLM_ASLEEP = 2e9
"""Bytes of CUDA graphs and workspaces that a sleeping vLLM is taken to keep: an assumption."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A part of a step, and what a rank holds in it.

    Args:
        name: of the part.
        items: bytes by what they are for, in the order in which they are shown.
    """

    name: str
    items: dict[str, float]

    @property
    def total(self) -> float:
        """Bytes."""
        return sum(self.items.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """Every phase on the ranks of one pipeline stage."""

    stage: int
    phases: tuple[Phase, ...]

    @property
    def fullest(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.total)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """All stages.

    Args:
        stages: in order.
        rollout: of the rollout engine, None without one.
        host_reference: bytes of an offloaded reference in the memory of each node, over its GPUs.
        host_checkpoint: bytes that the copies of an asynchronous save take in the memory of a node, at most.
    """

    stages: tuple[StageMemory, ...]
    rollout: RolloutMemory | None
    host_reference: float
    host_checkpoint: float

    @property
    def fullest(self) -> StageMemory:
        """The stage that needs most."""
        return max(self.stages, key=lambda stage: stage.fullest.total)


def plan_memory(
    architecture: Architecture, config: TrainingConfig, grid: Grid, hardware: Hardware
) -> MemoryPlan:
    """What the ranks of every stage need, when micro-batches are as large as the batch section allows.

    Raises:
        UserError: a rollout engine that cannot cut the model.
    """
    batch = microbatch_of(config, grid, hardware.kernels)
    num_microbatches = workload_of(config, grid).num_microbatches
    rollout = None
    if isinstance(config, GrpoConfig):
        rollout = rollout_memory(architecture, config, grid, batch, hardware)
    stages = []
    is_offloaded = config.reference is not None and config.reference.placement == "offload"
    largest_reference, largest_copy = 0, 0
    for stage in range(grid.pp):
        state = model_state(architecture, config, grid, stage=stage)
        peak = step_peak(architecture, config, grid, batch, stage=stage, num_microbatches=num_microbatches)
        phases = _phases(state, peak, rollout, hardware, is_offloaded=is_offloaded)
        stages.append(StageMemory(stage=stage, phases=phases))
        largest_reference = max(largest_reference, state.reference + state.reference_average)
        largest_copy = max(largest_copy, _copies_on_node(state, config, grid, hardware))
    on_host = largest_reference * min(hardware.gpus_per_node, grid.world_size) if is_offloaded else 0
    return MemoryPlan(
        stages=tuple(stages),
        rollout=rollout,
        host_reference=float(on_host),
        host_checkpoint=float(largest_copy if config.checkpoint.async_save else 0),
    )


def _copies_on_node(state: ModelState, config: TrainingConfig, grid: Grid, hardware: Hardware) -> int:
    """Bytes that the ranks of a node store: weights once, a distributed optimizer share by share."""
    num_ranks = min(hardware.gpus_per_node, grid.world_size)
    num_stages, rest = divmod(num_ranks, grid.tp * grid.cp * grid.dp)
    once = max(grid.tp, grid.etp * grid.ep)
    num_first = num_stages * once + min(once, rest)
    is_moving = config.reference is not None and config.reference.kind != "frozen"
    weights = state.parameters + (state.reference_average or state.reference) * is_moving
    num_shares = num_ranks if config.parallel.distributed_optimizer else num_first
    return num_first * weights + num_shares * state.optimizer


def _phases(
    state: ModelState,
    peak: StepPeak,
    rollout: RolloutMemory | None,
    hardware: Hardware,
    *,
    is_offloaded: bool,
) -> tuple[Phase, ...]:
    base = {
        "parameters": float(state.parameters),
        "gradients (fp32)": float(state.gradients),
        "optimizer": float(state.optimizer),
    }
    reserve = {"reserve (CUDA, NCCL, allocator)": hardware.reserve}
    average = {"reference's fp32 average": float(state.reference_average)} if state.reference_average else {}
    average = {} if is_offloaded else average
    here = {"reference": float(state.reference)} | average if state.reference else {}
    between = {name: 0.0 if is_offloaded else size for name, size in here.items()}
    at_loss = {"reference": float(state.reference_ends)} if here and is_offloaded else here
    asleep = {"vLLM asleep": VLLM_ASLEEP} if rollout is not None and rollout.weights else {}
    states = {"reference's hidden states": float(peak.reference_states)} if peak.reference_states else {}
    logits = {"logits and loss": float(peak.logits)} if peak.logits else {}
    activations = {"activations": float(peak.blocks)}
    phases = [Phase(name="training", items=base | at_loss | states | activations | logits | asleep | reserve)]
    if state.reference:
        forward = {"activations": float(peak.reference_forward)}
        phases.append(Phase(name="reference forward", items=base | here | forward | asleep | reserve))
    if rollout is not None:
        engine = {
            "rollout weights": rollout.weights,
            "key/value cache": rollout.cache,
            "rollout work": rollout.work,
        }
        phases.append(Phase(name="generating", items=base | between | engine | reserve))
    if rollout is not None and rollout.weights:
        moving = {"rollout weights": rollout.weights, "reshard buckets": rollout.update}
        phases.append(Phase(name="moving weights", items=base | between | moving | asleep | reserve))
    return tuple(phases)
