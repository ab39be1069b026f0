"""What a loss is given, what it returns, and how its options are declared."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch.distributed as dist
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from megatron_sftrl.config.schema import GateSection
from megatron_sftrl.errors import UserError
from megatron_sftrl.losses.sequences import Sequences, sequences_of
from megatron_sftrl.types import TokenBatch
from megatron_sftrl.vocab_parallel import TokenDistribution


class LossConfig(BaseModel):
    """Options of a loss: frozen, strict about unknown names; the text below a field documents it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    def extra_needs(self) -> tuple[str, ...]:
        """What these options need beyond the loss's own needs (a base loss's, say)."""
        return ()

    def default_gates(self) -> tuple[GateSection, ...]:
        """Limits on the loss's metrics beyond which something is wrong; a run's own gates replace them."""
        return ()


OWN_NUMBERS = frozenset(
    (
        "step", "loss", "grad_norm", "lr", "tokens", "loss_tokens", "tokens_per_second", "padding_share",
        "epoch", "updates", "skipped_steps", "peak_memory_bytes",
    )
)  # fmt: skip
OWN_FAMILIES = (
    "seconds", "checkpoint", "ranks", "valid", "reward", "rollout", "mismatch", "memory", "reshard", "moe",
)  # fmt: skip


def is_own_number(name: str) -> bool:
    """A step measures it itself: a metric of this name would stand in its place in metrics.jsonl."""
    return name in OWN_NUMBERS or name.partition("/")[0] in OWN_FAMILIES


@dataclass(frozen=True, kw_only=True, eq=False)
class LossInputs:
    """One micro-batch as a loss sees it.

    Args:
        policy: the distribution that is trained, T tokens.
        batch: the tokens it was computed from.
        reference: a second distribution without gradient (GIFT's base model, CurioSFT's teacher).
        cp_group: context-parallel group over which sequences are spread; None when they are whole.
            Sequences derived from it are computed on first use: that costs a gather.
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
