"""Drawing the next token of many prefixes with the policy, through the training schedule, in any layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sftrl.engine.context_parallel import local_rows
from megatron_sftrl.engine.parallel import ParallelContext
from megatron_sftrl.engine.policy import PolicyEngine
from megatron_sftrl.engine.scaling import as_megatron_loss
from megatron_sftrl.engine.schedule import LastStageInput, run_schedule
from megatron_sftrl.types import TokenBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class NextTokens:
    """One token for each prefix.

    Args:
        ids: [S] int64.
        logprobs: [S] fp32 nats, under the distribution that was sampled (temperature 1 when greedy).
    """

    ids: Tensor
    logprobs: Tensor


@torch.no_grad()
def next_tokens(
    policy: PolicyEngine,
    batches: Sequence[TokenBatch],
    last_rows: Sequence[Tensor],
    uniforms: Tensor,
    *,
    temperature: float,
) -> NextTokens:
    """The token after each prefix: the most likely one, or the inverse of the cumulative distribution.

    Args:
        policy: in evaluation or training mode, its weights are only read.
        batches: packed prefixes, as run_schedule wants them.
        last_rows: per micro-batch, [S_i] int64 row of each prefix's last token in the packed micro-batch.
        uniforms: [S] float64 in [0, 1), one per prefix in order; equal numbers give equal tokens in
            every layout, up to rounding of the logits.
        temperature: logits are divided by it; 0 takes the most likely token.
    Returns:
        The same on every rank of this data-parallel replica.
    """
    parallel = policy.parallel

    def pick_rows(stage: LastStageInput) -> tuple[Tensor, Tensor, Tensor]:
        logits = stage.model.logits(stage.hidden_states)  # [T/cp, V_padded/tp]
        rows = last_rows[stage.index].to(parallel.device)
        whole = stage.batch.cu_seqlens * parallel.cp_size
        picked = _rows_over_cp(logits, rows, whole, parallel)
        return as_megatron_loss(logits.new_zeros(()), _gather_vocabulary(picked, parallel))

    parts = run_schedule(policy.wrapped, batches, pick_rows, parallel, forward_only=True)
    num_prefixes = sum(rows.numel() for rows in last_rows)
    drawn = torch.zeros(2, num_prefixes, dtype=torch.float64, device=parallel.device)
    if parallel.is_last_stage:
        logits = torch.cat(parts)[:, : policy.architecture.vocab_size]
        drawn = torch.stack(_draw(logits, uniforms.to(parallel.device), temperature))
    if parallel.pp_size > 1:
        dist.broadcast(drawn, src=parallel.last_stage_rank, group=parallel.pp_group)
    return NextTokens(ids=drawn[0].long(), logprobs=drawn[1].float())


def _rows_over_cp(logits: Tensor, rows: Tensor, cu_seqlens: Tensor, parallel: ParallelContext) -> Tensor:
    """[S, V_padded/tp] fp32: each wanted row lives on one context-parallel rank; the others add zero."""
    if parallel.cp_size == 1:
        return logits[rows].float()
    mine = local_rows(cu_seqlens, cp_rank=parallel.cp_rank, cp_size=parallel.cp_size)
    is_mine = rows[:, None] == mine[None]  # [S, T/cp]
    local = is_mine.int().argmax(dim=1)
    picked = torch.where(is_mine.any(dim=1)[:, None], logits[local].float(), 0.0)
    dist.all_reduce(picked, group=parallel.cp_group)
    return picked


def _gather_vocabulary(logits: Tensor, parallel: ParallelContext) -> Tensor:
    """[S, V_padded]: one row per prefix, not per token, so the whole vocabulary is affordable here."""
    if parallel.tp_size == 1:
        return logits
    shards = [torch.empty_like(logits) for _ in range(parallel.tp_size)]
    dist.all_gather(shards, logits.contiguous(), group=parallel.tp_group)
    return torch.cat(shards, dim=1)


def _draw(logits: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """([S] ids, [S] log-probabilities), both float64 so that they travel in one tensor."""
    logprobs = torch.log_softmax(logits.double() / (temperature or 1.0), dim=1)
    if temperature == 0:
        ids = logprobs.argmax(dim=1, keepdim=True)
    else:
        cumulative = logprobs.exp().cumsum(dim=1)
        # Scaled to the last entry, so that rounding can never draw an id behind the vocabulary.
        ids = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)
        ids = ids.clamp(max=logits.shape[1] - 1)
    return ids[:, 0].double(), logprobs.gather(1, ids)[:, 0]
