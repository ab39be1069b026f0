"""The order of events: local sums, one MAX, one SUM all-reduce, and in the backward no collective at all.

The backward recomputes p = exp(z - M) / sum from logits and [T] vectors, chunk by chunk, and adds all
gradients in one pass; nothing has to be reduced, because what follows the SUM is computed alike on all ranks.
Where an output layer stands in for the logits, each chunk's are made once in the forward and once in the
backward, and only [T] vectors live in between.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_sftrl.vocab_parallel.collectives import Meanwhile, all_reduce_max, all_reduce_sum
from megatron_sftrl.vocab_parallel.gradients import gradient_of_logits
from megatron_sftrl.vocab_parallel.output_layer import GradientSums, OutputLayer
from megatron_sftrl.vocab_parallel.rows import Source
from megatron_sftrl.vocab_parallel.statistics import (
    Expectation,
    LogSumExp,
    Plan,
    Statistic,
    plan_of,
)
from megatron_sftrl.vocab_parallel.sums import local_sums, rescaled_sums


def evaluate(statistics: Sequence[Statistic], meanwhile: Meanwhile | None = None) -> list[Tensor]:
    """The [T] value of each statistic, differentiable in whatever the sources are made of.

    All sources share one tensor-parallel group and one T. Values are float64 when any logits are, else
    float32. `meanwhile` is done once during each of the two reductions of a group of several ranks.
    """
    plan = plan_of(statistics)
    values = _Evaluate.apply(plan, meanwhile, *_tensors_of(plan.sources))
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
    def forward(ctx, plan: Plan, meanwhile: Meanwhile | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        group = plan.sources[0].shard.group
        local_maxima, local_partitions, sums = local_sums(plan)
        maxima = all_reduce_max(local_maxima, group, meanwhile)
        moved = rescaled_sums(plan, maxima, local_maxima, local_partitions, sums)
        reduced = all_reduce_sum(moved, group, meanwhile)
        partitions = reduced[: len(plan.sources)]
        values = []
        for value, statistic in zip(reduced[len(plan.sources) :], plan.statistics, strict=True):
            if isinstance(statistic, LogSumExp):
                value = partitions[plan.index(statistic.of)].log()
            elif isinstance(statistic, Expectation):
                value = value / partitions[plan.index(statistic.weights)]
            values.append(value.clone())
        if any(ctx.needs_input_grad):
            for scratch in {id(s.scratch): s.scratch for s in plan.sources if s.scratch is not None}.values():
                scratch.num_readers += 1
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(maxima, partitions, *values, *tensors)
        return tuple(values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        maxima, partitions, *rest = ctx.saved_tensors  # unpacking also checks that no logits were overwritten
        values = rest[: len(plan.statistics)]
        totals = [_Total(source) if source.requires_grad else None for source in plan.sources]
        is_only_one = sum(total is not None for total in totals) == 1
        for rows, chunk in plan.chunks():
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
        for source, total in zip(plan.sources, totals, strict=True):
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
