"""One rank's part of the statistics: sums over its columns, and how they are moved to the global maxima."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_sftrl.vocab_parallel import rows as local
from megatron_sftrl.vocab_parallel import triton_rows
from megatron_sftrl.vocab_parallel.statistics import Expectation, Pick, Plan, Total


def local_sums(plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """One pass over this rank's columns.

    Returns:
        maxima [sources, T], partition sums [sources, T], and [statistics, T] the sum each Total and
        Expectation asks for, all relative to this rank's own maxima; for a Pick the raw logit, 0 where the id
        lives elsewhere; rows of other statistics are zero.
    """
    options = {"dtype": plan.dtype, "device": plan.sources[0].device}
    maxima = torch.empty(len(plan.sources), plan.num_tokens, **options)
    partitions = torch.empty_like(maxima)
    sums = torch.zeros(len(plan.statistics), plan.num_tokens, **options)
    for rows, chunk in plan.chunks():
        _pick(chunk, sums[:, rows])
        fill = triton_rows.fill_sums if triton_rows.covers(chunk) else fill_sums
        fill(chunk, maxima[:, rows], partitions[:, rows], sums[:, rows])
    return maxima, partitions, sums


def _pick(plan: Plan, sums: Tensor) -> None:
    """The raw logit of each Pick whose id lives here, for tokens whose logits are at hand."""
    for row, statistic in zip(sums, plan.statistics, strict=True):
        if isinstance(statistic, Pick) and statistic.of.shard.num_columns:
            column, is_here = statistic.of.shard.local_ids(statistic.ids)
            logit = statistic.of.logits.detach().gather(1, column[:, None]).squeeze(1)
            row.copy_(torch.where(is_here, logit, 0.0))


def fill_sums(plan: Plan, maxima: Tensor, partitions: Tensor, sums: Tensor) -> None:
    """Maxima, partition sums, and the rows of Total and Expectation, for tokens whose logits are at hand."""
    for rows in local.row_chunks(plan.sources[0], 2 * len(plan.sources) + 1, plan.dtype):
        shifts, exps = [], []
        for i, source in enumerate(plan.sources):
            maxima[i, rows] = local.local_maximum(source, rows, plan.dtype)
            shifts.append(local.shifted(source, rows, maxima[i]))
            exps.append(torch.exp(shifts[i]))
            partitions[i, rows] = exps[i].sum(dim=1)
        buffer = torch.empty_like(shifts[0])
        for row, statistic in zip(sums, plan.statistics, strict=True):
            if isinstance(statistic, Total):
                row[rows] = shifts[plan.index(statistic.of)].sum(dim=1)
            elif isinstance(statistic, Expectation):
                weights, values = plan.index(statistic.weights), plan.index(statistic.values)
                row[rows] = local.weighted_sum_of(exps[weights], shifts[values], buffer)


def rescaled_sums(
    plan: Plan, maxima: Tensor, local_maxima: Tensor, partitions: Tensor, sums: Tensor
) -> Tensor:
    """[sources + statistics, T] this rank's part of every sum, relative to the global maxima."""
    factors, offsets = [], []
    for i, source in enumerate(plan.sources):
        factor = torch.exp(source.scaled(local_maxima[i] - maxima[i]))
        factors.append(factor.masked_fill(local_maxima[i] == -torch.inf, 0.0))
        offsets.append(source.scaled(local.finite_maximum(local_maxima[i]) - local.finite_maximum(maxima[i])))
    parts = [factors[i] * partitions[i] for i in range(len(plan.sources))]
    for row, statistic in zip(sums, plan.statistics, strict=True):
        if isinstance(statistic, Total):
            i = plan.index(statistic.of)
            parts.append(row + statistic.of.shard.num_columns * offsets[i])
        elif isinstance(statistic, Expectation):
            weights, values = plan.index(statistic.weights), plan.index(statistic.values)
            moved = factors[weights] * (row + partitions[weights] * offsets[values])
            parts.append(moved.masked_fill(factors[weights] == 0, 0.0))  # no mass here: also where z is -inf
        elif isinstance(statistic, Pick):
            source = statistic.of
            _, is_here = source.shard.local_ids(statistic.ids)
            maximum = local.finite_maximum(maxima[plan.index(source)])
            # an id outside the vocabulary lives on no rank: NaN, not the silent 0 of an id on another rank
            is_outside = (statistic.ids < 0) | (statistic.ids >= source.shard.vocab_size)
            picked = source.scaled(row - maximum).where(is_here, 0.0)
            parts.append(picked.masked_fill(is_outside, torch.nan))
        else:
            parts.append(row)
    return torch.stack(parts)
