"""The arithmetic on one rank's columns: a few token rows at a time, so that they stay in cache.

Nothing here knows of other ranks, and nothing writes into the logits. `shift` is always z - maximum, so that
no sum is taken over large numbers; the maximum is this rank's own in the forward and the global one in the
backward. A logit of -inf in a real column is a probability of exactly zero: 0 * -inf counts as 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megatron_sftrl.vocab_parallel import triton_rows
from megatron_sftrl.vocab_parallel.statistics import (
    Evaluation,
    Expectation,
    Pick,
    Source,
    Terms,
    Total,
    finite_maximum,
)

# Bytes of one chunk's buffers: half of a CPU core's share of cache, and enough to fill a GPU.
CPU_CHUNK_BYTES = 2 * 1024**2
CUDA_CHUNK_BYTES = 256 * 1024**2


def row_chunks(source: Source, num_buffers: int, dtype: torch.dtype) -> Iterator[slice]:
    """Slices over the tokens, so small that `num_buffers` buffers of the columns fit the chunk bytes."""
    budget = CUDA_CHUNK_BYTES if source.device.type == "cuda" else CPU_CHUNK_BYTES
    row_bytes = max(1, source.shard.num_columns) * dtype.itemsize * num_buffers
    step = max(1, budget // row_bytes)
    for start in range(0, source.num_tokens, step):
        yield slice(start, min(start + step, source.num_tokens))


def local_maximum(source: Source, rows: slice, dtype: torch.dtype) -> Tensor:
    """[rows] largest raw logit of this rank; -inf when it holds no real column."""
    real = source.real_logits[rows]
    if real.shape[1] == 0:
        return torch.full((real.shape[0],), -torch.inf, dtype=dtype, device=real.device)
    return real.amax(dim=1).to(dtype)


def shifted(source: Source, rows: slice, maximum: Tensor) -> Tensor:
    """[rows, num_columns] z - maximum in the maximum's dtype, a new buffer.

    A maximum of -inf (no column has any probability) is taken as 0, since -inf - -inf has no value.
    """
    shift = source.real_logits[rows] - finite_maximum(maximum)[rows, None]
    return shift if source.inverse_tau is None else shift.mul_(source.inverse_tau[rows, None])


def weighted_sum_of(weights: Tensor, values: Tensor, buffer: Tensor) -> Tensor:
    """[rows] sum over the columns of weights * values, where 0 * -inf is 0; `buffer` is overwritten.

    A NaN that is not 0 * -inf needs no care here: it has made the sum of the weights, or the partition
    function of the values, NaN as well.
    """
    return torch.mul(weights, values, out=buffer).nansum(dim=1)


def finite_shift_(shift: Tensor) -> Tensor:
    """Replace -inf by a huge finite number, in place on a buffer of ours, so that 0 * shift is 0."""
    return shift.clamp_(min=-(torch.finfo(shift.dtype).max ** 0.75))


def local_sums(evaluation: Evaluation) -> tuple[Tensor, Tensor, Tensor]:
    """Maxima [sources, T], partition sums [sources, T], and [statistics, T] sums over this rank's columns.

    The sums are what each Total and Expectation asks for, all relative to this rank's own maxima; for a Pick
    the raw logit, 0 where the id lives elsewhere; rows of other statistics are zero.
    """
    options = {"dtype": evaluation.dtype, "device": evaluation.sources[0].device}
    maxima = torch.empty(len(evaluation.sources), evaluation.num_tokens, **options)
    partitions = torch.empty_like(maxima)
    sums = torch.zeros(len(evaluation.statistics), evaluation.num_tokens, **options)
    for rows, chunk in evaluation.chunks():
        _pick(chunk, sums[:, rows])
        fill = triton_rows.fill_sums if triton_rows.covers(chunk) else fill_sums
        fill(chunk, maxima[:, rows], partitions[:, rows], sums[:, rows])
    return maxima, partitions, sums


def _pick(evaluation: Evaluation, sums: Tensor) -> None:
    """The raw logit of each Pick whose id lives here, for tokens whose logits are at hand."""
    for row, statistic in zip(sums, evaluation.statistics, strict=True):
        if isinstance(statistic, Pick) and statistic.of.shard.num_columns:
            column, is_here = statistic.of.shard.local_ids(statistic.ids)
            logit = statistic.of.logits.detach().gather(1, column[:, None]).squeeze(1)
            row.copy_(torch.where(is_here, logit, 0.0))


def fill_sums(evaluation: Evaluation, maxima: Tensor, partitions: Tensor, sums: Tensor) -> None:
    """Maxima, partition sums, and the rows of Total and Expectation, for tokens whose logits are at hand."""
    for rows in row_chunks(evaluation.sources[0], 2 * len(evaluation.sources) + 1, evaluation.dtype):
        shifts, exps = [], []
        for i, source in enumerate(evaluation.sources):
            maxima[i, rows] = local_maximum(source, rows, evaluation.dtype)
            shifts.append(shifted(source, rows, maxima[i]))
            exps.append(torch.exp(shifts[i]))
            partitions[i, rows] = exps[i].sum(dim=1)
        buffer = torch.empty_like(shifts[0])
        for row, statistic in zip(sums, evaluation.statistics, strict=True):
            if isinstance(statistic, Total):
                row[rows] = shifts[evaluation.index(statistic.of)].sum(dim=1)
            elif isinstance(statistic, Expectation):
                weights, values = evaluation.index(statistic.weights), evaluation.index(statistic.values)
                row[rows] = weighted_sum_of(exps[weights], shifts[values], buffer)


def rescaled_sums(
    evaluation: Evaluation, maxima: Tensor, local_maxima: Tensor, partitions: Tensor, sums: Tensor
) -> Tensor:
    """[sources + statistics, T] this rank's part of every sum, relative to the global maxima."""
    factors, offsets = [], []
    for i, source in enumerate(evaluation.sources):
        factor = torch.exp(source.scaled(local_maxima[i] - maxima[i]))
        factors.append(factor.masked_fill(local_maxima[i] == -torch.inf, 0.0))
        offsets.append(source.scaled(finite_maximum(local_maxima[i]) - finite_maximum(maxima[i])))
    parts = [factors[i] * partitions[i] for i in range(len(evaluation.sources))]
    for row, statistic in zip(sums, evaluation.statistics, strict=True):
        if isinstance(statistic, Total):
            i = evaluation.index(statistic.of)
            parts.append(row + statistic.of.shard.num_columns * offsets[i])
        elif isinstance(statistic, Expectation):
            weights, values = evaluation.index(statistic.weights), evaluation.index(statistic.values)
            moved = factors[weights] * (row + partitions[weights] * offsets[values])
            parts.append(moved.masked_fill(factors[weights] == 0, 0.0))  # no mass here: also where z is -inf
        elif isinstance(statistic, Pick):
            source = statistic.of
            _, is_here = source.shard.local_ids(statistic.ids)
            maximum = finite_maximum(maxima[evaluation.index(source)])
            # an id outside the vocabulary lives on no rank: NaN, not the silent 0 of an id on another rank
            is_outside = (statistic.ids < 0) | (statistic.ids >= source.shard.vocab_size)
            picked = source.scaled(row - maximum).where(is_here, 0.0)
            parts.append(picked.masked_fill(is_outside, torch.nan))
        else:
            parts.append(row)
    return torch.stack(parts)


def gradient_of_logits(
    evaluation: Evaluation,
    i: int,
    grads: Sequence[Tensor | None],
    values: Sequence[Tensor],
    partitions: Tensor,
    maxima: Tensor,
    *,
    may_overwrite: bool,
) -> Tensor | None:
    """d loss / d logits of the evaluation's i-th source; all of its logits exist.

    Args:
        grads: [T] d loss / d value of each statistic, None where nothing flows.
        values: [T] of each statistic.
        partitions, maxima: [sources, T], over all ranks.
        may_overwrite: no other gradient of this evaluation is still to come; logits that are scratch are then
            overwritten by their gradient.
    Returns:
        [T, V_local] in the logits' dtype, padding exactly 0; None when nothing flows into the source.
    """
    terms = Terms.of(evaluation, i, grads, values, partitions)
    if terms is None:
        return None
    source = evaluation.sources[i]
    # Within a chunk of rows everything is read before anything is written.
    is_last_reader = source.scratch is not None and source.scratch.num_readers == 1 and may_overwrite
    out = source.logits.detach() if is_last_reader else torch.empty_like(source.logits)
    write = triton_rows.fill_gradient if triton_rows.covers(evaluation) else fill_gradient
    return write(out, evaluation, i, terms, maxima)


def fill_gradient(gradient: Tensor, evaluation: Evaluation, i: int, terms: Terms, maxima: Tensor) -> Tensor:
    """Write [T, V_local] d loss / d logits of source i; padding gets exactly 0. May be the logits' memory."""
    source = evaluation.sources[i]
    num_columns = source.shard.num_columns
    num_buffers = 3 + len(terms.linear) + len(terms.other)
    for rows in row_chunks(source, num_buffers, evaluation.dtype):
        shift = shifted(source, rows, maxima[i])
        out = torch.exp(shift)
        out.mul_(_factor(evaluation, i, terms, maxima, rows, shift))
        for j, coefficient in terms.other.items():
            mass = shifted(evaluation.sources[j], rows, maxima[j]).exp_()
            out.addcmul_(mass, coefficient[rows, None])
        if terms.uniform is not None:
            out.add_(terms.uniform[rows, None])
        for ids, coefficient in terms.onehots:
            column, is_here = source.shard.local_ids(ids[rows])
            if num_columns:
                out.scatter_add_(1, column[:, None], coefficient[rows].where(is_here, 0.0)[:, None])
        if source.inverse_tau is not None:
            out.mul_(source.inverse_tau[rows, None])
        gradient[rows, :num_columns] = out
    gradient[:, num_columns:] = 0
    return gradient


def _factor(
    evaluation: Evaluation, i: int, terms: Terms, maxima: Tensor, rows: slice, shift: Tensor
) -> Tensor:
    """[rows, columns or 1] what exp(z - M) is multiplied by; may overwrite `shift`."""
    factor = terms.constant[rows, None]
    for j, coefficient in terms.linear.items():
        values = shift if j == i else shifted(evaluation.sources[j], rows, maxima[j])
        factor = finite_shift_(values).mul_(coefficient[rows, None]).add_(factor)
    return factor


def cumulative_sum(values: Tensor, dim: int) -> Tensor:
    """torch.cumsum, which has no kernel on CUDA for train.deterministic (2.13): there in doubling steps.

    log2(n) additions of the whole tensor in one order, with gradients; rounding differs from torch's.
    """
    if not (values.is_cuda and values.is_floating_point() and torch.are_deterministic_algorithms_enabled()):
        return values.cumsum(dim)
    return doubling_sum(values, dim)


def doubling_sum(values: Tensor, dim: int) -> Tensor:
    """Cumulative sums along `dim`: each step adds what lies 1, 2, 4, ... places before."""
    size, distance = values.shape[dim], 1
    while distance < size:
        head = values.narrow(dim, 0, distance)
        tail = values.narrow(dim, distance, size - distance) + values.narrow(dim, 0, size - distance)
        values = torch.cat([head, tail], dim=dim)
        distance *= 2
    return values
