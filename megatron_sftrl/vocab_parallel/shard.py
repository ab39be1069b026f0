"""Which columns of the vocabulary a rank holds, and whether the logits it was given can be that shard."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from megatron_sftrl.errors import UserError
from megatron_sftrl.vocab_parallel.collectives import group_rank, group_size


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class VocabShard:
    """The columns `start : start + num_columns` of a vocabulary of `vocab_size`, held by one rank of `group`.

    Args:
        vocab_size: V, without padding.
        start: first column of this rank.
        num_columns: real columns held here; what stands behind them in the logits is padding and never read.
        group: the tensor-parallel group; None is one process.
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
