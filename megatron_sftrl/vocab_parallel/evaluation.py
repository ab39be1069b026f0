"""The order of events: local sums, one MAX, one SUM all-reduce, and in the backward no collective at all.

The backward recomputes p = exp(z - M) / sum from logits and [T] vectors, chunk by chunk, and adds all
gradients in one pass; what follows the SUM is alike on all ranks. Where an output layer stands in for the
logits, each chunk's are made once in the forward and once in the backward, with only [T] vectors in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sftrl.vocab_parallel.arithmetic import gradient_of_logits, local_sums, rescaled_sums, row_chunks
from megatron_sftrl.vocab_parallel.arithmetic import local_sums as sums_of_shard
from megatron_sftrl.vocab_parallel.collectives import Meanwhile, all_gather, all_reduce_max, all_reduce_sum
from megatron_sftrl.vocab_parallel.output_layer import GradientSums, OutputLayer
from megatron_sftrl.vocab_parallel.statistics import (
    Evaluation,
    Expectation,
    LogSumExp,
    Source,
    Statistic,
    finite_maximum,
)


def evaluate(statistics: Sequence[Statistic], meanwhile: Meanwhile | None = None) -> list[Tensor]:
    """The [T] value of each statistic, differentiable in whatever the sources are made of.

    All sources share one tensor-parallel group and one T. Values are float64 when any logits are, else
    float32. `meanwhile` is done once during each of the two reductions of a group of several ranks.
    """
    evaluation = Evaluation.of(statistics)
    values = _Evaluate.apply(evaluation, meanwhile, *_tensors_of(evaluation.sources))
    assert isinstance(values, tuple)
    return list(values)


def _tensors_of(sources: Sequence[Source]) -> list[Tensor]:
    """Logits of each source, or hidden states and weight of its layer."""
    tensors: list[Tensor] = []
    for source in sources:
        layer = source.origin
        tensors += [layer.hidden, layer.weight] if isinstance(layer, OutputLayer) else [layer]
    return tensors


class _Evaluate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, evaluation: Evaluation, meanwhile: Meanwhile | None, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        group = evaluation.sources[0].shard.group
        local_maxima, local_partitions, sums = local_sums(evaluation)
        maxima = all_reduce_max(local_maxima, group, meanwhile)
        moved = rescaled_sums(evaluation, maxima, local_maxima, local_partitions, sums)
        reduced = all_reduce_sum(moved, group, meanwhile)
        partitions = reduced[: len(evaluation.sources)]
        values = []
        for value, statistic in zip(reduced[len(evaluation.sources) :], evaluation.statistics, strict=True):
            if isinstance(statistic, LogSumExp):
                value = partitions[evaluation.index(statistic.of)].log()
            elif isinstance(statistic, Expectation):
                value = value / partitions[evaluation.index(statistic.weights)]
            values.append(value.clone())
        if any(ctx.needs_input_grad):
            for scratch in {source.scratch for source in evaluation.sources if source.scratch is not None}:
                scratch.num_readers += 1
        ctx.evaluation = evaluation
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(maxima, partitions, *values, *tensors)
        return tuple(values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        evaluation: Evaluation = ctx.evaluation
        maxima, partitions, *rest = ctx.saved_tensors  # unpacking also checks that no logits were overwritten
        values = rest[: len(evaluation.statistics)]
        totals = [_Total(source) if source.requires_grad else None for source in evaluation.sources]
        is_only_one = sum(total is not None for total in totals) == 1
        for rows, chunk in evaluation.chunks():
            of_chunk = [None if grad is None else grad[rows] for grad in grads]
            known = [value[rows] for value in values]
            for i, total in enumerate(totals):
                if total is not None:
                    gradient = gradient_of_logits(
                        chunk,
                        i,
                        of_chunk,
                        known,
                        partitions[:, rows],
                        maxima[:, rows],
                        may_overwrite=is_only_one,
                    )
                    total.add(rows, gradient)
        results: list[Tensor | None] = []
        for source, total in zip(evaluation.sources, totals, strict=True):
            results += total.results() if total is not None else [None] * len(_tensors_of([source]))
        return None, None, *results


class _Total:
    """The gradient into what one source is made of, over the chunks."""

    def __init__(self, source: Source) -> None:
        layer = source.origin
        self._layer = layer if isinstance(layer, OutputLayer) else None
        self._sums = GradientSums.of(layer) if isinstance(layer, OutputLayer) else None
        self._logits: Tensor | None = None

    def add(self, rows: slice, gradient: Tensor | None) -> None:
        """Take a chunk's d loss / d logits, None when nothing flows; logits that exist are one chunk."""
        if self._layer is None or self._sums is None:
            self._logits = gradient
        elif gradient is not None:
            self._layer.add_gradients(rows, gradient, self._sums)

    def results(self) -> list[Tensor | None]:
        """One for each tensor of the source."""
        if self._layer is None or self._sums is None:
            return [self._logits]
        return [self._sums.hidden, self._layer.tell_autograd(self._sums)]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TopLogits:
    """The k largest logits of each token, alike on all ranks of the group.

    `values` are [T, k] in the working dtype, without gradient, unsorted (sorting costs as much as finding);
    `ids` [T, k] int64 say whose they are, where they were asked for; `log_sum` is [T] nats, log sum_v
    exp(z_v - max z) over the whole vocabulary.
    """

    values: Tensor
    ids: Tensor | None
    log_sum: Tensor

    def mass(self) -> Tensor:
        """[T] sum of the k largest probabilities."""
        shift = self.values - finite_maximum(self.values.amax(dim=1))[:, None]
        return (torch.logsumexp(shift, dim=1) - self.log_sum).exp()

    def entropy(self, tau: Tensor | float) -> Tensor:
        """[T] nats, entropy of softmax(values / tau); `tau` is [T] or one number, positive."""
        scale = tau[:, None] if isinstance(tau, Tensor) else tau
        shift = (self.values - finite_maximum(self.values.amax(dim=1))[:, None]) / scale
        exps = torch.exp(shift)
        total = exps.sum(dim=1)
        return total.log() - (exps * shift).nansum(dim=1) / total  # nansum: -inf columns have p = 0


@torch.no_grad()
def gather_top_k(source: Source, k: int, *, with_ids: bool) -> tuple[TopLogits, Tensor]:
    """The top k, and [T] E_p[z - M] over all columns; one all-gather, no gradient."""
    evaluation = Evaluation.of((LogSumExp(source), Expectation(source, source)))
    packets = []
    for _, chunk in evaluation.chunks():
        maxima, partitions, sums = sums_of_shard(chunk)
        top = _local_top_k(chunk.sources[0], k, with_ids=with_ids)
        packets.append(torch.cat([*top, maxima[0][:, None], partitions[0][:, None], sums[1][:, None]], 1))
    gathered = all_gather(torch.cat(packets), source.shard.group)  # [ranks, T, k + 3], or 2 k + 3 with ids
    candidates = gathered[:, :, :k].transpose(0, 1).flatten(1)  # [T, ranks * k]
    candidate_ids = gathered[:, :, k : 2 * k].transpose(0, 1).flatten(1) if with_ids else None
    if candidates.shape[1] > k:
        values, places = candidates.topk(k, dim=1, sorted=False)
        candidate_ids = None if candidate_ids is None else candidate_ids.gather(1, places)
    else:
        values = candidates
    parts = gathered[:, :, -3:].permute(2, 0, 1)  # [3, ranks, T]
    maximum = parts[0].amax(dim=0)
    ranks = range(gathered.shape[0])
    reduced = torch.stack(
        [
            rescaled_sums(
                evaluation,
                maximum[None],
                parts[0, rank][None],
                parts[1, rank][None],
                torch.stack([torch.zeros_like(maximum), parts[2, rank]]),
            )
            for rank in ranks
        ]
    ).sum(dim=0)
    log_sum = reduced[0].log()
    ids = None if candidate_ids is None else candidate_ids.long()
    return TopLogits(values=values, ids=ids, log_sum=log_sum), reduced[2] / reduced[0]


def _local_top_k(source: Source, k: int, *, with_ids: bool) -> list[Tensor]:
    """[T, k] this rank's largest logits over the temperature, -inf where it has fewer columns; their ids.

    Ids travel as numbers of the logits' dtype: float32 holds them up to 2^24, far above any vocabulary.
    """
    num_local = min(k, source.shard.num_columns)
    top = torch.full((source.num_tokens, k), -torch.inf, dtype=source.dtype, device=source.device)
    ids = torch.zeros_like(top) if with_ids else None
    for rows in row_chunks(source, 2, source.dtype):
        values, columns = source.real_logits[rows].topk(num_local, dim=1, sorted=False)
        values = values.to(source.dtype)
        top[rows, :num_local] = (
            values if source.inverse_tau is None else values * source.inverse_tau[rows, None]
        )
        if ids is not None:
            ids[rows, :num_local] = (columns + source.shard.start).to(source.dtype)
    return [top] if ids is None else [top, ids]
