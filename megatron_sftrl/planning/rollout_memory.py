"""What generating takes on one rank beside the trainer's state, and how many responses run at once."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

from megatron_sftrl.architectures.architecture import Architecture
from megatron_sftrl.architectures.engine_shards import engine_boxes
from megatron_sftrl.architectures.tensors import hf_shapes
from megatron_sftrl.config.grpo import GrpoConfig
from megatron_sftrl.planning.activations import Microbatch, block_bytes
from megatron_sftrl.planning.grid import Grid
from megatron_sftrl.planning.hardware import Hardware
from megatron_sftrl.planning.model_state import element_bytes

VLLM_WORK = 3e9
"""Bytes that vLLM is taken to need for its forward and its CUDA graphs: an assumption."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutMemory:
    """Bytes of one rank.

    Args:
        weights: of the engine; 0 where it reads the trainer's.
        cache: keys and values.
        work: of the engine's forward.
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
        ValueError: a model that an engine of rollout.vllm.tp cannot cut.
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
    """The trainer's own forward: with a cache where there is one, else over whole prefixes."""
    rollout = config.rollout
    share = -(-rollout.prompts_per_step // grid.dp) * rollout.group_size
    slots = min(rollout.max_concurrent, share)
    has_cache = grid.cp == 1 and batch.kernels == "torch"
    groups = architecture.num_query_groups // grid.tp
    per_token = 2 * (architecture.num_layers // grid.pp) * groups * architecture.head_dim * batch.element
    length = config.data.max_prompt_length if has_cache else config.max_length
    tokens = -(-slots // grid.pp) * length // grid.cp
    whole = replace(
        batch,
        tokens=tokens,
        residual_tokens=tokens // grid.tp if grid.sequence_parallel else tokens,
        longest=length,
    )
    block = block_bytes(architecture, grid, whole)
    return RolloutMemory(
        weights=0.0,
        cache=float((slots + 1) * config.max_length * per_token) if has_cache else 0.0,
        work=float(block.forward + 2 * block.input),
        update=0.0,
        num_concurrent=slots,
        bytes_per_token=per_token if has_cache else 0,
    )
