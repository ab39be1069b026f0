"""From last hidden states to the loss: through a micro-batch's logits, or fused with the output layer.

    logits      [T, V/tp] exist as Megatron makes them, for as long as the backward needs them
    two passes  the loss sees distributions whose logits are made for a chunk of tokens at a time, in the
                forward and again in the backward; in between only [T] vectors live
    one pass    token-local losses: chunk by chunk, each finished while its logits are hot

All three call the same loss function and give the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sftrl.engine.model import LanguageModel
from megatron_sftrl.engine.parallel import ParallelContext
from megatron_sftrl.losses.api import LossInputs
from megatron_sftrl.losses.registry import Loss
from megatron_sftrl.models.architecture import padded_vocab_size
from megatron_sftrl.types import TokenBatch
from megatron_sftrl.vocab_parallel import OutputLayer, TokenDistribution
from megatron_sftrl.vocab_parallel.one_pass import TokenValues, one_pass, weighted_sum
from megatron_sftrl.vocab_parallel.output_layer import tokens_per_chunk

Fused = Literal["auto", "on", "off"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputHead:
    """A model's last stage and the hidden states it gave for a micro-batch.

    Args:
        model: with the output layer.
        hidden_states: [T, 1, H] after the final norm; [T/tp, 1, H] under sequence parallelism.
    """

    model: LanguageModel
    hidden_states: Tensor

    def layer(self) -> OutputLayer:
        """The output layer, no logits made."""
        return self.model.output(self.hidden_states)

    def logits(self) -> Tensor:
        """[T, V_padded/tp]"""
        return self.model.logits(self.hidden_states)


class Objective:
    """How distributions and losses come from hidden states on this rank.

    Args:
        vocab_size: V, without padding.
        parallel: this rank's place.
        fused: `auto` fuses where the logits of a step's longest micro-batch are more than one chunk of them.
        dtype: of the logits.
    """

    def __init__(
        self, *, vocab_size: int, parallel: ParallelContext, fused: Fused, dtype: torch.dtype
    ) -> None:
        self._vocab_size = vocab_size
        self._parallel = parallel
        self._fused = fused
        self._dtype = dtype

    def longest(self, batches: Sequence[TokenBatch], *, over_all_ranks: bool = False) -> int:
        """Tokens of the longest micro-batch, which decides for all of a step whether they are fused.

        A step must not mix: the fused layer adds the weight's gradient to main_grad by itself and marks the
        weight for Megatron's DDP, which would then leave out the gradient of one that is not fused.

        Args:
            batches: whole micro-batches of this rank.
            over_all_ranks: of the step; every rank calls it then.
        """
        longest = max(batch.num_tokens for batch in batches)
        if self._fused != "auto" or not over_all_ranks or self._parallel.dp_size == 1:
            return longest
        found = torch.tensor(longest, device=self._parallel.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self._parallel.dp_group)
        return int(found)

    def distribution(self, head: OutputHead, *, longest: int) -> TokenDistribution:
        """What the head says of the next tokens.

        Args:
            head: after this rank's context-parallel share of the micro-batch.
            longest: as found by longest().
        """
        if not self._is_fused(longest):
            return self._of_logits(head.logits())
        layer = head.layer()
        return TokenDistribution.from_output_layer(
            layer,
            vocab_size=self._vocab_size,
            group=self._tp_group,
            padded_vocab_size=layer.shape[1] * self._parallel.tp_size,
        )

    def values(
        self,
        loss: Loss,
        policy: OutputHead,
        reference: OutputHead | None,
        batch: TokenBatch,
        *,
        longest: int,
    ) -> TokenValues:
        """The loss of a micro-batch, ready for its backward.

        Args:
            loss: the objective.
            policy: what is trained.
            reference: the second model, without gradient.
            batch: this rank's context-parallel share of the micro-batch.
            longest: as found by longest().
        """
        if loss.is_token_local and self._is_fused(longest):

            def of_tokens(
                policy: TokenDistribution, reference: TokenDistribution | None, batch: TokenBatch
            ) -> tuple[Tensor, dict[str, Tensor]]:
                inputs = LossInputs(policy=policy, reference=reference, batch=batch, is_part=True)
                return _loss_and_metrics(loss, inputs)

            prior = None if reference is None else reference.layer()
            to_distribution = partial(self._of_logits, is_scratch=True)
            return one_pass(of_tokens, policy.layer(), prior, batch, to_distribution)
        inputs = LossInputs(
            policy=self.distribution(policy, longest=longest),
            reference=None if reference is None else self.distribution(reference, longest=longest),
            batch=batch,
            cp_group=self._parallel.cp_group if self._parallel.cp_size > 1 else None,
        )
        token_loss, metrics = _loss_and_metrics(loss, inputs)
        total = weighted_sum(token_loss, batch.token_weight)
        return TokenValues(
            total=total,
            token_loss=token_loss.detach(),
            metrics=metrics,
            is_trained=total.requires_grad or not torch.is_grad_enabled(),
        )

    @property
    def _tp_group(self):
        return self._parallel.tp_group if self._parallel.tp_size > 1 else None

    def _is_fused(self, longest: int) -> bool:
        """Told from sizes alone, so that all micro-batches of a step and all ranks take the same way."""
        if self._fused != "auto":
            return self._fused == "on"
        parallel = self._parallel
        num_columns = padded_vocab_size(self._vocab_size, parallel.tp_size) // parallel.tp_size
        share = -(-longest // parallel.cp_size)
        return share > tokens_per_chunk(num_columns, self._dtype, parallel.device)

    def _of_logits(self, logits: Tensor, *, is_scratch: bool = False) -> TokenDistribution:
        return TokenDistribution.from_logits(
            logits,
            vocab_size=self._vocab_size,
            group=self._tp_group,
            padded_vocab_size=logits.shape[-1] * self._parallel.tp_size,
            is_scratch=is_scratch,
        )


def _loss_and_metrics(loss: Loss, inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
    """What the loss says, and the two metrics that every loss has.

    entropy and nll are the policy's at temperature 1, in nats, unless the loss gives its own (at another
    temperature, say).
    """
    output = loss(inputs)
    metrics = dict(output.metrics)
    # Both came along with the loss's own questions: no collective of their own.
    if "entropy" not in metrics:
        metrics["entropy"] = inputs.policy.entropy().detach()
    if "nll" not in metrics:
        metrics["nll"] = -inputs.policy.logprobs(inputs.batch.labels).detach()
    return output.token_loss, metrics
