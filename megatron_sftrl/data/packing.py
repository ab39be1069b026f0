"""Examples to one TokenBatch: the only place where masks move from tokens to predicting positions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from megatron_sftrl.data.example import Example
from megatron_sftrl.errors import UserError
from megatron_sftrl.losses.api import Aggregation, token_weights
from megatron_sftrl.types import TokenBatch

Carried = Literal["behavior_logprobs", "old_logprobs", "rollout_logprobs", "advantages"]
"""Fields of an Example that stand under the same name in a TokenBatch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepNormalization:
    """What the weights of one optimizer step are made of; equal for all its batches on all ranks.

    Args:
        aggregation: which mean.
        num_loss_tokens: learned tokens of the step.
        num_sequences: sequences of the step.
        max_length: divisor of constant_length, in tokens.
    """

    aggregation: Aggregation
    num_loss_tokens: int
    num_sequences: int
    max_length: int


def predicting_length(num_tokens: int, sequence_multiple_of: int) -> int:
    """Positions a sequence occupies in a batch.

    The last token has no label, so n tokens give n - 1 positions; context parallelism cuts each sequence
    into 2 cp equal pieces, so they are padded to a multiple.

    Args:
        num_tokens: n, at least 2.
        sequence_multiple_of: 1, or 2 * cp.
    Returns:
        n - 1, rounded up.
    """
    return _round_up(num_tokens - 1, sequence_multiple_of)


def padded_batch_length(num_tokens: int, *, sequence_multiple_of: int, pad_to_multiple_of: int) -> int:
    """T of a batch whose sequences take `num_tokens` positions; at least one padding sequence when 0.

    Args:
        num_tokens: sum of `predicting_length`.
        sequence_multiple_of: as there; the padding behind is a sequence of its own and respects it too.
        pad_to_multiple_of: what T must divide by (tp under sequence parallelism).
    Returns:
        T.
    """
    return _round_up(max(num_tokens, 1), math.lcm(sequence_multiple_of, pad_to_multiple_of))


def build_token_batch(
    examples: Sequence[Example],
    *,
    normalization: StepNormalization,
    pad_id: int,
    sequence_multiple_of: int = 1,
    pad_to_multiple_of: int = 1,
    pad_to_length: int | None = None,
    carried: Sequence[Carried] = (),
) -> TokenBatch:
    """Lay sequences one behind the other, aligned on the predicting position: labels[t] = tokens[t + 1].

    Each sequence is padded inside its own cu_seqlens span. What is missing to the batch's length is one
    more sequence of padding. Padding has weight 0, positions that go on counting, and finite values.

    Args:
        examples: in order; none gives a batch of padding alone.
        normalization: of the whole step, which token_weight is filled from.
        pad_id: any valid id.
        sequence_multiple_of: length that each sequence is padded to a multiple of.
        pad_to_multiple_of: what T must divide by.
        pad_to_length: T, when all micro-batches of a step have to be equal.
        carried: values of learned tokens that the batch carries, too; 0 where masked.
    Returns:
        The batch, on the CPU.
    Raises:
        UserError: the examples do not fit into pad_to_length, or an example lacks a carried value.
    """
    lengths = [predicting_length(len(example.tokens), sequence_multiple_of) for example in examples]
    total = padded_batch_length(
        sum(lengths), sequence_multiple_of=sequence_multiple_of, pad_to_multiple_of=pad_to_multiple_of
    )
    if pad_to_length is not None:
        if pad_to_length < total or pad_to_length % math.lcm(sequence_multiple_of, pad_to_multiple_of):
            raise UserError(
                f"pad_to_length: expected at least {total} and a multiple of "
                f"{math.lcm(sequence_multiple_of, pad_to_multiple_of)}, got {pad_to_length}"
            )
        total = pad_to_length
    spans = [*lengths, total - sum(lengths)] if total > sum(lengths) else lengths
    tokens = np.full(total, pad_id, np.int64)
    labels = np.full(total, pad_id, np.int64)
    mask = np.zeros(total, np.bool_)
    is_padding = np.ones(total, np.bool_)
    values = {name: np.zeros(total, np.float32) for name in carried}
    start = 0
    for example, length in zip(examples, lengths, strict=True):
        real = slice(start, start + len(example.tokens) - 1)
        tokens[real] = example.tokens[:-1]
        labels[real] = example.tokens[1:]
        mask[real] = example.loss_mask[1:]
        is_padding[real] = False
        for name, target in values.items():
            found = getattr(example, name)
            if found is None:
                raise UserError(f"{example.source}: the row has no {name}")
            target[real][example.loss_mask[1:]] = found
        start += length
    loss_mask, cu_seqlens = torch.from_numpy(mask), _cumulative(spans)
    return TokenBatch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        positions=torch.cat([torch.arange(length) for length in spans]),
        loss_mask=loss_mask,
        cu_seqlens=cu_seqlens,
        token_weight=token_weights(
            loss_mask,
            cu_seqlens,
            normalization.aggregation,
            num_loss_tokens=normalization.num_loss_tokens,
            num_sequences=normalization.num_sequences,
            max_length=normalization.max_length,
        ),
        is_padding=torch.from_numpy(is_padding),
        **{name: torch.from_numpy(array) for name, array in values.items()},
    )


def _cumulative(lengths: Sequence[int]) -> Tensor:
    """[S + 1] int32, first 0."""
    return torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
