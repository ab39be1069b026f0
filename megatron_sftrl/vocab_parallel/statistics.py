"""Several statistics of several vocabulary-sharded distributions, in one MAX and one SUM all-reduce.

With z the logits of a distribution, M their maximum, p = softmax(z), and q another distribution's softmax:

    LogSumExp    log sum_v exp(z_v - M)          d/dz = p
    Pick         z_y - M                         d/dz = onehot(y)
    Total        sum_v (z_v - M)                 d/dz = 1
    Expectation  E_q[z - M]                      d/dz = q,   d/du = q ((z - M) - E_q[z - M])   (u: q's logits)

Everything is relative to M, so that log-probabilities of logits near 1e4 keep all their digits; M cancels in
every quantity that does not change when a constant is added to z, and only such quantities leave this
folder. Hence M is a constant for the gradient.

The backward recomputes p = exp(z - M) / sum from the saved logits and [T] vectors, chunk by chunk, adds all
gradients in one pass, and needs no collective: what follows the SUM is computed alike on all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sftrl.vocab_parallel import rows as local
from megatron_sftrl.vocab_parallel.collectives import all_reduce_max, all_reduce_sum
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


def evaluate(statistics: Sequence[Statistic]) -> list[Tensor]:
    """The [T] value of each statistic, differentiable in the logits of every source that requires it.

    All sources share one tensor-parallel group and one T. Values are float64 when any logits are, else
    float32.
    """
    plan = plan_of(statistics)
    values = _Evaluate.apply(plan, *(source.logits for source in plan.sources))
    assert isinstance(values, tuple)
    return list(values)


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What one evaluation computes: its statistics, and their sources without repetition."""

    statistics: tuple[Statistic, ...]
    sources: tuple[Source, ...]
    dtype: torch.dtype

    def index(self, source: Source) -> int:
        """Where the source stands in `sources`."""
        return next(i for i, candidate in enumerate(self.sources) if candidate is source)


def plan_of(statistics: Sequence[Statistic]) -> Plan:
    """The plan of one evaluation; ValueError when its distributions differ in columns or tokens."""
    sources: dict[int, Source] = {}
    for statistic in statistics:
        for source in _sources_of(statistic):
            sources[id(source)] = source
    first = next(iter(sources.values()))
    for source in sources.values():
        _check_alike(first, source)
    is_double = any(source.dtype == torch.float64 for source in sources.values())
    dtype = torch.float64 if is_double else torch.float32
    return Plan(tuple(statistics), tuple(sources.values()), dtype)


def _check_alike(first: Source, other: Source) -> None:
    expected, got = first.shard, other.shard
    if got.group is not expected.group or first.logits.shape[0] != other.logits.shape[0]:
        raise ValueError(
            f"distributions compared with each other: expected the same group and T = "
            f"{first.logits.shape[0]}, "
            f"got T = {other.logits.shape[0]}; run both models on the same batch and layout"
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


def _sources_of(statistic: Statistic) -> tuple[Source, ...]:
    if isinstance(statistic, Expectation):
        return (statistic.weights, statistic.values)
    return (statistic.of,)


def local_sums(plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """One pass over this rank's columns.

    Returns:
        maxima [sources, T], partition sums [sources, T], and [statistics, T] the sum each Total and
        Expectation asks for, all relative to this rank's own maxima; rows of other statistics are zero.
    """
    first = plan.sources[0].logits
    options = {"dtype": plan.dtype, "device": first.device}
    maxima = torch.empty(len(plan.sources), first.shape[0], **options)
    partitions = torch.empty_like(maxima)
    sums = torch.zeros(len(plan.statistics), first.shape[0], **options)
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
    return maxima, partitions, sums


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
            column, is_here = source.shard.local_ids(statistic.ids)
            maximum = local.finite_maximum(maxima[plan.index(source)])
            if source.shard.num_columns == 0:
                parts.append(torch.zeros_like(maximum))
                continue
            logit = source.logits.detach().gather(1, column[:, None]).squeeze(1)
            # an id outside the vocabulary lives on no rank: NaN, not the silent 0 of an id on another rank
            is_outside = (statistic.ids < 0) | (statistic.ids >= source.shard.vocab_size)
            picked = source.scaled(logit - maximum).where(is_here, 0.0)
            parts.append(picked.masked_fill(is_outside, torch.nan))
        else:
            parts.append(row)
    return torch.stack(parts)


class _Evaluate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan: Plan, *logits: Tensor) -> tuple[Tensor, ...]:
        group = plan.sources[0].shard.group
        local_maxima, local_partitions, sums = local_sums(plan)
        maxima = all_reduce_max(local_maxima, group)
        reduced = all_reduce_sum(rescaled_sums(plan, maxima, local_maxima, local_partitions, sums), group)
        partitions = reduced[: len(plan.sources)]
        values = []
        for value, statistic in zip(reduced[len(plan.sources) :], plan.statistics, strict=True):
            if isinstance(statistic, LogSumExp):
                value = partitions[plan.index(statistic.of)].log()
            elif isinstance(statistic, Expectation):
                value = value / partitions[plan.index(statistic.weights)]
            values.append(value.clone())
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(maxima, partitions, *values, *logits)
        return tuple(values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        maxima, partitions, *rest = ctx.saved_tensors  # unpacking also checks that no logits were overwritten
        values = rest[: len(plan.statistics)]
        results: list[Tensor | None] = []
        for i in range(len(plan.sources)):
            terms = _Terms.of(plan, i, grads, values, partitions)
            is_wanted = ctx.needs_input_grad[1 + i] and terms is not None
            results.append(_gradient(plan, i, terms, maxima) if is_wanted and terms is not None else None)
        return None, *results


@dataclass(slots=True, eq=False)
class _Terms:
    """The gradient into one source i, as coefficients [T] of what stands in the columns:

    dz = exp(z - M) * (constant + sum_j linear[j] shift_j) + sum_j other[j] exp(shift_j) + uniform + onehots
    """

    constant: Tensor
    linear: dict[int, Tensor]
    other: dict[int, Tensor]
    uniform: Tensor | None
    onehots: list[tuple[Tensor, Tensor]]

    @staticmethod
    def of(
        plan: Plan, i: int, grads: Sequence[Tensor | None], values: Sequence[Tensor], partitions: Tensor
    ) -> _Terms | None:
        """None when nothing flows into the source."""
        terms = _Terms(torch.zeros_like(partitions[i]), {}, {}, None, [])
        source, is_touched = plan.sources[i], False
        for statistic, grad, value in zip(plan.statistics, grads, values, strict=True):
            if grad is None or all(touched is not source for touched in _sources_of(statistic)):
                continue
            is_touched = True
            if isinstance(statistic, LogSumExp):
                terms.constant += grad / partitions[i]
            elif isinstance(statistic, Pick):
                terms.onehots.append((statistic.ids, grad))
            elif isinstance(statistic, Total):
                terms.uniform = grad if terms.uniform is None else terms.uniform + grad
            else:
                weights, j = plan.index(statistic.weights), plan.index(statistic.values)
                share = grad / partitions[weights]
                if weights == i:
                    terms.constant -= share * value
                    terms.linear[j] = terms.linear[j] + share if j in terms.linear else share
                if j == i == weights:
                    terms.constant += share
                elif j == i:
                    terms.other[weights] = terms.other[weights] + share if weights in terms.other else share
        return terms if is_touched else None


def _gradient(plan: Plan, i: int, terms: _Terms, maxima: Tensor) -> Tensor:
    """[T, V_local] d loss / d logits of source i in the logits' dtype; padding gets exactly 0."""
    source = plan.sources[i]
    num_columns = source.shard.num_columns
    gradient = torch.empty_like(source.logits, memory_format=torch.contiguous_format)
    gradient[:, num_columns:] = 0
    is_direct = gradient.dtype == plan.dtype
    num_buffers = 3 + len(terms.linear) + len(terms.other)
    for rows in local.row_chunks(source, num_buffers, plan.dtype):
        shift = local.shifted(source, rows, maxima[i])
        out = torch.exp(shift, out=gradient[rows, :num_columns] if is_direct else torch.empty_like(shift))
        out.mul_(_factor(plan, i, terms, maxima, rows, shift))
        for j, coefficient in terms.other.items():
            mass = local.shifted(plan.sources[j], rows, maxima[j]).exp_()
            out.addcmul_(mass, coefficient[rows, None])
        if terms.uniform is not None:
            out.add_(terms.uniform[rows, None])
        for ids, coefficient in terms.onehots:
            column, is_here = source.shard.local_ids(ids[rows])
            if num_columns:
                out.scatter_add_(1, column[:, None], coefficient[rows].where(is_here, 0.0)[:, None])
        if source.inverse_tau is not None:
            out.mul_(source.inverse_tau[rows, None])
        if not is_direct:
            gradient[rows, :num_columns] = out
    return gradient


def _factor(plan: Plan, i: int, terms: _Terms, maxima: Tensor, rows: slice, shift: Tensor) -> Tensor:
    """[rows, columns or 1] what exp(z - M) is multiplied by; may overwrite `shift`."""
    factor = terms.constant[rows, None]
    for j, coefficient in terms.linear.items():
        values = shift if j == i else local.shifted(plan.sources[j], rows, maxima[j])
        factor = local.finite_shift_(values).mul_(coefficient[rows, None]).add_(factor)
    return factor
