"""Every collective of this folder and of the losses, in one place, so that each can be counted and judged.

A group of None is one process: no collective happens and torch.distributed need not be initialised.
The reductions carry no gradient of their own. Their callers are autograd functions that know the closed form
of their gradient, in which nothing has to be reduced: what follows a reduction is computed alike on all ranks
(identity backward of an all-reduce forward).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor


def group_size(group: dist.ProcessGroup | None) -> int:
    """Number of ranks of the group; 1 without one."""
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: dist.ProcessGroup | None) -> int:
    """This process's rank inside the group; 0 without one."""
    return 0 if group is None else dist.get_rank(group)


Meanwhile = Callable[[], None]
"""Work that needs no result of a reduction, done between its start and the wait for it."""


def all_reduce_max(
    values: Tensor, group: dist.ProcessGroup | None, meanwhile: Meanwhile | None = None
) -> Tensor:
    """Elementwise maximum over the group, as a new tensor without gradient."""
    return _all_reduce(values, dist.ReduceOp.MAX, group, meanwhile)


def all_reduce_sum(
    values: Tensor, group: dist.ProcessGroup | None, meanwhile: Meanwhile | None = None
) -> Tensor:
    """Elementwise sum over the group, as a new tensor without gradient."""
    return _all_reduce(values, dist.ReduceOp.SUM, group, meanwhile)


def all_gather(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The tensors of all ranks, stacked: [...] becomes [group size, ...]. No gradient."""
    values = values.detach().contiguous()
    if group_size(group) == 1:
        return values.unsqueeze(0)
    parts = [torch.empty_like(values) for _ in range(group_size(group))]
    dist.all_gather(parts, values, group)
    return torch.stack(parts)


def gather_with_gradient(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """all_gather whose gradient is the sum, over the ranks, of what each rank's loss says about this part.

    Every rank uses all of the gathered values for its own outputs only, so the parts of the gradient differ
    from rank to rank and are summed (a reduce-scatter; done as an all-reduce, since gloo has no other).
    """
    if group_size(group) == 1:
        return values.unsqueeze(0)
    return _GatherWithGradient.apply(values, group)


def _all_reduce(
    values: Tensor, op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None, meanwhile: Meanwhile | None
) -> Tensor:
    reduced = values.detach().clone(memory_format=torch.contiguous_format)
    if group_size(group) > 1:
        work = dist.all_reduce(reduced, op, group, async_op=True)
        if meanwhile is not None:
            meanwhile()
        assert work is not None
        work.wait()  # on CUDA the stream waits, not the process
    return reduced


class _GatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return all_gather(values, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce_sum(grad, ctx.group)[group_rank(ctx.group)], None
