"""Bytes that one rank sends along each axis, from the sizes of the collectives; nothing here is measured.

A ring sends (n - 1) / n of the whole for an all-gather, a reduce-scatter or an all-to-all over n ranks, and
twice that for an all-reduce.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from megatron_sftrl.config.schema import TrainingConfig
from megatron_sftrl.models.architecture import Architecture
from megatron_sftrl.planning.activations import Microbatch
from megatron_sftrl.planning.grid import Grid
from megatron_sftrl.planning.model_state import element_bytes
from megatron_sftrl.planning.parameters import chunk_parameters

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
    keys = 2.0 * batch.tokens * grid.cp * (a.num_query_groups // grid.tp) * a.head_dim * batch.element
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
    """Gradients are summed in fp32; the distributed optimizer then gathers weights instead of gradients."""
    back = element_bytes(config) if config.parallel.distributed_optimizer else _FP32
    sizes = [0, 0]
    for chunk in range(grid.vp):
        dense, experts = _chunk_sizes(
            architecture,
            grid,
            has_embedding=stage == 0 and chunk == 0,
            has_output=stage == grid.pp - 1 and chunk == grid.vp - 1,
        )
        sizes = [sizes[0] + dense, sizes[1] + experts]
    return StateTraffic(
        dense=_ring(sizes[0] * float(_FP32 + back), grid.dp * grid.cp),
        experts=_ring(sizes[1] * float(_FP32 + back), grid.edp),
    )


@functools.lru_cache(maxsize=1024)
def _chunk_sizes(
    architecture: Architecture, grid: Grid, *, has_embedding: bool, has_output: bool
) -> tuple[int, int]:
    """Elements of one chunk outside and inside of experts."""
    members = chunk_parameters(architecture, grid, has_embedding=has_embedding, has_output=has_output)
    experts = sum(each.num_elements for each in members if each.is_expert)
    return sum(each.num_elements for each in members) - experts, experts


def _ring(whole: float, num_ranks: int) -> float:
    return whole * (num_ranks - 1) / num_ranks
