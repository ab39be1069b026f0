"""Several statistics of several vocabulary-sharded distributions, in one MAX and one SUM all-reduce.

With z the logits of a distribution, M their maximum, p = softmax(z), and q another distribution's softmax:

    LogSumExp    log sum_v exp(z_v - M)          d/dz = p
    Pick         z_y - M                         d/dz = onehot(y)
    Total        sum_v (z_v - M)                 d/dz = 1
    Expectation  E_q[z - M]                      d/dz = q,   d/du = q ((z - M) - E_q[z - M])   (u: q's logits)

Everything is relative to M, so that log-probabilities of logits near 1e4 keep all their digits; M cancels in
every quantity that does not change when a constant is added to z, and only such quantities leave this
folder. Hence M is a constant for the gradient.

This file has one rank's sums; evaluation.py has the order of events, gradients.py the way back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sftrl.vocab_parallel import rows as local
from megatron_sftrl.vocab_parallel.output_layer import OutputLayer
from megatron_sftrl.vocab_parallel.rows import Source


@dataclass(frozen=True, slots=True, eq=False)
class LogSumExp:
    """log sum_v exp(z_v - M)."""

    of: Source


@dataclass(frozen=True, slots=True, eq=False)
class Pick:
    """z_y - M at one id per token."""

    of: Source
    ids: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Total:
    """sum_v (z_v - M) over the vocabulary."""

    of: Source


@dataclass(frozen=True, slots=True, eq=False)
class Expectation:
    """sum_v softmax(weights)_v (z_v - M), z and M of `values`."""

    weights: Source
    values: Source


Statistic = LogSumExp | Pick | Total | Expectation


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What one evaluation computes: its statistics, and their sources without repetition."""

    statistics: tuple[Statistic, ...]
    sources: tuple[Source, ...]
    dtype: torch.dtype

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.sources[0].num_tokens

    def index(self, source: Source) -> int:
        """Where the source stands in `sources`."""
        return next(i for i, candidate in enumerate(self.sources) if candidate is source)

    def chunks(self) -> Iterator[tuple[slice, Plan]]:
        """The plan for some tokens after the others, their logits at hand; whole where all logits exist."""
        layers = [source.origin for source in self.sources if isinstance(source.origin, OutputLayer)]
        if not layers:
            yield slice(0, self.num_tokens), self
            return
        widest = max(layers, key=lambda layer: layer.shape[1] * layer.dtype.itemsize)
        different = {layer.key: layer for layer in layers}
        chunks = widest.chunks(self.num_tokens, is_alone=len(different) == 1)
        buffers = {key: layer.buffer(chunks) for key, layer in different.items()}
        for rows in chunks:
            yield rows, self._at(rows, buffers)

    def _at(self, rows: slice, buffers: Mapping[tuple[int, ...], Tensor]) -> Plan:
        made: dict[tuple[int, ...], Tensor] = {}
        moved: dict[int, Source] = {}
        for source in self.sources:
            if source.key not in made:
                made[source.key] = _logits_at(source, rows, buffers)
            moved[id(source)] = source.at(rows, made[source.key])
        statistics = tuple(_moved(statistic, moved, rows) for statistic in self.statistics)
        return Plan(statistics, tuple(moved[id(source)] for source in self.sources), self.dtype)


def plan_of(statistics: Sequence[Statistic]) -> Plan:
    """The plan of one evaluation; ValueError when its distributions differ in columns or tokens."""
    sources: dict[int, Source] = {}
    for statistic in statistics:
        for source in sources_of(statistic):
            sources[id(source)] = source
    first = next(iter(sources.values()))
    for source in sources.values():
        _check_alike(first, source)
    is_double = any(source.dtype == torch.float64 for source in sources.values())
    dtype = torch.float64 if is_double else torch.float32
    return Plan(tuple(statistics), tuple(sources.values()), dtype)


def _check_alike(first: Source, other: Source) -> None:
    expected, got = first.shard, other.shard
    if got.group is not expected.group or first.num_tokens != other.num_tokens:
        raise ValueError(
            f"distributions compared with each other: expected the same group and T = {first.num_tokens}, "
            f"got T = {other.num_tokens}; run both models on the same batch and layout"
        )
    if (got.vocab_size, got.start, got.num_columns) != (
        expected.vocab_size,
        expected.start,
        expected.num_columns,
    ):
        raise ValueError(
            f"distributions compared with each other: expected columns {expected.start} + "
            f"{expected.num_columns} "
            f"of {expected.vocab_size}, got {got.start} + {got.num_columns} of {got.vocab_size}; "
            "split both vocabularies alike"
        )


def _logits_at(source: Source, rows: slice, buffers: Mapping[tuple[int, ...], Tensor]) -> Tensor:
    layer = source.origin
    return layer.logits(rows, buffers[layer.key]) if isinstance(layer, OutputLayer) else layer[rows]


def _moved(statistic: Statistic, moved: Mapping[int, Source], rows: slice) -> Statistic:
    """The statistic about the moved sources."""
    if isinstance(statistic, Expectation):
        return Expectation(moved[id(statistic.weights)], moved[id(statistic.values)])
    if isinstance(statistic, Pick):
        return Pick(moved[id(statistic.of)], statistic.ids[rows])
    return type(statistic)(moved[id(statistic.of)])


def sources_of(statistic: Statistic) -> tuple[Source, ...]:
    if isinstance(statistic, Expectation):
        return (statistic.weights, statistic.values)
    return (statistic.of,)


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
        _add_local_sums(chunk, maxima[:, rows], partitions[:, rows], sums[:, rows])
    return maxima, partitions, sums


def _add_local_sums(plan: Plan, maxima: Tensor, partitions: Tensor, sums: Tensor) -> None:
    """Fill the sums of tokens whose logits are at hand."""
    for row, statistic in zip(sums, plan.statistics, strict=True):
        if isinstance(statistic, Pick) and statistic.of.shard.num_columns:
            column, is_here = statistic.of.shard.local_ids(statistic.ids)
            logit = statistic.of.logits.detach().gather(1, column[:, None]).squeeze(1)
            row.copy_(torch.where(is_here, logit, 0.0))
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
