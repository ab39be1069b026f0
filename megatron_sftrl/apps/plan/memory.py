"""The memory of each pipeline stage, phase by phase, item by item; a run fits when every phase does."""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from megatron_sftrl.apps.plan.activations import Microbatch, StepPeak, forward_bytes, microbatch_of, step_peak
from megatron_sftrl.apps.plan.job import Hardware, workload_of
from megatron_sftrl.apps.plan.model_state import Grid, ModelState, element_bytes, grid_of, model_state
from megatron_sftrl.config.layout import stage_layers
from megatron_sftrl.config.placement import generators_config
from megatron_sftrl.config.schema import GrpoConfig, TrainingConfig
from megatron_sftrl.models.architecture import Architecture
from megatron_sftrl.models.engine_shards import engine_regions
from megatron_sftrl.models.tensors import hf_shapes
from megatron_sftrl.types import experts_dtype

VLLM_WORK = 3e9
"""Bytes that vLLM is taken to need for its forward and its CUDA graphs: an assumption."""
_CACHE_GROWTH = 128
"""engine/kv_cache.py: tokens of memory that a layer takes at least beyond what it must hold."""
_DRAWING_BLOCK = 128
"""engine/next_token.py: entries of the vocabulary that are summed together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutMemory:
    """Bytes that generating takes on one rank beside the trainer's state.

    Args:
        weights: of the engine; 0 where it reads the trainer's.
        cache: keys and values, and states of a hybrid.
        work: most that the engine's forward, its growing cache or its drawing holds beyond the whole cache.
        update: messages and the tensors being filled while weights move, when the cache is asleep.
        num_concurrent: responses of full length that the cache holds, per engine.
        bytes_per_token: of keys and values, on one rank.
    """

    weights: float
    cache: float
    work: float
    update: float
    num_concurrent: int
    bytes_per_token: int


def rollout_memory(
    architecture: Architecture, config: GrpoConfig, grid: Grid, batch: Microbatch, hardware: Hardware
) -> RolloutMemory:
    """Of the engine that rollout.engine names; UserError if rollout.vllm.tp cannot cut the model."""
    if config.rollout.engine == "in_process":
        return _in_process(architecture, config, grid, batch)
    vllm, element = config.rollout.vllm, element_bytes(config)
    num_elements, loading = _engine_elements(architecture, vllm.tp)
    weights = float(num_elements * element)
    num_states = len(architecture.delta_net.layers) if architecture.delta_net else 0
    per_token = (architecture.num_layers - num_states) * architecture.cached_by_vllm(vllm.tp) * element
    states = num_states * _state_bytes(architecture, vllm.tp, element)
    cache = vllm.gpu_memory_utilization * hardware.gpu_memory - weights - VLLM_WORK
    fits = int(max(0.0, cache) // (per_token * config.max_length + states))
    return RolloutMemory(
        weights=weights,
        cache=max(0.0, cache),
        work=VLLM_WORK,
        update=_buckets(config) + loading * element,
        num_concurrent=min(vllm.max_num_seqs, fits),
        bytes_per_token=per_token,
    )


@functools.lru_cache(maxsize=8)
def _engine_elements(architecture: Architecture, tp: int) -> tuple[int, int]:
    """What the first rank of an engine holds, and the most whole tensors that vLLM has waiting.

    It gathers a block's tensors, all experts of a mixture among them, before it fills the block. Of a tensor
    that files fuse it reads everything and keeps its own rows.
    """
    regions = engine_regions(architecture, tp=tp, tp_rank=0)
    held = sum(_held(architecture, name, region.numel, tp) for name, region in regions.items())
    together: Counter[str] = Counter()
    for name, shape in hf_shapes(architecture).items():
        in_block = re.match(r".*\.layers\.\d+\.", name)
        together[in_block[0] if in_block else name] += math.prod(shape)
    return held, max(together.values())


def _held(a: Architecture, name: str, num_elements: int, tp: int) -> int:
    """What a rank of an engine keeps of what it reads."""
    if name.endswith(".gate_up_proj.weight"):
        return num_elements // tp
    if name.endswith(".qkv_proj.weight"):
        heads = a.num_attention_heads + 2 * a.num_query_groups
        kept = a.num_attention_heads // tp + 2 * max(1, a.num_query_groups // tp)
        return num_elements // heads * kept
    return num_elements


def _in_process(
    architecture: Architecture, config: GrpoConfig, grid: Grid, batch: Microbatch
) -> RolloutMemory:
    """The trainer's own forward: with a cache where there is one, else over whole prefixes.

    Of a training step whose prompts and responses are as long as they may be; an evaluation keeps to as many.
    """
    rollout, longest = config.rollout, config.max_length
    slots, prompts = rollout.in_flight(grid.dp)
    drawing = float(slots * _drawing_bytes(architecture, config, grid))
    if grid.cp > 1:
        work = _prefix_bytes(architecture, grid, batch, prefixes=slots, length=longest)
        return RolloutMemory(
            weights=0.0,
            cache=0.0,
            work=max(work, drawing),
            update=0.0,
            num_concurrent=slots,
            bytes_per_token=0,
        )
    num_layers = max(stage_layers(grid, architecture.num_layers))
    groups = architecture.num_query_groups // grid.tp
    stages = [
        [
            kind.attends
            for chunk in range(grid.vp)
            for kind in grid.chunk_kinds(architecture, stage=stage, chunk=chunk)
        ]
        for stage in range(grid.pp)
    ]
    width = architecture.head_dim + architecture.value_dim
    per_token = max(map(sum, stages)) * groups * width * batch.element
    num_states = max(len(stage) - sum(stage) for stage in stages)
    states = num_states * _state_bytes(architecture, grid.tp, batch.element)
    cache = float((slots + 1) * (longest * per_token + states))
    prompt_length, missing = config.data.max_prompt_length, 0.0
    is_more = bool(config.held_out) or config.filters.dynamic_sampling
    if slots * grid.dp >= rollout.prompts_per_step * rollout.group_size and not is_more:
        # All begin together; else places that come free are taken again beside a whole cache.
        missing = cache * max(0.0, 1 - (prompt_length + _CACHE_GROWTH) / longest)
    prefill = _prefix_bytes(architecture, grid, batch, prefixes=prompts, length=prompt_length)
    # A layer's keys and values are copied when they need more memory.
    return RolloutMemory(
        weights=0.0,
        cache=cache,
        work=max(prefill - missing, drawing, cache / num_layers),
        update=0.0,
        num_concurrent=slots,
        bytes_per_token=per_token,
    )


def _state_bytes(architecture: Architecture, tp: int, element: int) -> int:
    """What a gated delta net keeps of a sequence, on one of tp ranks."""
    net = architecture.delta_net
    return 0 if net is None else net.state_bytes(tp=tp, element=element)


def _prefix_bytes(
    architecture: Architecture, grid: Grid, batch: Microbatch, *, prefixes: int, length: int
) -> float:
    """Of a forward over prefixes of one length, spread over pp micro-batches."""
    multiple = 2 * grid.cp if grid.cp > 1 else 1
    tokens = -(-prefixes // grid.pp) * (-(-length // multiple) * multiple) // grid.cp
    packed = replace(
        batch,
        tokens=tokens,
        residual_tokens=tokens // grid.tp if grid.sequence_parallel else tokens,
        longest=length,
    )
    return float(forward_bytes(architecture, grid, packed))


def _drawing_bytes(architecture: Architecture, config: GrpoConfig, grid: Grid) -> int:
    """Of one response while its next token is drawn (engine/next_token.py): fp32 logits, float64 weights."""
    sampling, size = config.rollout, architecture.vocab_size
    logits = 4 * (1 + (grid.pp > 1) + (sampling.temperature != 1))
    weights = 16 if size % _DRAWING_BLOCK else 8  # and once more, filled up to whole blocks
    if sampling.top_k or sampling.top_p < 1:
        weights = 41  # as they are, sorted, their order, cumulated, truncated; and a flag
    return size * (logits + weights)


VLLM_ASLEEP = 2e9
"""Bytes of CUDA graphs and workspaces that a sleeping vLLM is taken to keep: an assumption."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A part of a step, and bytes that a rank holds in it by what they are for, in the order shown."""

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
    """All stages in order, and the rollout engine, if any.

    Args:
        generators: phases of a rank of rollout.devices; none where the ranks of the stages generate.
        host_reference: bytes of an offloaded reference in the memory of each node, over its GPUs.
        host_optimizer: bytes of what optim.cpu_offload keeps there, over the GPUs of a node.
        host_checkpoint: bytes that the copies of an asynchronous save take in the memory of a node, at most.
        host_experts: bytes of rollout.router_replay there: every rank has all responses of a step.
    """

    stages: tuple[StageMemory, ...]
    generators: tuple[Phase, ...]
    rollout: RolloutMemory | None
    host_reference: float
    host_optimizer: float
    host_checkpoint: float
    host_experts: float

    @property
    def fullest(self) -> StageMemory:
        """The stage that needs most."""
        return max(self.stages, key=lambda stage: stage.fullest.total)


def plan_memory(
    architecture: Architecture, config: TrainingConfig, grid: Grid, hardware: Hardware
) -> MemoryPlan:
    """What each stage's ranks need at the largest micro-batch; UserError if no engine can cut the model."""
    batch = microbatch_of(config, grid, hardware.kernels)
    num_microbatches = workload_of(config, grid).num_microbatches
    rollout, generators = None, ()
    if (grpo := config.grpo) is not None and grpo.rollout.devices:
        rollout, generators = _apart(architecture, grpo, hardware)
    elif grpo is not None:
        rollout = rollout_memory(architecture, grpo, grid, batch, hardware)
    stages = []
    is_offloaded = config.reference is not None and config.reference.placement == "offload"
    largest_reference = largest_optimizer = largest_copy = 0
    for stage in range(grid.pp):
        state = model_state(architecture, config, grid, stage=stage)
        peak = step_peak(architecture, config, grid, batch, stage=stage, num_microbatches=num_microbatches)
        phases = _phases(state, peak, None if generators else rollout, hardware, config)
        stages.append(StageMemory(stage=stage, phases=phases))
        largest_reference = max(largest_reference, state.reference + state.reference_average)
        largest_optimizer = max(largest_optimizer, state.optimizer_on_host)
        largest_copy = max(largest_copy, _copies_on_node(state, config, grid, hardware))
    per_node = min(hardware.gpus_per_node, grid.world_size)
    return MemoryPlan(
        stages=tuple(stages),
        generators=generators,
        rollout=rollout,
        host_reference=float(largest_reference * per_node * is_offloaded),
        host_optimizer=float(largest_optimizer * per_node),
        host_checkpoint=float(largest_copy if config.checkpoint.async_save else 0),
        host_experts=float(_experts_bytes(architecture, config, grid) * per_node),
    )


def _experts_bytes(architecture: Architecture, config: TrainingConfig, grid: Grid) -> int:
    """Of a rank: the experts of all responses of a step, each as long as it may be (with rollout.ahead
    those of the next step, too), and int16 of its own sequences in an update.
    """
    if (grpo := config.grpo) is None or not grpo.rollout.router_replay:
        return 0
    rollout, mixture = grpo.rollout, architecture.mixture
    assert mixture is not None, "config.checks refuses a dense model"
    responses = rollout.prompts_per_step * (rollout.group_size - rollout.demonstrations) * (1 + rollout.ahead)
    work = workload_of(config, grid)
    sequences = work.num_microbatches * work.microbatch_tokens // work.length
    per_sequence = (work.length - 1) * len(architecture.layers_with_experts) * mixture.experts_per_token
    told, batched = experts_dtype(mixture.num_experts).itemsize, np.dtype(np.int16).itemsize
    return per_sequence * (responses * told + sequences * batched)


def _apart(
    architecture: Architecture, config: GrpoConfig, hardware: Hardware
) -> tuple[RolloutMemory, tuple[Phase, ...]]:
    """Of the ranks of rollout.devices, which hold an engine and nothing of the trainers."""
    theirs = generators_config(config, is_mixture=architecture.mixture is not None)
    grid = grid_of(theirs.parallel, config.rollout.devices)
    rollout = rollout_memory(
        architecture, theirs, grid, microbatch_of(theirs, grid, hardware.kernels), hardware
    )
    if config.rollout.engine == "in_process":
        rollout = replace(
            rollout,
            weights=float(model_state(architecture, theirs, grid, stage=0).parameters),
            update=_buckets(config) + float(_largest_tensor(architecture) * element_bytes(config)),
        )
    reserve = {"reserve (CUDA, NCCL, allocator)": hardware.reserve}
    weights = {"rollout weights": rollout.weights}
    at_work = {"key/value cache": rollout.cache, "rollout work": rollout.work}
    return rollout, (
        Phase(name="generating", items=weights | at_work | reserve),
        Phase(name="taking weights", items=weights | {"reshard buckets": rollout.update} | reserve),
    )


@functools.lru_cache(maxsize=8)
def _largest_tensor(architecture: Architecture) -> int:
    return max(math.prod(shape) for shape in hf_shapes(architecture).values())


def _buckets(config: GrpoConfig) -> float:
    """Of messages of an update, in both directions."""
    return 2.0 * config.rollout.vllm.bucket_mb * 2**20


def _copies_on_node(state: ModelState, config: TrainingConfig, grid: Grid, hardware: Hardware) -> int:
    """Bytes that the ranks of a node store: weights once, a distributed optimizer share by share."""
    num_ranks = min(hardware.gpus_per_node, grid.world_size)
    num_stages, rest = divmod(num_ranks, grid.tp * grid.cp * grid.dp)
    once = max(grid.tp, grid.etp * grid.ep)
    num_first = num_stages * once + min(once, rest)
    is_moving = config.reference is not None and config.reference.kind != "frozen"
    weights = state.parameters - state.frozen + (state.reference_average or state.reference) * is_moving
    num_shares = num_ranks if config.parallel.distributed_optimizer else num_first
    return num_first * weights + num_shares * (state.optimizer + state.optimizer_on_host)


def _phases(
    state: ModelState,
    peak: StepPeak,
    rollout: RolloutMemory | None,
    hardware: Hardware,
    config: TrainingConfig,
) -> tuple[Phase, ...]:
    is_offloaded = config.reference is not None and config.reference.placement == "offload"
    base = {
        "parameters": float(state.parameters),
        f"gradients ({config.parallel.grad_reduce_dtype})": float(state.gradients),
        "optimizer": float(state.optimizer),
    }
    if state.eight_bit:
        base["weights in eight bits"] = float(state.eight_bit)
    reserve = {"reserve (CUDA, NCCL, allocator)": hardware.reserve}
    average = {"reference's fp32 average": float(state.reference_average)} if state.reference_average else {}
    average = {} if is_offloaded else average
    here = ({"reference": float(state.reference)} if state.reference else {}) | average
    between = {name: 0.0 if is_offloaded else size for name, size in here.items()}
    at_loss = {"reference": float(state.reference_ends)} if here and is_offloaded else here
    asleep = {"vLLM asleep": VLLM_ASLEEP} if rollout is not None and rollout.weights else {}
    states = {"reference's hidden states": float(peak.reference_states)} if peak.reference_states else {}
    logits = {"logits and loss": float(peak.logits)} if peak.logits else {}
    activations = {"activations": float(peak.blocks)}
    phases = [Phase(name="training", items=base | at_loss | states | activations | logits | asleep | reserve)]
    if config.reference is not None:
        forward = {"activations": float(peak.reference_forward)}
        phases.append(Phase(name="reference forward", items=base | here | forward | asleep | reserve))
    if state.fp32_gradients:
        copies = {"fp32 gradients of the update": float(state.fp32_gradients)}
        phases.append(Phase(name="update", items=base | copies | between | asleep | reserve))
    if rollout is not None:
        engine = {
            "rollout weights": rollout.weights,
            "key/value cache": rollout.cache,
            "rollout work": rollout.work,
        }
        phases.append(Phase(name="generating", items=base | between | engine | reserve))
    if config.grpo is not None and config.grpo.rollout.devices:
        sent = {"reshard buckets": _buckets(config.grpo)}
        phases.append(Phase(name="sending weights", items=base | between | sent | reserve))
    if rollout is not None and rollout.weights:
        moving = {"rollout weights": rollout.weights, "reshard buckets": rollout.update}
        phases.append(Phase(name="moving weights", items=base | between | moving | asleep | reserve))
    return tuple(phases)
