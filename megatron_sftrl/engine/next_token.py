"""Drawing the next token of many prefixes with the policy, through the training schedule, in any layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_sftrl.engine import cpu_backend
from megatron_sftrl.engine.context_parallel import local_rows
from megatron_sftrl.engine.determinism import named_operator
from megatron_sftrl.engine.kv_cache import CacheSlots
from megatron_sftrl.engine.parallel import ParallelContext
from megatron_sftrl.engine.policy import PolicyEngine
from megatron_sftrl.engine.schedule import LastStageInput, as_megatron_loss, run_schedule
from megatron_sftrl.types import SamplingParams, TokenBatch
from megatron_sftrl.vocab_parallel.arithmetic import cumulative_sum

_BLOCK = 128
"""Entries of the vocabulary that are summed together before one of them is drawn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NextTokens:
    """One token for each prefix: [S] int64 ids, [S] fp32 logprobs in nats as types.Rollout documents them."""

    ids: Tensor
    logprobs: Tensor


@torch.no_grad()
@named_operator()
def next_tokens(
    policy: PolicyEngine,
    batches: Sequence[TokenBatch],
    last_rows: Sequence[Tensor],
    uniforms: Tensor,
    sampling: SamplingParams,
    *,
    places: Sequence[CacheSlots] = (),
) -> NextTokens:
    """The token after each prefix: the most likely one, or the inverse of the cumulative distribution.

    Args:
        batches: packed prefixes, as run_schedule wants them.
        last_rows: per micro-batch, [S_i] int64 row of each prefix's last token in the packed micro-batch.
        uniforms: [S] float64 in [0, 1), one per prefix in order; equal numbers give equal tokens in every
            layout, up to rounding of the logits.
        places: of the batches' tokens in a cache of keys and values; none without a cache.
    Returns:
        The same on every rank of this data-parallel replica.
    Raises:
        FloatingPointError: on every rank of this replica: logits that are NaN or infinite.
    """
    parallel = policy.parallel
    is_decoding = bool(places) and places[0].span is not None
    if is_decoding and parallel.pp_size == 1:
        parts = [_decoded_logits(policy, batches[0].tokens, last_rows[0], places[0])]
    else:
        parts = _scheduled_logits(policy, batches, last_rows, places)
    num_prefixes = sum(rows.numel() for rows in last_rows)
    drawn = torch.zeros(2, num_prefixes, dtype=torch.float64, device=parallel.device)
    if parallel.is_last_stage:
        with cpu_backend.without_redirection():
            logits = (parts[0] if len(parts) == 1 else torch.cat(parts))[:, : policy.architecture.vocab_size]
            drawn = torch.stack(_draw(logits, uniforms.to(parallel.device), sampling))
    if parallel.pp_size > 1:
        dist.broadcast(drawn, src=parallel.last_stage_rank, group=parallel.pp_group)
    if not bool(drawn.isfinite().all()):
        raise FloatingPointError(
            f"rank {parallel.rank} (data-parallel {parallel.dp_rank}): the logits to draw the next tokens "
            "from are NaN or infinite"
        )
    return NextTokens(ids=drawn[0].long(), logprobs=drawn[1].float())


def _decoded_logits(policy: PolicyEngine, tokens: Tensor, rows: Tensor, places: CacheSlots) -> Tensor:
    """[S, V_padded] fp32 behind new tokens: one micro-batch through one stage asks for no schedule."""
    parallel, model = policy.parallel, policy.chunks[0]
    places = places.map(lambda value: value.to(parallel.device))
    hidden_states = model.new_token_states(tokens.to(parallel.device), places)
    with cpu_backend.without_redirection():
        layer = model.output(hidden_states)
        logits = F.linear(layer.hidden, layer.weight)
        # V-sized copies are as dear as a small model's layers: none where every row is wanted.
        return _gather_vocabulary(logits[: rows.numel()].float(), parallel)


def _scheduled_logits(
    policy: PolicyEngine,
    batches: Sequence[TokenBatch],
    last_rows: Sequence[Tensor],
    places: Sequence[CacheSlots],
) -> list[Tensor]:
    """[S_i, V_padded] fp32 of each micro-batch; empty before the last stage."""
    parallel = policy.parallel

    def pick_rows(stage: LastStageInput) -> tuple[Tensor, Tensor, Tensor]:
        layer = stage.model.output(stage.hidden_states)
        rows = last_rows[stage.index].to(parallel.device, non_blocking=True)
        # Logits of the wanted rows only: those of all tokens of all prompts are the largest tensor by far.
        hidden = _rows_over_cp(layer.hidden, rows, stage.lengths, parallel)
        logits = F.linear(hidden, layer.weight).float()  # [S, V_padded/tp]
        return as_megatron_loss(logits.new_zeros(()), _gather_vocabulary(logits, parallel))

    return run_schedule(policy.wrapped, batches, pick_rows, parallel, forward_only=True, places=places)


def _rows_over_cp(hidden: Tensor, rows: Tensor, lengths: Sequence[int], parallel: ParallelContext) -> Tensor:
    """[S, H] of [T/cp, H]: each wanted row lives on one context-parallel rank; the others add zero."""
    if parallel.cp_size == 1:
        return hidden[rows]
    mine = local_rows(lengths, cp_rank=parallel.cp_rank, cp_size=parallel.cp_size)
    mine = mine.to(rows.device, non_blocking=True)
    is_mine = rows[:, None] == mine[None]  # [S, T/cp]
    local = is_mine.int().argmax(dim=1)
    picked = torch.where(is_mine.any(dim=1)[:, None], hidden[local], 0.0)
    dist.all_reduce(picked, group=parallel.cp_group)
    return picked


def _gather_vocabulary(logits: Tensor, parallel: ParallelContext) -> Tensor:
    """[S, V_padded]: one row per prefix, not per token, so the whole vocabulary is affordable here."""
    if parallel.tp_size == 1:
        return logits
    shards = [torch.empty_like(logits) for _ in range(parallel.tp_size)]
    dist.all_gather(shards, logits.contiguous(), group=parallel.tp_group)
    return torch.cat(shards, dim=1)


def _draw(logits: Tensor, uniforms: Tensor, sampling: SamplingParams) -> tuple[Tensor, Tensor]:
    """([S] ids, [S] log-probabilities), both float64 so that they travel in one tensor.

    NaN instead of both where nothing can be drawn: one rank alone must not raise. All in float64: in fp32 it
    was twice as fast, but a draw near a boundary then fell on the other side of it under another layout (seen
    at tp 2).
    """
    if sampling.temperature == 0:
        return _most_likely(logits)
    scaled = logits if sampling.temperature == 1 else logits / sampling.temperature
    largest = scaled.amax(dim=1, keepdim=True).double()
    if not bool(largest.isfinite().all()):
        return _nothing(largest[:, 0])
    weights = scaled.double().sub_(largest).exp_()  # [S, V], up to a factor the probabilities
    totals = _block_sums(_blocks(weights)).sum(dim=1, keepdim=True)  # [S, 1]
    kept = _truncated(weights, top_k=sampling.top_k, top_p=sampling.top_p)
    ids = _inverse_cumulative(kept, uniforms)
    logprobs = (scaled.gather(1, ids).double() - largest) - totals.log()
    return ids[:, 0].double(), logprobs[:, 0]


def _most_likely(logits: Tensor) -> tuple[Tensor, Tensor]:
    """As _draw(). No weight decides about a token here, so they may be fp32; only their sum is float64.

    The largest of all is looked for among the largest of each block: a search for a place is slow, a search
    for a value is not.
    """
    blocks = _blocks(logits, fill=-torch.inf)
    peaks = blocks.amax(dim=2)  # [S, V / block]
    block = peaks.argmax(dim=1)
    inside = blocks[torch.arange(len(blocks), device=blocks.device), block]  # [S, block]
    ids = block * _BLOCK + inside.argmax(dim=1)
    largest = peaks.amax(dim=1)
    if not bool(largest.isfinite().all()):
        return _nothing(largest.double())
    totals = _block_sums(_blocks((logits - largest[:, None]).exp_())).double().sum(dim=1)
    return ids.double(), -totals.log()


def _nothing(like: Tensor) -> tuple[Tensor, Tensor]:
    """As _draw(), without a token."""
    nothing = torch.full_like(like, torch.nan)
    return nothing, nothing


def _inverse_cumulative(weights: Tensor, uniforms: Tensor) -> Tensor:
    """[S, 1] int64: the first entry whose cumulative weight is above `uniforms` of the whole.

    Only the block in which it lies is cumulated entry by entry: over a vocabulary that is the slow part.

    Args:
        weights: [S, V] float64, not all zero in any row.
        uniforms: [S] float64 in [0, 1).
    """
    blocks = _blocks(weights)
    cumulative = cumulative_sum(_block_sums(blocks), 1)  # [S, V / block]
    wanted = uniforms[:, None] * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, wanted, right=True).clamp(max=cumulative.shape[1] - 1)
    before = F.pad(cumulative, (1, 0)).gather(1, chosen)
    inside = blocks[torch.arange(len(blocks), device=blocks.device), chosen[:, 0]]  # [S, block]
    place = torch.searchsorted(before + cumulative_sum(inside, 1), wanted, right=True)
    # Rounding of the sums may point behind the block's last entry with a weight, never before its first.
    last = inside.shape[1] - 1 - (inside > 0).flip(1).int().argmax(dim=1, keepdim=True)
    return chosen * _BLOCK + torch.minimum(place, last)


def _blocks(weights: Tensor, *, fill: float = 0.0) -> Tensor:
    """[S, V / block, block]; `fill` fills the last block up."""
    missing = -weights.shape[1] % _BLOCK
    return (F.pad(weights, (0, missing), value=fill) if missing else weights).unflatten(1, (-1, _BLOCK))


def _block_sums(blocks: Tensor) -> Tensor:
    """[S, V / block]."""
    return blocks.sum(dim=2)


def _truncated(weights: Tensor, *, top_k: int, top_p: float) -> Tensor:
    """[S, V] weights of the kept tokens, 0 for the others; not renormalised."""
    if top_k == 0 and top_p == 1:
        return weights
    ranked, order = weights.sort(dim=1, descending=True, stable=True)
    if top_k > 0:
        ranked[:, top_k:] = 0.0
    cumulative = cumulative_sum(ranked, 1)
    # A token stays when those before it do not hold top_p yet; the first one always does.
    ranked = ranked.masked_fill(cumulative - ranked >= top_p * cumulative[:, -1:], 0.0)
    return torch.empty_like(weights).scatter_(1, order, ranked)
