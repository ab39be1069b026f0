"""token_weight, which makes normalisation data: it sums to 1 over one optimizer step and all ranks.

The three aggregations are three ways to fill it. All need only counts over the whole step, so that how
the step is cut into micro-batches, data-parallel or context-parallel parts changes nothing.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from megatron_sftrl.errors import UserError

Aggregation = Literal["token_mean", "sequence_mean", "constant_length"]


def token_weights(
    loss_mask: Tensor,
    cu_seqlens: Tensor,
    aggregation: Aggregation,
    *,
    num_loss_tokens: int,
    num_sequences: int,
    max_length: int,
) -> Tensor:
    """The weight of each token in the step's loss.

        token_mean        1 / loss tokens of the step
        sequence_mean     1 / (sequences of the step * loss tokens of this sequence)
        constant_length   1 / (sequences of the step * max_length)       (Dr. GRPO, arXiv:2503.20783)

    The first two sum to 1 over the step; constant_length sums to the filled share of it.

    Args:
        loss_mask: [T] bool, of whole sequences: weights are filled before context parallelism cuts them.
        cu_seqlens: [S + 1] int32.
        aggregation: how tokens are averaged.
        num_loss_tokens: over all micro-batches and ranks of the step.
        num_sequences: sequences that have loss tokens, over the same.
        max_length: tokens.
    Returns:
        [T] fp32, 0 where masked.
    Raises:
        UserError: the step has no loss token or no sequence, or the aggregation is unknown.
    """
    if num_loss_tokens < 1 or num_sequences < 1 or max_length < 1:
        raise UserError(
            "token_weights: expected a step with at least one loss token, one sequence and max_length "
            ">= 1, got "
            f"{num_loss_tokens}, {num_sequences}, {max_length}; check the data's loss masks"
        )
    if aggregation == "token_mean":
        per_token = torch.full(loss_mask.shape, 1.0 / num_loss_tokens, device=loss_mask.device)
    elif aggregation == "constant_length":
        per_token = torch.full(loss_mask.shape, 1.0 / (num_sequences * max_length), device=loss_mask.device)
    elif aggregation == "sequence_mean":
        lengths = cu_seqlens.diff().long()
        owner = torch.repeat_interleave(lengths, output_size=loss_mask.numel())
        counts = torch.zeros_like(lengths).index_add(0, owner, loss_mask.long())
        per_token = (1.0 / (num_sequences * counts.clamp(min=1).double()))[owner].float()
    else:
        raise UserError(
            f"aggregation: expected token_mean, sequence_mean or constant_length, got {aggregation!r}"
        )
    return torch.where(loss_mask, per_token, 0.0)
