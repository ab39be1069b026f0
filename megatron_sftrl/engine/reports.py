"""Per-token numbers of the micro-batches, summed to one number each for the whole step."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sftrl.engine.parallel import ParallelContext
from megatron_sftrl.errors import UserError
from megatron_sftrl.vocab_parallel.one_pass import TokenValues


@dataclass(frozen=True, slots=True, kw_only=True)
class MicrobatchReport:
    """Sums over this rank's tokens of one micro-batch, weighted with token_weight.

    Args:
        names: of the sums after the first two.
        sums: [2 + len(names)] fp32: sum of weights, loss, then each metric.
        has_nonfinite_loss: [] bool, a trained token's loss is NaN or infinite.
        is_trained: False where a gradient was asked for and the loss has none.
        missing: of the names, those that some of the micro-batch's tokens lack.
    """

    names: tuple[str, ...]
    sums: Tensor
    has_nonfinite_loss: Tensor
    is_trained: bool
    missing: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One step over all ranks, the same on every rank.

    Args:
        weight: sum of token_weight.
        loss: sum of token_loss * token_weight, in nats for the losses of this package.
        metrics: averages over loss tokens with token_weight.
        nonfinite_microbatches: (dp_rank, micro-batch) whose loss was NaN or infinite.
        is_trained: False where gradients were asked for and no micro-batch's loss has one.
    """

    weight: float
    loss: float
    metrics: Mapping[str, float]
    nonfinite_microbatches: tuple[tuple[int, int], ...]
    is_trained: bool = True


def microbatch_report(values: TokenValues, token_weight: Tensor) -> MicrobatchReport:
    """Weigh [T] vectors into sums; positions of weight 0 count for nothing, whatever they hold."""
    token_loss, metrics = values.token_loss, values.metrics
    names = tuple(sorted(metrics))
    rows = torch.stack([torch.ones_like(token_weight), token_loss, *(metrics[name] for name in names)])
    is_counted = token_weight > 0
    weighted = torch.where(is_counted, rows.detach().float() * token_weight, 0.0)
    is_nonfinite = (~torch.isfinite(token_loss.detach()) & is_counted).any()
    return MicrobatchReport(
        names=names,
        sums=weighted.sum(dim=1),
        has_nonfinite_loss=is_nonfinite,
        is_trained=values.is_trained,
        missing=tuple(sorted(values.missing)),
    )


def combine_reports(reports: Sequence[StepReport], *, loss_name: str) -> StepReport:
    """Several steps as one: losses add up, metrics are averaged with their steps' weights.

    Raises:
        UserError: a metric that some of the steps lack.
    """
    weight = sum(report.weight for report in reports)
    names = reports[0].metrics
    _check_names(
        loss_name, {f"mini-batch {index}": frozenset(each.metrics) for index, each in enumerate(reports)}
    )
    return StepReport(
        weight=weight,
        loss=sum(report.loss for report in reports),
        metrics={
            name: sum(report.weight * report.metrics[name] for report in reports) / weight for name in names
        },
        nonfinite_microbatches=(),
        is_trained=all(report.is_trained for report in reports),
    )


def reduce_reports(
    reports: Sequence[MicrobatchReport], parallel: ParallelContext, *, loss_name: str
) -> StepReport:
    """Sum over micro-batches and over dp x cp on the last stage, then tell the other stages.

    Two small all-reduces and, when pp > 1, one broadcast for the whole step.

    Raises:
        UserError: on every rank, a metric that some micro-batch lacks: its average over the step is unknown.
    """
    result: list[StepReport | str | None] = [None]
    if parallel.is_last_stage:
        try:
            _agree_on_names(reports, parallel, loss_name)
            result = [_reduce_on_last_stage(reports, parallel)]
        except UserError as error:
            result = [str(error)]
    if parallel.pp_size > 1:
        dist.broadcast_object_list(result, src=parallel.last_stage_rank, group=parallel.pp_group)
    if isinstance(result[0], str):
        raise UserError(result[0])
    assert result[0] is not None
    return result[0]


def _agree_on_names(reports: Sequence[MicrobatchReport], parallel: ParallelContext, loss_name: str) -> None:
    """Every micro-batch of every rank has the same metrics, or all ranks raise the same UserError."""
    kinds = {(report.names, report.missing) for report in reports}
    print_of_names = zlib.crc32(repr(sorted(kinds)).encode())
    is_one = len(kinds) == 1 and not reports[0].missing
    # The numbers that follow have as many elements as there are names: ranks must not differ in it.
    extremes = torch.tensor([print_of_names, -print_of_names, not is_one], device=reports[0].sums.device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=parallel.dp_cp_group)
    highest, lowest, has_differences = extremes.tolist()
    if highest == -lowest and not has_differences:
        return
    mine = {
        f"micro-batch {index} of data-parallel rank {parallel.dp_rank}": (report.names, report.missing)
        for index, report in enumerate(reports)
    }
    everyone: list[dict] = [{}] * dist.get_world_size(parallel.dp_cp_group)
    dist.all_gather_object(everyone, mine, group=parallel.dp_cp_group)
    given: dict[str, frozenset[str]] = {}
    for of_rank in everyone:
        for place, (names, missing) in of_rank.items():
            # Context-parallel ranks share a micro-batch: what one of them lacks, it lacks.
            given[place] = given.get(place, frozenset(names)) & (frozenset(names) - frozenset(missing))
            given |= {f"some tokens of {place}": frozenset(names)} if missing else {}
    _check_names(loss_name, given)


def _check_names(loss_name: str, given: Mapping[str, frozenset[str]]) -> None:
    """Raise UserError unless every place gives the same names."""
    every = frozenset[str]().union(*given.values())
    for name in sorted(every):
        having = [place for place, names in given.items() if name in names]
        lacking = [place for place, names in given.items() if name not in names]
        if lacking:
            raise UserError(
                f"loss {loss_name!r}: metric {name!r} is given for {_some(having)}, and not for "
                f"{_some(lacking)}: its average over all loss tokens is unknown. Return every metric for "
                "every micro-batch, [T] values, for example zeros where it says nothing"
            )


def _some(places: Sequence[str], *, most: int = 3) -> str:
    return ", ".join(places[:most]) + (f" and {len(places) - most} more" if len(places) > most else "")


def _reduce_on_last_stage(reports: Sequence[MicrobatchReport], parallel: ParallelContext) -> StepReport:
    names = reports[0].names
    # fp64: the sum over thousands of micro-batches and ranks shall not depend on their number.
    sums = torch.stack([report.sums for report in reports]).double().sum(dim=0)
    flags = torch.zeros(parallel.dp_size, len(reports), dtype=torch.float64, device=sums.device)
    flags[parallel.dp_rank] = torch.stack([report.has_nonfinite_loss for report in reports]).double()
    num_trained = sums.new_tensor([sum(report.is_trained for report in reports)])
    packed = torch.cat([sums, num_trained, flags.flatten()])
    dist.all_reduce(packed, group=parallel.dp_cp_group)
    *values, num_trained = packed[: sums.numel() + 1].tolist()
    flagged = packed[sums.numel() + 1 :].view_as(flags).nonzero().tolist()
    weight, loss = values[0], values[1]
    metrics = {
        name: value / weight if weight else math.nan for name, value in zip(names, values[2:], strict=True)
    }
    return StepReport(
        weight=weight,
        loss=loss,
        metrics=metrics,
        nonfinite_microbatches=tuple((rank, index) for rank, index in flagged),
        is_trained=num_trained > 0,
    )
