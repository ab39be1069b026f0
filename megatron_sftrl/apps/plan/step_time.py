"""An estimate of a step's time: operations and bytes over stated rates, and the pipeline's idle share.

    step = (m + (pp - 1) / vp) * slowest stage's micro-batch + gradients + optimizer

m micro-batches of a rank; a micro-batch costs its operations at `efficiency` of the peak and its messages at
`link_efficiency` of the links, one after the other: what overlaps is not credited, but for gradients and
weights over dp, which hide behind the last micro-batch where the run says so. What is recomputed without a
product costs the memory that it reads and writes, and so does adding a micro-batch's gradient of every
weight to the step's, which small micro-batches pay for most. (Bubble: Narayanan et al., arXiv:2104.04473.)
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

from megatron_sftrl.apps.plan.activations import (
    Microbatch,
    microbatch_of,
    modules_of,
    recomputed_blocks,
    routed_tokens,
)
from megatron_sftrl.apps.plan.job import (
    Hardware,
    Workload,
    attention_flops,
    block_flops,
    head_flops,
    mlp_flops,
    model_flops,
    workload_of,
)
from megatron_sftrl.apps.plan.memory import RolloutMemory
from megatron_sftrl.apps.plan.model_state import (
    Adapted,
    Grid,
    adapted_by,
    element_bytes,
    gradient_bytes,
    model_state,
    trained_parameters,
)
from megatron_sftrl.config.schema import GrpoConfig, TrainingConfig
from megatron_sftrl.models.architecture import Architecture, LayerKind, num_parameters

# Bytes that one rank sends along each axis, from the sizes of the collectives; nothing here is measured. A
# ring sends (n - 1) / n of the whole for an all-gather, a reduce-scatter or an all-to-all over n ranks, and
# twice that for an all-reduce.

_FP32 = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockTraffic:
    """Bytes that a rank sends for one block and one micro-batch, in its forward and in its backward."""

    tp: tuple[float, float]
    cp: tuple[float, float]
    ep: tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class StateTraffic:
    """Bytes that a rank sends in an update: gradients and weights, over dp x cp and for experts over edp."""

    dense: float
    experts: float


def block_traffic(architecture: Architecture, grid: Grid, batch: Microbatch) -> BlockTraffic:
    """Of one block; under recomputation its forward runs twice."""
    a, stream = architecture, float(batch.tokens * architecture.hidden_size * batch.element)
    num_regions = 2 if a.mixture is None else 1  # attention, and a dense MLP: one collective in, one out
    once = _ring(stream, grid.tp) * 2 * num_regions
    # Under sequence parallelism the backward gathers the inputs of the matrix products again.
    again = _ring(stream, grid.tp) * num_regions * grid.sequence_parallel
    keys = float(batch.tokens * grid.cp * (a.num_query_groups // grid.tp) * batch.element)
    keys *= a.head_dim + a.value_dim
    over_cp = _ring(keys, grid.cp)
    visits, over_etp = 0.0, 0.0
    if a.mixture is not None:
        visits = float(batch.residual_tokens * a.mixture.experts_per_token * a.hidden_size * batch.element)
        over_etp = 2 * _ring(visits * grid.etp, grid.etp)
    over_ep = 2 * _ring(visits, grid.ep)
    backward_cp = over_cp * (2 if batch.kernels == "transformer_engine" else 1)
    return BlockTraffic(
        tp=(once + over_etp, once + again + over_etp), cp=(over_cp, backward_cp), ep=(over_ep, over_ep)
    )


def pipeline_traffic(architecture: Architecture, grid: Grid, batch: Microbatch) -> float:
    """Bytes that a middle stage sends for one micro-batch: its outputs forward, their gradients back."""
    stream = float(batch.residual_tokens * architecture.hidden_size * batch.element)
    return 2 * grid.vp * stream if grid.pp > 1 else 0.0


def state_traffic(
    architecture: Architecture, config: TrainingConfig, grid: Grid, *, stage: int
) -> StateTraffic:
    """Gradients are summed; the distributed optimizer then gathers weights instead of gradients."""
    out = gradient_bytes(config)
    back = element_bytes(config) if config.parallel.distributed_optimizer else out
    dense, experts = _stage_sizes(architecture, config, grid, stage=stage)
    return StateTraffic(
        dense=_ring(dense * float(out + back), grid.dp * grid.cp),
        experts=_ring(experts * float(out + back), grid.edp),
    )


def _stage_sizes(
    architecture: Architecture, config: TrainingConfig, grid: Grid, *, stage: int
) -> tuple[int, int]:
    """Elements of one rank's trained weights outside and inside of experts."""
    chunks = [
        _chunk_sizes(
            architecture,
            grid,
            adapted_by(config),
            kinds=grid.chunk_kinds(architecture, stage=stage, chunk=chunk),
            has_embedding=stage == 0 and chunk == 0,
            has_output=stage == grid.pp - 1 and chunk == grid.vp - 1,
        )
        for chunk in range(grid.vp)
    ]
    return sum(dense for dense, _ in chunks), sum(experts for _, experts in chunks)


@functools.lru_cache(maxsize=1024)
def _chunk_sizes(
    architecture: Architecture,
    grid: Grid,
    adapted: Adapted | None,
    *,
    kinds: tuple[LayerKind, ...],
    has_embedding: bool,
    has_output: bool,
) -> tuple[int, int]:
    """Elements of one chunk outside and inside of experts."""
    members = trained_parameters(
        architecture, grid, adapted, kinds=kinds, has_embedding=has_embedding, has_output=has_output
    )
    experts = sum(each.num_elements for each in members if each.is_expert)
    return sum(each.num_elements for each in members) - experts, experts


def _ring(whole: float, num_ranks: int) -> float:
    return whole * (num_ranks - 1) / num_ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class StepEstimate:
    """Of one step; every number is an estimate.

    Args:
        seconds: by part of the step.
        bubble: idle share of the forward and backward.
        utilisation: of the peak by the policy's own operations (no recomputation, no reference), in the part
            that trains.
        tokens: trained on in one step, over all ranks.
        gigabytes: sent by one rank of the busiest stage, by axis.
        num_microbatches: of one rank in one update.
        sequence_length: tokens of every sequence, as assumed.
    """

    seconds: dict[str, float]
    bubble: float
    utilisation: float
    tokens: int
    gigabytes: dict[str, float]
    num_microbatches: int
    sequence_length: int

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return sum(self.seconds.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pass:
    """Seconds of one micro-batch on the slowest stage."""

    forward: float
    backward: float
    reference: float
    reference_head: float


def estimate_step(
    architecture: Architecture,
    config: TrainingConfig,
    grid: Grid,
    hardware: Hardware,
    *,
    rollout: RolloutMemory | None = None,
    mean_length: int | None = None,
) -> StepEstimate:
    """Time, utilisation and messages of one step.

    `rollout` is for a run that has an engine; `mean_length` is tokens of a sequence, prompt and response
    together, the longest when not given.
    """
    work = workload_of(config, grid, mean_length=mean_length)
    batch = _filled(microbatch_of(config, grid, hardware.kernels), grid, work)
    cost = _pass(architecture, config, grid, hardware, batch, work)
    waves = work.num_microbatches + (grid.pp - 1) / grid.vp
    update = waves * (cost.forward + cost.backward + cost.reference_head)
    parts = {"forward and backward": update * work.num_updates}
    if config.reference is not None:
        parts["reference forward"] = waves * cost.reference * work.num_updates
        parts["reference from the host"] = work.num_updates * _offload_seconds(
            architecture, config, grid, hardware
        )
    dense, experts = _state_seconds(architecture, config, grid, hardware)
    hidden = cost.backward if config.parallel.overlap_grad_reduce else 0.0
    parts["gradients and weights over dp"] = max(0.0, dense + experts - hidden) * work.num_updates
    parts["optimizer"] = _optimizer_seconds(architecture, config, grid, hardware) * work.num_updates
    train = sum(parts.values())
    if (grpo := config.grpo) is not None:
        # Of every mini-batch but the first, whose own update finds them.
        scored = work.num_updates / grpo.rollout.passes - 1
        parts["old log-probabilities"] = waves * cost.forward * scored
        if rollout is not None and rollout.weights:
            seconds = _generation_seconds(architecture, grpo, grid, hardware, rollout, work)
            if grpo.rollout.devices and grpo.rollout.ahead:  # at the same time
                parts["waiting for generators"] = max(0.0, seconds - sum(parts.values()))
            else:
                parts["generating"] = seconds
    tokens = work.num_updates * config.batch.global_size * work.length
    useful = model_flops(
        architecture, tokens=tokens, length=work.length, has_frozen_matrices=config.lora is not None
    )
    return StepEstimate(
        seconds={name: seconds for name, seconds in parts.items() if seconds > 0},
        bubble=1.0 - work.num_microbatches / waves,
        utilisation=useful / (train * grid.world_size * hardware.peak_flops),
        tokens=tokens,
        gigabytes=_gigabytes(architecture, config, grid, batch, work),
        num_microbatches=work.num_microbatches,
        sequence_length=work.length,
    )


def _filled(batch: Microbatch, grid: Grid, work: Workload) -> Microbatch:
    """The micro-batch with the tokens that the estimate assumes."""
    tokens = -(-work.microbatch_tokens // (grid.cp * grid.tp)) * grid.tp
    residual = tokens // grid.tp if grid.sequence_parallel else tokens
    return replace(batch, tokens=tokens, residual_tokens=residual)


def _pass(
    a: Architecture,
    config: TrainingConfig,
    grid: Grid,
    hardware: Hardware,
    batch: Microbatch,
    work: Workload,
) -> _Pass:
    """Of the stage that trains longest, and of the reference where it has most blocks."""
    block = _block_seconds(a, config, grid, hardware, batch, work)
    head = head_flops(a, tokens=work.microbatch_tokens) / _rate(hardware, grid)
    stage_link = hardware.link(stride=grid.tp * grid.cp * grid.dp, size=grid.pp)
    exchange = pipeline_traffic(a, grid, batch) / stage_link / 2
    has_reference = config.reference is not None
    stages = []
    for stage in range(grid.pp):
        per_chunk = grid.chunk_layers(a, stage=stage)
        num_blocks, own_head = grid.vp * per_chunk, head * (stage == grid.pp - 1)
        again = grid.vp * recomputed_blocks(config, per_chunk) * block.forward + num_blocks * block.again
        again += _adding_seconds(a, config, grid, hardware, batch, stage=stage)
        stages.append(
            _Pass(
                forward=num_blocks * block.forward + own_head + exchange,
                backward=num_blocks * block.backward
                + (1 if config.lora else 2) * own_head
                + again
                + exchange,
                reference=(num_blocks * block.forward + exchange) * has_reference,
                reference_head=own_head * has_reference,
            )
        )
    slowest = max(stages, key=lambda each: each.forward + each.backward + each.reference_head)
    return replace(slowest, reference=max(each.reference for each in stages))


def _adding_seconds(
    a: Architecture, config: TrainingConfig, grid: Grid, hardware: Hardware, batch: Microbatch, *, stage: int
) -> float:
    """Of one micro-batch's gradients: the sum read and written, and where the product does not add to it by
    itself (torch's layers) its result as well.
    """
    each = 2 * gradient_bytes(config)
    if batch.kernels == "torch":
        each += 2 * batch.element
    return (
        sum(_stage_sizes(a, config, grid, stage=stage))
        * each
        / (hardware.memory_bandwidth * hardware.efficiency)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _BlockSeconds:
    """Of one block and micro-batch; again: of what selective recomputation makes again."""

    forward: float
    backward: float
    again: float


def _rate(hardware: Hardware, grid: Grid) -> float:
    """Operations per second of the ranks that share a micro-batch."""
    return hardware.peak_flops * hardware.efficiency * grid.tp * grid.cp


def _block_seconds(
    a: Architecture,
    config: TrainingConfig,
    grid: Grid,
    hardware: Hardware,
    batch: Microbatch,
    work: Workload,
) -> _BlockSeconds:
    tokens, length, rate = work.microbatch_tokens, work.length, _rate(hardware, grid)
    attention = attention_flops(a, tokens=tokens, length=length)
    linear, casts = block_flops(a, tokens=tokens, length=length) - attention, (0.0, 0.0)
    linear_rate = rate
    if config.train.fp8 is not None:
        linear_rate = rate * hardware.fp8_flops / hardware.peak_flops
        casts = _cast_seconds(a, grid, hardware, batch)
    products = attention / rate + linear / linear_rate
    # Frozen matrices have no gradient; the adapters' own products, of r columns, are not counted.
    backward = 2 * products - (linear / linear_rate if config.lora else 0.0)
    traffic = block_traffic(a, grid, batch)
    tp_link = hardware.link(stride=1, size=grid.tp)
    cp_link = hardware.link(stride=grid.tp, size=grid.cp)
    ep_link = hardware.link(stride=grid.etp, size=grid.ep)
    talk = [
        traffic.tp[way] / tp_link + traffic.cp[way] / cp_link + traffic.ep[way] / ep_link for way in (0, 1)
    ]
    modules = modules_of(a, config, batch.kernels)
    again = 0.0
    if "mlp" in modules or "moe" in modules:
        over_tp = traffic.tp[0] / (2 if a.mixture is None else 1)  # a mixture's own, and attention's
        again += mlp_flops(a, tokens=tokens) / linear_rate + over_tp / tp_link + traffic.ep[0] / ep_link
    read_and_written = 0.0
    if "mlp_act" in modules or "moe_act" in modules:  # both halves are read, one is written
        visits = routed_tokens(a, grid, batch) if a.mixture else batch.tokens
        read_and_written += 3.0 * visits * a.ffn_hidden_size / (grid.etp if a.mixture else grid.tp)
    if "layernorm" in modules:
        num_norms = 2 if batch.kernels == "torch" else 1
        read_and_written += 2.0 * num_norms * batch.residual_tokens * a.hidden_size
    again += read_and_written * batch.element / (hardware.memory_bandwidth * hardware.efficiency)
    return _BlockSeconds(
        forward=products + talk[0] + casts[0], backward=backward + talk[1] + casts[1], again=again
    )


def _cast_seconds(a: Architecture, grid: Grid, hardware: Hardware, batch: Microbatch) -> tuple[float, float]:
    """To eight bits, and transposed: what the products of one block read, forward and backward."""
    streams = 2 * batch.residual_tokens * a.hidden_size
    query, keys = (n * a.head_dim // grid.tp for n in (a.num_attention_heads, a.num_query_groups))
    wide = batch.tokens * a.ffn_hidden_size // grid.tp
    if a.mixture is not None:
        visits = routed_tokens(a, grid, batch)
        streams += 2 * visits * a.hidden_size
        wide = visits * a.ffn_hidden_size // grid.etp
    forward = streams + batch.tokens * query + wide
    backward = streams + batch.tokens * (query + 2 * keys) + 2 * wide
    rate = hardware.memory_bandwidth * hardware.efficiency / (batch.element + 2)
    return forward / rate, backward / rate


def _offload_seconds(a: Architecture, config: TrainingConfig, grid: Grid, hardware: Hardware) -> float:
    section = config.reference
    if section is None or section.placement == "resident":
        return 0.0
    # Frozen weights only come in; an average fetches the policy's, too.
    times = 1.0 + (1.0 / section.sync_every if section.kind == "moving_average" else 0.0)
    reference = model_state(a, config, grid, stage=grid.deepest_stage(a)).reference
    return times * reference / hardware.host_link


def _state_seconds(
    a: Architecture, config: TrainingConfig, grid: Grid, hardware: Hardware
) -> tuple[float, float]:
    traffic = state_traffic(a, config, grid, stage=grid.deepest_stage(a))
    dense = hardware.link(stride=grid.tp, size=grid.dp * grid.cp)
    experts = hardware.link(stride=grid.etp * grid.ep, size=grid.edp)
    return traffic.dense / dense, traffic.experts / experts


def _optimizer_seconds(a: Architecture, config: TrainingConfig, grid: Grid, hardware: Hardware) -> float:
    """Every byte of the state read and written, the gradients of the share read.

    On the host at its rate, between two ways over the link: fp32 gradients there, fp32 weights back.
    """
    state = model_state(a, config, grid, stage=grid.deepest_stage(a))
    here = 2.5 * state.optimizer / (hardware.memory_bandwidth * hardware.efficiency)
    away = 2.0 * state.optimizer_on_host / (hardware.host_memory * hardware.efficiency)
    return here + away + state.optimizer_on_host / 2 / hardware.host_link


def _generation_seconds(
    a: Architecture,
    config: GrpoConfig,
    grid: Grid,
    hardware: Hardware,
    rollout: RolloutMemory,
    work: Workload,
) -> float:
    """Prompts at the rate of matrix products, then one token of each response at a time.

    A token costs one reading of weights and cache. Every response is as long as the estimate assumes.
    """
    rolling = config.rollout
    tp = rolling.tp if rolling.engine == "in_process" else rolling.vllm.tp
    responses = math.ceil(work.num_responses / ((rolling.devices or grid.world_size) // tp))
    together = min(responses, max(1, rollout.num_concurrent))
    rate = hardware.peak_flops * hardware.efficiency * tp
    flops = 2.0 * num_parameters(a)
    if a.mixture is not None:
        flops = a.num_layers * block_flops(a, tokens=1, length=0) + head_flops(a, tokens=1)
    prompt = min(config.data.max_prompt_length, work.length // 2)
    cache = together * rollout.bytes_per_token * (prompt + (work.length - prompt) / 2)
    read = (rollout.weights + cache) / (hardware.memory_bandwidth * hardware.efficiency)
    token = max(read, together * flops / rate)
    prefill = responses / config.rollout.group_size * prompt * flops / rate
    return prefill + math.ceil(responses / together) * (work.length - prompt) * token


def _gigabytes(
    a: Architecture, config: TrainingConfig, grid: Grid, batch: Microbatch, work: Workload
) -> dict[str, float]:
    traffic, state = (
        block_traffic(a, grid, batch),
        state_traffic(a, config, grid, stage=grid.deepest_stage(a)),
    )
    per_chunk = grid.chunk_layers(a, stage=grid.deepest_stage(a))
    again = recomputed_blocks(config, per_chunk) / per_chunk
    modules = modules_of(a, config, batch.kernels)
    has_mlp = not {"mlp", "moe"}.isdisjoint(modules)
    # Of the forward's messages, those that selective recomputation sends again.
    parts = {"tp": has_mlp / (2 if a.mixture is None else 1), "cp": 0.0, "ep": has_mlp}
    passes = work.num_microbatches * work.num_updates
    blocks = passes * grid.vp * per_chunk
    sent = {
        axis: blocks * ((1 + again + parts[axis] + (config.reference is not None)) * forward + backward)
        for axis, (forward, backward) in (("tp", traffic.tp), ("cp", traffic.cp), ("ep", traffic.ep))
    }
    sent["pp"] = passes * pipeline_traffic(a, grid, batch)
    sent["dp"] = work.num_updates * state.dense
    sent["edp"] = work.num_updates * state.experts
    return {axis: value / 1e9 for axis, value in sent.items() if value > 0}
