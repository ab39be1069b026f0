"""What a loss is examined on: one step of packed sequences with logits, drawn from a seed.

Everything is float32, so that an evaluation in float32 and one in float64 start from the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from megatron_sftrl.losses.api import token_weights
from megatron_sftrl.types import TokenBatch

VOCAB_SIZE = 1031
"""Prime, so that no number of ranks divides it, and above CurioSFT's top 512 on each of two ranks."""
LENGTHS = (8, 4, 16, 4, 12, 8)
"""Multiples of 4: context parallelism of size 2 halves each sequence twice."""
HUGE = 1e4
"""A logit beyond which exp(z), and any sum of squares in float16, is long infinite."""

Kind = Literal["plain", "extreme", "no_loss"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Case:
    """One step.

    Args:
        batch: all its sequences; only what the loss declares to need is filled.
        policy: [T, V] float32 logits, without padding.
        reference: [T, V] float32 logits, or None.
    """

    batch: TokenBatch
    policy: Tensor
    reference: Tensor | None

    def rounded(self, dtype: torch.dtype) -> Case:
        """The same step with logits that `dtype` can hold, still float32."""
        reference = None if self.reference is None else self.reference.to(dtype).float()
        return replace(self, policy=self.policy.to(dtype).float(), reference=reference)

    def rows_of(self, sequences: Sequence[int]) -> Tensor:
        """[t] int64, the tokens of some sequences, in the order of the sequences given."""
        starts = self.batch.cu_seqlens.tolist()
        return torch.cat([torch.arange(starts[s], starts[s + 1]) for s in sequences])

    def packed(self, sequences: Sequence[int]) -> TokenBatch:
        """Some of the sequences, packed in this order; weights stay those of the whole step."""
        rows = self.rows_of(sequences)
        lengths = self.batch.cu_seqlens.diff()[list(sequences)]
        cu_seqlens = torch.cat([lengths.new_zeros(1), lengths]).cumsum(0).to(torch.int32)
        return self.batch.map(lambda value: value[rows], cu_seqlens=cu_seqlens)


def draw_case(
    seed: int, needs: Sequence[str], *, lengths: Sequence[int] = LENGTHS, kind: Kind = "plain"
) -> Case:
    """A step whose labels are sometimes likely and sometimes not.

    Args:
        seed: of everything that is drawn.
        needs: what the loss declares; nothing else is given to it.
        lengths: tokens of each sequence.
        kind: `extreme` has rows near +-1e4, and labels that are all but certain or all but impossible;
            `no_loss` masks every token.
    """
    draw = torch.Generator().manual_seed(seed)
    num_tokens = sum(lengths)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    labels = torch.randint(VOCAB_SIZE, (num_tokens,), generator=draw)
    policy = 2 * noise(num_tokens, VOCAB_SIZE)
    policy[torch.arange(num_tokens), labels] += 4 + 3 * noise(num_tokens)
    reference = policy + noise(num_tokens, VOCAB_SIZE)
    if kind == "extreme":
        _make_extreme(policy, labels)
        _make_extreme(reference, labels)
    logprobs = policy.double().log_softmax(1).gather(1, labels[:, None]).squeeze(1)
    # Near and far from the policy, on both sides: clips and masks of the loss act on some tokens.
    old = (logprobs + 0.15 * noise(num_tokens)).float()
    fields = {
        "behavior_logprobs": (logprobs - 0.1 + 0.4 * noise(num_tokens)).float(),
        "old_logprobs": old,
        "rollout_logprobs": old + 0.3 * noise(num_tokens),
        "advantages": noise(num_tokens),
    }
    batch = TokenBatch(
        tokens=torch.randint(VOCAB_SIZE, (num_tokens,), generator=draw),
        labels=labels,
        positions=torch.cat([torch.arange(length) for length in lengths]),
        loss_mask=torch.zeros(num_tokens, dtype=torch.bool),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        token_weight=torch.zeros(num_tokens),
        **{name: value for name, value in fields.items() if name in needs},
    )
    if kind != "no_loss":
        batch = _with_loss(batch, torch.rand(num_tokens, generator=draw) < 0.8)
    return Case(batch=batch, policy=policy, reference=reference if "reference" in needs else None)


def _with_loss(batch: TokenBatch, drawn: Tensor) -> TokenBatch:
    """Loss on the drawn tokens behind each sequence's first half or third, none on the fourth sequence."""
    lengths = batch.cu_seqlens.diff().tolist()
    prompts = torch.cat([torch.arange(length) < length // 3 for length in lengths])
    mask = drawn & ~prompts
    starts = batch.cu_seqlens.tolist()
    for sequence in range(batch.num_sequences):
        mask[starts[sequence + 1] - 1] = sequence != 3  # the end token: no sequence but the fourth is empty
    if batch.num_sequences > 3:
        mask[starts[3] : starts[4]] = False
    weight = token_weights(
        mask,
        batch.cu_seqlens,
        "sequence_mean",
        num_loss_tokens=int(mask.sum()),
        num_sequences=sum(bool(part.any()) for part in mask.split(lengths)),
        max_length=max(lengths),
    )
    return replace(batch, loss_mask=mask, token_weight=weight)


def _make_extreme(logits: Tensor, labels: Tensor) -> None:
    """Rows in turn: as they are, near +1e4, near -1e4, a certain label, an impossible label."""
    kinds = torch.arange(labels.numel()) % 5
    tokens = torch.arange(labels.numel())
    logits[kinds == 1] += HUGE
    logits[kinds == 2] -= HUGE
    certain, impossible = tokens[kinds == 3], tokens[kinds == 4]
    logits[certain, labels[certain]] = HUGE
    logits[impossible, labels[impossible]] = -HUGE
