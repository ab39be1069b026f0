"""Sums along each packed sequence, whole also when context parallelism spreads the sequence over ranks.

Under context parallelism of size cp a rank holds chunks r and 2 cp - 1 - r of every sequence. The [T / cp]
vectors are gathered over the group, put in the order of (sequence, position), summed, and the local part is
handed back.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sftrl.errors import UserError
from megatron_sftrl.vocab_parallel.arithmetic import cumulative_sum
from megatron_sftrl.vocab_parallel.collectives import (
    all_gather,
    gather_with_gradient,
    group_rank,
    group_size,
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sequences:
    """Loss tokens grouped by their sequence; every method returns [T], one value for each token held here.

    Tokens without loss take no part in any sum; what they get back is the value of their sequence.
    Sums run in float64, so that a token's place in a long pack does not change its digits; results have the
    dtype of the input. All but `index` and `count` are differentiable, `minimum` and `maximum` are not.

    Args:
        owner: [N] int64, sequence of each token of the whole batch, in order; N = T * cp.
        is_loss: [N] bool, in the same order.
        order: [N] int64, where the n-th token in order stands in the concatenation of the ranks' vectors;
            None when that is n itself.
        local: [T] int64, place in order of each token held here.
    """

    owner: Tensor
    is_loss: Tensor
    order: Tensor | None
    local: Tensor
    num_sequences: int
    cp_group: dist.ProcessGroup | None

    def sum(self, x: Tensor) -> Tensor:
        """Sum of x over the loss tokens of the sequence."""
        return self._back(self._totals(self._in_order(x))[self.owner], x)

    def mean(self, x: Tensor) -> Tensor:
        """Mean of x over the loss tokens of the sequence; 0 where it has none."""
        counts = self._totals(self.is_loss.double()).clamp(min=1)
        return self._back((self._totals(self._in_order(x)) / counts)[self.owner], x)

    def minimum(self, x: Tensor) -> Tensor:
        """Smallest x among the loss tokens of the sequence; 0 where it has none."""
        return self._extreme(x, "amin", torch.inf)

    def maximum(self, x: Tensor) -> Tensor:
        """Largest x among the loss tokens of the sequence; 0 where it has none."""
        return self._extreme(x, "amax", -torch.inf)

    def count(self) -> Tensor:
        """int64, number of loss tokens of the sequence."""
        return self._totals(self.is_loss.long())[self.owner][self.local]

    def index(self) -> Tensor:
        """int64, number of loss tokens of the sequence before this token: 0 for its first loss token."""
        return self._index()[self.local]

    def prefix_mean(self, x: Tensor) -> Tensor:
        """Mean of x over the loss tokens of the sequence up to this one, itself included; 0 before the first.

        At a token without loss it is that of the last loss token before it.
        """
        values = self._in_order(x)
        until = cumulative_sum(values, 0)
        before = torch.cat([until.new_zeros(1), until])[self._first()][self.owner]
        counts = self._index() + self.is_loss.long()
        return self._back((until - before) / counts.clamp(min=1), x)

    def suffix_sum(self, x: Tensor, block_size: int = 1) -> Tensor:
        """Sum of x over the loss tokens of the sequence after this token's block of `block_size` loss tokens.

        Blocks are counted from the first loss token of the sequence; with block_size 1 the sum is over all
        loss tokens strictly after this one. At a token without loss the value has no meaning, but is finite.
        """
        if block_size < 1:
            raise UserError(f"suffix_sum: expected block_size >= 1, got {block_size}")
        values = self._in_order(x)
        # slot of a block: any place inside its sequence that no other block takes, in the order of the blocks
        slot = self._first()[self.owner] + self._index() // block_size
        slot = slot.clamp(max=self.owner.numel() - 1)
        in_blocks = cumulative_sum(torch.zeros_like(values).index_add(0, slot, values), 0)
        sequence_end = cumulative_sum(self._totals(values), 0)[self.owner]
        return self._back(sequence_end - in_blocks[slot], x)

    def _in_order(self, x: Tensor) -> Tensor:
        """[N] float64, 0 where there is no loss, whatever stood there."""
        if x.shape != self.local.shape:
            raise UserError(f"sequences: expected [T] = {list(self.local.shape)}, got {list(x.shape)}")
        values = gather_with_gradient(x.double(), self.cp_group).flatten()
        values = values if self.order is None else values[self.order]
        return torch.where(self.is_loss, values, 0.0)

    def _back(self, values: Tensor, x: Tensor) -> Tensor:
        return values[self.local].to(x.dtype)

    def _totals(self, values: Tensor) -> Tensor:
        """[S] sum of the [N] values of each sequence."""
        return values.new_zeros(self.num_sequences).index_add(0, self.owner, values)

    def _first(self) -> Tensor:
        """[S] place of each sequence's first token."""
        lengths = self._totals(torch.ones_like(self.owner))
        return lengths.cumsum(0) - lengths

    def _index(self) -> Tensor:
        before = self.is_loss.long().cumsum(0) - self.is_loss.long()
        counts = self._totals(self.is_loss.long())
        return before - (counts.cumsum(0) - counts)[self.owner]

    def _extreme(self, x: Tensor, reduce: str, nothing: float) -> Tensor:
        values = self._in_order(x.detach()).masked_fill(~self.is_loss, nothing)
        empty = values.new_full((self.num_sequences,), nothing)
        found = empty.scatter_reduce(0, self.owner, values, reduce)
        return self._back(found.masked_fill(found == nothing, 0.0)[self.owner], x)


def sequences_of(
    *, cu_seqlens: Tensor, positions: Tensor, loss_mask: Tensor, cp_group: dist.ProcessGroup | None = None
) -> Sequences:
    """The sequences of a packed batch.

    Args:
        cu_seqlens: [S + 1] int32, offsets into the local vectors.
        positions: [T] int64, position inside the whole sequence; gives the order under context parallelism.
        cp_group: context-parallel group; None when sequences are whole.
    """
    num_sequences, num_tokens = cu_seqlens.numel() - 1, loss_mask.numel()
    place = torch.arange(num_tokens, device=loss_mask.device)
    owner = torch.bucketize(place, cu_seqlens[1:].to(place.dtype), right=True).clamp(max=num_sequences - 1)
    if group_size(cp_group) == 1:
        return Sequences(
            owner=owner,
            is_loss=loss_mask.bool(),
            order=None,
            local=place,
            num_sequences=num_sequences,
            cp_group=None,
        )
    gathered = all_gather(torch.stack([owner, positions, loss_mask.long()]), cp_group)  # [cp, 3, T]
    owners, all_positions, masks = gathered.permute(1, 0, 2).flatten(1)
    by_position = torch.argsort(all_positions, stable=True)
    order = by_position[torch.argsort(owners[by_position], stable=True)]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.numel(), device=order.device)
    start = group_rank(cp_group) * num_tokens
    return Sequences(
        owner=owners[order],
        is_loss=masks[order].bool(),
        order=order,
        local=rank[start : start + num_tokens],
        num_sequences=num_sequences,
        cp_group=cp_group,
    )
