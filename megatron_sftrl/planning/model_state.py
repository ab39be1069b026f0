"""Bytes of parameters, gradients and optimizer state on one rank: what Megatron's DDP and optimizer allocate.

Gradients are fp32. Without the distributed optimizer every tensor stands alone. With it, parameters and
gradients lie in buffers of buckets: a tensor starts at a multiple of 64 elements, a bucket ends at a multiple
of lcm(dp, 128), and each data-parallel rank keeps Adam's moments (and fp32 weights of a bf16 model) for its
equal share of every bucket (megatron-core 0.16.1, distributed/param_and_grad_buffer.py).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sftrl.config.schema import TrainingConfig
from megatron_sftrl.models.architecture import Architecture
from megatron_sftrl.planning.grid import Grid
from megatron_sftrl.planning.parameters import Parameter, chunk_parameters

_FP32 = 4
_PARAMETER_START, _BUCKET_END = 64, 128
_SMALLEST_BUCKET, _BUCKET_PER_RANK = 40_000_000, 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelState:
    """Bytes on one rank.

    Args:
        parameters: weights that the forward reads, padding included.
        gradients: fp32 buffers.
        optimizer: moments, and fp32 weights where the model's are bf16; without step counters.
        reference: weights of a reference model, which has no buffers and no padding; 0 without one.
        reference_average: fp32 average behind the bf16 weights of a reference that follows the policy.
        reference_ends: of them embedding and output layer, which are on the device while the policy runs even
            when the rest is offloaded.
    """

    parameters: int
    gradients: int
    optimizer: int
    reference: int
    reference_average: int
    reference_ends: int

    @property
    def trained(self) -> int:
        """Everything but the reference."""
        return self.parameters + self.gradients + self.optimizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Buffer:
    """One buffer, in elements.

    Args:
        num_elements: padding included.
        spans: (start, stop) of each tensor.
        buckets: (start, stop) of each bucket.
    """

    num_elements: int
    spans: tuple[tuple[int, int], ...]
    buckets: tuple[tuple[int, int], ...]


def model_state(
    architecture: Architecture,
    config: TrainingConfig,
    grid: Grid,
    *,
    stage: int,
    dp_cp_rank: int | None = None,
    edp_rank: int | None = None,
) -> ModelState:
    """What one rank holds between steps.

    Args:
        architecture: of the model.
        config: dtype, optimizer, reference and distributed optimizer.
        grid: of the job.
        stage: pipeline stage.
        dp_cp_rank: place among the dp * cp ranks that share the optimizer; None for a bound of all shares, a
            few kilobytes of padding above the largest.
        edp_rank: the same among the copies of an expert.
    """
    element = element_bytes(config)
    moments = 8 if config.optim.name == "adamw" else 4 * (config.optim.momentum > 0)
    per_weight = moments + (_FP32 if element < _FP32 else 0)
    parts = [
        _chunk_elements(
            architecture,
            grid,
            has_embedding=stage == 0 and chunk == 0,
            has_output=stage == grid.pp - 1 and chunk == grid.vp - 1,
            is_distributed=config.parallel.distributed_optimizer,
            is_bucketed=config.parallel.overlap_grad_reduce,
            ranks=(dp_cp_rank, edp_rank),
        )
        for chunk in range(grid.vp)
    ]
    has_reference = config.reference is not None
    is_averaged = config.reference is not None and config.reference.kind == "moving_average"
    return ModelState(
        parameters=element * sum(part.held for part in parts),
        gradients=_FP32 * sum(part.held for part in parts),
        optimizer=per_weight * sum(part.owned for part in parts),
        reference=element * sum(part.plain for part in parts) * has_reference,
        reference_average=_FP32 * sum(part.plain for part in parts) * (is_averaged and element < _FP32),
        reference_ends=element * sum(part.ends for part in parts) * has_reference,
    )


def element_bytes(config: TrainingConfig) -> int:
    """Bytes of a weight or an activation."""
    return 2 if config.model.dtype == "bf16" else _FP32


@dataclass(frozen=True, slots=True, kw_only=True)
class _Elements:
    """Of one chunk: without padding, those outside the blocks, in buffers, in this rank's optimizer."""

    plain: int
    ends: int
    held: int
    owned: int


@functools.lru_cache(maxsize=4096)
def _chunk_elements(
    architecture: Architecture,
    grid: Grid,
    *,
    has_embedding: bool,
    has_output: bool,
    is_distributed: bool,
    is_bucketed: bool,
    ranks: tuple[int | None, int | None],
) -> _Elements:
    members = chunk_parameters(architecture, grid, has_embedding=has_embedding, has_output=has_output)
    plain = sum(each.num_elements for each in members)
    ends = sum(each.num_elements for each in members if not each.key.startswith("decoder."))
    if not is_distributed:
        return _Elements(plain=plain, ends=ends, held=plain, owned=plain)
    # Megatron cuts the first chunk of the first stage only, and that only to overlap its messages.
    bucket_size = max(_SMALLEST_BUCKET, _BUCKET_PER_RANK * grid.dp)
    held = owned = 0
    for is_expert, num_ranks, rank in ((False, grid.dp * grid.cp, ranks[0]), (True, grid.edp, ranks[1])):
        buffer = buffer_layout(
            [each for each in members if each.is_expert == is_expert],
            num_ranks,
            bucket_size=bucket_size if is_bucketed and has_embedding else None,
        )
        held += buffer.num_elements
        owned += _owned(buffer, num_ranks, rank)
    return _Elements(plain=plain, ends=ends, held=held, owned=owned)


def buffer_layout(parameters: Sequence[Parameter], num_ranks: int, *, bucket_size: int | None) -> Buffer:
    """Where the distributed optimizer puts parameters and gradients, the last one first.

    Args:
        parameters: of one chunk and one kind, in the order of the module.
        num_ranks: that share the optimizer.
        bucket_size: elements at which a bucket is closed; None for one bucket.
    """
    multiple = math.lcm(num_ranks, _BUCKET_END)
    spans: list[tuple[int, int]] = []
    buckets: list[tuple[int, int]] = []
    bucket_start = end = 0
    is_open = False
    for each in reversed(parameters):
        start = _round_up(end, _PARAMETER_START)
        if each.is_shared and is_open:  # it has a bucket of its own
            buckets.append((bucket_start, _round_up(start, multiple)))
            start = bucket_start = buckets[-1][1]
        end = start + each.num_elements
        spans.append((start, end))
        is_open = True
        if each.is_shared or (bucket_size is not None and end - bucket_start >= bucket_size):
            buckets.append((bucket_start, _round_up(end, multiple)))
            bucket_start = end = buckets[-1][1]
            is_open = False
    if is_open:
        buckets.append((bucket_start, _round_up(end, multiple)))
    return Buffer(num_elements=buckets[-1][1] if buckets else 0, spans=tuple(spans), buckets=tuple(buckets))


def _owned(buffer: Buffer, num_ranks: int, rank: int | None) -> int:
    """Elements of parameters in a rank's share of every bucket; None: of a share, padding included."""
    total = 0
    for start, end in buffer.buckets:
        share = (end - start) // num_ranks
        if rank is None:
            total += share
            continue
        low, high = start + rank * share, start + (rank + 1) * share
        total += sum(max(0, min(high, b) - max(low, a)) for a, b in buffer.spans)
    return total


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
