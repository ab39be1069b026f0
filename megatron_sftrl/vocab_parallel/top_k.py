"""The largest logits of the whole vocabulary, gathered from the shards in one all-gather."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sftrl.vocab_parallel.collectives import all_gather
from megatron_sftrl.vocab_parallel.rows import Source, finite_maximum, row_chunks
from megatron_sftrl.vocab_parallel.statistics import Expectation, LogSumExp, plan_of
from megatron_sftrl.vocab_parallel.sums import local_sums as sums_of_shard
from megatron_sftrl.vocab_parallel.sums import rescaled_sums


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TopLogits:
    """The k largest logits of each token, alike on all ranks of the group.

    Args:
        values: [T, k] in the working dtype, without gradient, in no order (sorting costs as much as finding).
    """

    values: Tensor

    def entropy(self, tau: Tensor | float) -> Tensor:
        """[T] nats, entropy of softmax(values / tau); `tau` is [T] or one number, positive."""
        scale = tau[:, None] if isinstance(tau, Tensor) else tau
        shift = (self.values - finite_maximum(self.values.amax(dim=1))[:, None]) / scale
        exps = torch.exp(shift)
        total = exps.sum(dim=1)
        return total.log() - (exps * shift).nansum(dim=1) / total  # nansum: -inf columns have p = 0


@torch.no_grad()
def gather_top_k(source: Source, k: int) -> tuple[TopLogits, Tensor, Tensor]:
    """The top k, and the statistics of the whole vocabulary that travel with them.

    Returns:
        the top logits, [T] log sum_v exp(z_v - M), and [T] E_p[z - M], all without gradient.
    """
    plan = plan_of((LogSumExp(source), Expectation(source, source)))
    packets = []
    for _, chunk in plan.chunks():
        maxima, partitions, sums = sums_of_shard(chunk)
        top = _local_top_k(chunk.sources[0], k)
        packets.append(torch.cat([top, maxima[0][:, None], partitions[0][:, None], sums[1][:, None]], 1))
    gathered = all_gather(torch.cat(packets), source.shard.group)  # [ranks, T, k + 3]
    candidates = gathered[:, :, :k].transpose(0, 1).flatten(1)  # [T, ranks * k]
    values = candidates.topk(k, dim=1, sorted=False).values if candidates.shape[1] > k else candidates
    parts = gathered[:, :, k:].permute(2, 0, 1)  # [3, ranks, T]
    maximum = parts[0].amax(dim=0)
    ranks = range(gathered.shape[0])
    reduced = torch.stack(
        [
            rescaled_sums(
                plan,
                maximum[None],
                parts[0, rank][None],
                parts[1, rank][None],
                torch.stack([torch.zeros_like(maximum), parts[2, rank]]),
            )
            for rank in ranks
        ]
    ).sum(dim=0)
    return TopLogits(values=values), reduced[0].log(), reduced[2] / reduced[0]


def _local_top_k(source: Source, k: int) -> Tensor:
    """[T, k] this rank's largest logits over the temperature, -inf where it has fewer columns."""
    num_local = min(k, source.shard.num_columns)
    top = torch.full((source.num_tokens, k), -torch.inf, dtype=source.dtype, device=source.device)
    for rows in row_chunks(source, 2, source.dtype):
        values = source.real_logits[rows].topk(num_local, dim=1, sorted=False).values.to(source.dtype)
        top[rows, :num_local] = (
            values if source.inverse_tau is None else values * source.inverse_tau[rows, None]
        )
    return top
