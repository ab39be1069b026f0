"""One rank's gradient into the logits of a distribution, for tokens whose logits are at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sftrl.vocab_parallel import rows as local
from megatron_sftrl.vocab_parallel import triton_rows
from megatron_sftrl.vocab_parallel.statistics import LogSumExp, Pick, Plan, Total, sources_of


def gradient_of_logits(
    plan: Plan,
    i: int,
    grads: Sequence[Tensor | None],
    values: Sequence[Tensor],
    partitions: Tensor,
    maxima: Tensor,
    *,
    may_overwrite: bool,
) -> Tensor | None:
    """d loss / d logits of the plan's i-th source.

    Args:
        plan: all of its logits exist.
        i: which source.
        grads: [T] d loss / d value of each statistic, None where nothing flows.
        values: [T] of each statistic.
        partitions, maxima: [sources, T], over all ranks.
        may_overwrite: no other gradient of this plan is still to come; logits that are scratch are then
            overwritten by their gradient.
    Returns:
        [T, V_local] in the logits' dtype, padding exactly 0; None when nothing flows into the source.
    """
    terms = Terms.of(plan, i, grads, values, partitions)
    if terms is None:
        return None
    source = plan.sources[i]
    # Within a chunk of rows everything is read before anything is written.
    is_last_reader = source.scratch is not None and source.scratch.num_readers == 1 and may_overwrite
    out = source.logits.detach() if is_last_reader else torch.empty_like(source.logits)
    write = triton_rows.fill_gradient if triton_rows.covers(plan) else fill_gradient
    return write(out, plan, i, terms, maxima)


@dataclass(slots=True, eq=False)
class Terms:
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
    ) -> Terms | None:
        """None when nothing flows into the source."""
        terms = Terms(torch.zeros_like(partitions[i]), {}, {}, None, [])
        source, is_touched = plan.sources[i], False
        for statistic, grad, value in zip(plan.statistics, grads, values, strict=True):
            if grad is None or all(touched is not source for touched in sources_of(statistic)):
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


def fill_gradient(gradient: Tensor, plan: Plan, i: int, terms: Terms, maxima: Tensor) -> Tensor:
    """Write [T, V_local] d loss / d logits of source i; padding gets exactly 0. May be the logits' memory."""
    source = plan.sources[i]
    num_columns = source.shard.num_columns
    num_buffers = 3 + len(terms.linear) + len(terms.other)
    for rows in local.row_chunks(source, num_buffers, plan.dtype):
        shift = local.shifted(source, rows, maxima[i])
        out = torch.exp(shift)
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
        gradient[rows, :num_columns] = out
    gradient[:, num_columns:] = 0
    return gradient


def _factor(plan: Plan, i: int, terms: Terms, maxima: Tensor, rows: slice, shift: Tensor) -> Tensor:
    """[rows, columns or 1] what exp(z - M) is multiplied by; may overwrite `shift`."""
    factor = terms.constant[rows, None]
    for j, coefficient in terms.linear.items():
        values = shift if j == i else local.shifted(plan.sources[j], rows, maxima[j])
        factor = local.finite_shift_(values).mul_(coefficient[rows, None]).add_(factor)
    return factor
