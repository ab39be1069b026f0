"""What a loss is given, what it returns, and how its options are declared."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from megatron_sftrl.config.data import Aggregation
from megatron_sftrl.config.gates import GateSection
from megatron_sftrl.errors import UserError
from megatron_sftrl.losses.sequences import Sequences, sequences_of
from megatron_sftrl.types import TokenBatch
from megatron_sftrl.vocab_parallel import TokenDistribution


class LossOptions(BaseModel):
    """Options of a loss: frozen, strict about unknown names; the text below a field documents it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    def extra_needs(self) -> tuple[str, ...]:
        """What these options need beyond the loss's own needs (a base loss's, say)."""
        return ()

    def default_gates(self) -> tuple[GateSection, ...]:
        """Limits on the loss's metrics beyond which something is wrong; a run's own gates replace them."""
        return ()


LossConfig = LossOptions
"""The name until 0.1, for losses that are written already."""


OWN_NUMBERS = frozenset(
    (
        "step", "loss", "grad_norm", "lr", "tokens", "loss_tokens", "tokens_per_second", "padding_share",
        "epoch", "updates", "skipped_steps", "peak_memory_bytes",
    )
)  # fmt: skip
OWN_FAMILIES = (
    "seconds", "checkpoint", "ranks", "valid", "reward", "rollout", "mismatch", "memory", "reshard", "moe",
    "sft",
)  # fmt: skip


def is_own_number(name: str) -> bool:
    """A step measures it itself: a metric of this name would stand in its place in metrics.jsonl."""
    return name in OWN_NUMBERS or name.partition("/")[0] in OWN_FAMILIES


@dataclass(frozen=True, kw_only=True, eq=False)
class LossInputs:
    """One micro-batch as a loss sees it.

    Args:
        policy: the distribution that is trained, T tokens.
        reference: a second distribution without gradient (GIFT's base model, CurioSFT's teacher).
        cp_group: context-parallel group over which sequences are spread; None when they are whole. Sequences
            derived from it are computed on first use: that costs a gather.
        is_part: some tokens of a micro-batch, whose sequences are torn; for token-local losses.
    Raises:
        UserError: a distribution whose T is not the batch's.
    """

    policy: TokenDistribution
    batch: TokenBatch
    reference: TokenDistribution | None = None
    cp_group: dist.ProcessGroup | None = None
    is_part: bool = False

    def __post_init__(self) -> None:
        for name, distribution in (("policy", self.policy), ("reference", self.reference)):
            if distribution is not None and distribution.num_tokens != self.batch.num_tokens:
                raise UserError(
                    f"LossInputs.{name}: expected T = {self.batch.num_tokens} tokens like the batch, got "
                    f"{distribution.num_tokens}; flatten the logits in the order of batch.tokens"
                )
        self.policy.anticipate(self.batch.labels)

    @cached_property
    def sequences(self) -> Sequences:
        """Sums along each packed sequence, over its loss tokens.

        Raises:
            UserError: a loss that is registered as token-local asks for them.
        """
        if self.is_part:
            raise UserError(
                "a loss registered with token_local=True asked for inputs.sequences, got some tokens only: "
                "register it without token_local"
            )
        return sequences_of(
            cu_seqlens=self.batch.cu_seqlens,
            positions=self.batch.positions,
            loss_mask=self.batch.loss_mask,
            cp_group=self.cp_group,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class LossOutput:
    """What a loss returns.

    Args:
        token_loss: [T] nats, neither masked nor reduced; its gradient is what trains.
        metrics: [T] detached values by name, averaged over loss tokens with the batch's token_weight. A
            quantity that is not a mean over tokens (a minimum, an effective sample size) is given per
            sequence. All micro-batches of a step give the same names, none of them a step's own
            (is_own_number). `entropy` and `nll` replace those that every loss gets, the policy's at
            temperature 1 in nats.
    """

    token_loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


# token_weight, which makes normalisation data: it sums to 1 over one optimizer step and all ranks. The
# aggregations are ways to fill it. All need only counts over the whole step, so that how it is cut into
# micro-batches, data-parallel or context-parallel parts changes nothing.


def token_weights(
    loss_mask: Tensor,
    cu_seqlens: Tensor,
    aggregation: Aggregation,
    *,
    num_loss_tokens: int,
    num_sequences: int,
    max_length: int,
) -> Tensor:
    """The weight of each token in the step's loss, [T] fp32, 0 where masked.

        token_mean        1 / loss tokens of the step
        sequence_mean     1 / (sequences of the step * loss tokens of this sequence)
        constant_length   1 / (sequences of the step * max_length)       (Dr. GRPO, arXiv:2503.20783)

    The first two sum to 1 over the step; constant_length sums to the filled share of it.

    Args:
        loss_mask: [T] bool, of whole sequences: weights are filled before context parallelism cuts them.
        cu_seqlens: [S + 1] int32.
        num_loss_tokens, num_sequences: of the whole step; only sequences that have loss tokens count.
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
