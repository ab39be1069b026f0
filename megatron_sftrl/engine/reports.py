"""Per-token numbers of the micro-batches, summed to one number each for the whole step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sftrl.engine.parallel import ParallelContext


@dataclass(frozen=True, slots=True, kw_only=True)
class MicrobatchReport:
    """Sums over this rank's tokens of one micro-batch, weighted with token_weight.

    Args:
        names: of the sums after the first two.
        sums: [2 + len(names)] fp32: sum of weights, loss, then each metric.
        has_nonfinite_loss: [] bool, a trained token's loss is NaN or infinite.
    """

    names: tuple[str, ...]
    sums: Tensor
    has_nonfinite_loss: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One step over all ranks, the same on every rank.

    Args:
        weight: sum of token_weight.
        loss: sum of token_loss * token_weight, in nats for the losses of this package.
        metrics: averages over loss tokens with token_weight.
        nonfinite_microbatches: (dp_rank, micro-batch) whose loss was NaN or infinite.
    """

    weight: float
    loss: float
    metrics: Mapping[str, float]
    nonfinite_microbatches: tuple[tuple[int, int], ...]


def microbatch_report(
    token_loss: Tensor, metrics: Mapping[str, Tensor], token_weight: Tensor
) -> MicrobatchReport:
    """Weigh [T] vectors into sums; positions of weight 0 count for nothing, whatever they hold."""
    names = tuple(sorted(metrics))
    rows = torch.stack([torch.ones_like(token_weight), token_loss, *(metrics[name] for name in names)])
    is_counted = token_weight > 0
    weighted = torch.where(is_counted, rows.detach().float() * token_weight, 0.0)
    is_nonfinite = (~torch.isfinite(token_loss.detach()) & is_counted).any()
    return MicrobatchReport(names=names, sums=weighted.sum(dim=1), has_nonfinite_loss=is_nonfinite)


def combine_reports(reports: Sequence[StepReport]) -> StepReport:
    """Several steps as one: losses add up, metrics are averaged with their steps' weights."""
    weight = sum(report.weight for report in reports)
    names = reports[0].metrics
    return StepReport(
        weight=weight,
        loss=sum(report.loss for report in reports),
        metrics={
            name: sum(report.weight * report.metrics[name] for report in reports) / weight for name in names
        },
        nonfinite_microbatches=(),
    )


def reduce_reports(reports: Sequence[MicrobatchReport], parallel: ParallelContext) -> StepReport:
    """Sum over micro-batches and over dp x cp on the last stage, then tell the other stages.

    One all-reduce and, when pp > 1, one broadcast for the whole step.
    """
    result: list[StepReport | None] = [None]
    if parallel.is_last_stage:
        result = [_reduce_on_last_stage(reports, parallel)]
    if parallel.pp_size > 1:
        dist.broadcast_object_list(result, src=parallel.last_stage_rank, group=parallel.pp_group)
    assert result[0] is not None
    return result[0]


def _reduce_on_last_stage(reports: Sequence[MicrobatchReport], parallel: ParallelContext) -> StepReport:
    names = reports[0].names
    # fp64: the sum over thousands of micro-batches and ranks shall not depend on their number.
    sums = torch.stack([report.sums for report in reports]).double().sum(dim=0)
    flags = torch.zeros(parallel.dp_size, len(reports), dtype=torch.float64, device=sums.device)
    flags[parallel.dp_rank] = torch.stack([report.has_nonfinite_loss for report in reports]).double()
    packed = torch.cat([sums, flags.flatten()])
    dist.all_reduce(packed, group=parallel.dp_cp_group)
    values = packed[: sums.numel()].tolist()
    flagged = packed[sums.numel() :].view_as(flags).nonzero().tolist()
    weight, loss = values[0], values[1]
    metrics = {
        name: value / weight if weight else math.nan for name, value in zip(names, values[2:], strict=True)
    }
    return StepReport(
        weight=weight,
        loss=loss,
        metrics=metrics,
        nonfinite_microbatches=tuple((rank, index) for rank, index in flagged),
    )
