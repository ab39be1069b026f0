"""What generating takes on one rank beside the trainer's state, and how many responses run at once."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

from megatron_sftrl.config.schema import GrpoConfig
from megatron_sftrl.models.architecture import Architecture
from megatron_sftrl.models.engine_shards import engine_boxes
from megatron_sftrl.models.tensors import hf_shapes
from megatron_sftrl.planning.activations import Microbatch, forward_bytes
from megatron_sftrl.planning.grid import Grid
from megatron_sftrl.planning.hardware import Hardware
from megatron_sftrl.planning.model_state import element_bytes

VLLM_WORK = 3e9
"""Bytes that vLLM is taken to need for its forward and its CUDA graphs: an assumption."""
_CACHE_GROWTH = 128
"""engine/kv_cache.py: tokens of memory that a layer takes at least beyond what it must hold."""
_DRAWING_BLOCK = 128
"""engine/next_token.py: entries of the vocabulary that are summed together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutMemory:
    """Bytes of one rank.

    Args:
        weights: of the engine; 0 where it reads the trainer's.
        cache: keys and values.
        work: most that the engine's forward, its growing cache or its drawing holds beyond the whole cache.
        update: messages and the tensor being filled while weights move, when the cache is asleep.
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
    """Of the engine that rollout.engine names.

    Raises:
        UserError: a model that an engine of rollout.vllm.tp cannot cut.
    """
    if config.rollout.engine == "in_process":
        return _in_process(architecture, config, grid, batch)
    vllm, element = config.rollout.vllm, element_bytes(config)
    num_elements, largest = _engine_elements(architecture, vllm.tp)
    weights = float(num_elements * element)
    heads = max(1, architecture.num_query_groups // vllm.tp)
    per_token = 2 * architecture.num_layers * heads * architecture.head_dim * element
    cache = vllm.gpu_memory_utilization * hardware.gpu_memory - weights - VLLM_WORK
    fits = int(max(0.0, cache) // (per_token * config.max_length))
    return RolloutMemory(
        weights=weights,
        cache=max(0.0, cache),
        work=VLLM_WORK,
        update=2.0 * vllm.bucket_mb * 2**20 + largest * element,
        num_concurrent=min(vllm.max_num_seqs, fits),
        bytes_per_token=per_token,
    )


@functools.lru_cache(maxsize=8)
def _engine_elements(architecture: Architecture, tp: int) -> tuple[int, int]:
    """What the first rank of an engine reads, and the largest whole tensor."""
    boxes = engine_boxes(architecture, tp=tp, tp_rank=0)
    read = sum(math.prod(stop - start for start, stop in box) for box in boxes.values())
    return read, max(math.prod(shape) for shape in hf_shapes(architecture).values())


def _in_process(
    architecture: Architecture, config: GrpoConfig, grid: Grid, batch: Microbatch
) -> RolloutMemory:
    """The trainer's own forward: with a cache where there is one, else over whole prefixes.

    Of a training step whose prompts and responses are as long as they may be; an evaluation keeps to as many.
    """
    rollout, longest = config.rollout, config.max_length
    slots, prompts = rollout.in_flight(grid.dp)
    drawing = float(slots * _drawing_bytes(architecture, config, grid))
    if grid.cp > 1 or batch.kernels != "torch":
        work = _prefix_bytes(architecture, grid, batch, prefixes=slots, length=longest)
        return RolloutMemory(
            weights=0.0,
            cache=0.0,
            work=max(work, drawing),
            update=0.0,
            num_concurrent=slots,
            bytes_per_token=0,
        )
    num_layers = architecture.num_layers // grid.pp
    groups = architecture.num_query_groups // grid.tp
    per_token = 2 * num_layers * groups * architecture.head_dim * batch.element
    cache = float((slots + 1) * longest * per_token)
    prompt_length, missing = config.data.max_prompt_length, 0.0
    is_more = config.has_validation or config.filters.dynamic_sampling
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
