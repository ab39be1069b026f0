"""Small batches for the tests of losses."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_sftrl import LossInputs, TokenBatch, TokenDistribution


def batch_of(labels: Tensor, *, lengths: list[int] | None = None, mask: Tensor | None = None) -> TokenBatch:
    """A packed batch with behaviour log-probabilities that vary; one sequence, all trained, by default."""
    lengths = lengths or [labels.numel()]
    mask = torch.ones(labels.numel(), dtype=torch.bool) if mask is None else mask
    noise = torch.Generator().manual_seed(11)
    return TokenBatch(
        tokens=labels,
        labels=labels,
        positions=torch.cat([torch.arange(length) for length in lengths]),
        loss_mask=mask,
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        token_weight=mask / mask.sum().clamp(min=1),
        behavior_logprobs=-3 + 2 * torch.randn(labels.numel(), generator=noise, dtype=torch.float64),
    )


def inputs_for(z: Tensor, u: Tensor | None = None, batch: TokenBatch | None = None) -> LossInputs:
    """Inputs over dense logits [T, V]; labels count through the vocabulary unless a batch is given."""
    num_tokens, vocab_size = z.shape
    if batch is None:
        batch = batch_of((torch.arange(num_tokens) * 37) % vocab_size)
    reference = None if u is None else TokenDistribution.from_logits(u, vocab_size=vocab_size)
    policy = TokenDistribution.from_logits(z, vocab_size=vocab_size)
    return LossInputs(policy=policy, batch=batch, reference=reference)
