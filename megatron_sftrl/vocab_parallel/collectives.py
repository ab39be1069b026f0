"""Every collective of this folder and of the losses, in one place, so that each can be counted and judged.

A group of None is one process: no collective happens and torch.distributed need not be initialised. The
reductions carry no gradient: their callers are autograd functions with a closed form for it, in which nothing
is reduced, since what follows a reduction is alike on all ranks (identity backward of an all-reduce forward).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sftrl.errors import UserError


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

    Each rank uses the gathered values for its own outputs only, so the parts of the gradient differ and are
    summed (a reduce-scatter; done as an all-reduce, since gloo has no other).
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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class VocabShard:
    """The columns `start : start + num_columns` of a vocabulary of `vocab_size`, held by one rank of `group`.

    V counts no padding. What stands behind the real columns in the logits is padding and never read. A group
    of None is one process.
    """

    vocab_size: int
    start: int
    num_columns: int
    group: dist.ProcessGroup | None

    def local_ids(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """[T] column of each id on this rank (0 where it lives elsewhere), and [T] bool: it lives here."""
        local = ids - self.start
        is_here = (local >= 0) & (local < self.num_columns)
        return local.where(is_here, 0), is_here


def shard_of(
    width: int, *, vocab_size: int, group: dist.ProcessGroup | None, padded_vocab_size: int | None
) -> VocabShard:
    """The shard that logits [T, width] are on this rank.

    Two layouts are understood: equal widths on all ranks, padded at the end of the vocabulary (Megatron's),
    and the unpadded one of torch.chunk, where the last rank holds what is left.

    Raises:
        UserError: the widths cannot cover the vocabulary, or they look like gathered logits.
    """
    size, rank = group_size(group), group_rank(group)
    full_width = -(-vocab_size // size)
    last_width = vocab_size - (size - 1) * full_width
    if rank == size - 1 and 0 < last_width == width < full_width:
        return VocabShard(vocab_size=vocab_size, start=rank * full_width, num_columns=width, group=group)
    where = f"logits [T, {width}] on rank {rank} of {size} with vocab_size {vocab_size}"
    if padded_vocab_size is not None and width * size != padded_vocab_size:
        raise UserError(
            f"{where}: expected padded_vocab_size = width * ranks = {width * size}, got {padded_vocab_size}; "
            "give the padded size of the whole vocabulary"
        )
    if width * size < vocab_size:
        raise UserError(
            f"{where}: expected a width of at least {full_width} (last rank of an unpadded split: "
            f"{last_width}), got {width}; check vocab_size and the group"
        )
    if size > 1 and (size - 1) * width >= vocab_size and padded_vocab_size is None:
        raise UserError(
            f"{where}: expected one shard of the vocabulary, got a width with which the first "
            f"{size - 1} ranks already cover it. Pass local logits (parallel_output=True), "
            "pass group=None for gathered logits, "
            f"or confirm heavy padding with padded_vocab_size={width * size}"
        )
    start = min(rank * width, vocab_size)
    return VocabShard(
        vocab_size=vocab_size, start=start, num_columns=min(width, vocab_size - start), group=group
    )
