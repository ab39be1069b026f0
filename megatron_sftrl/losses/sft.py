"""Supervised fine-tuning: the negative log-likelihood of the demonstration."""

from __future__ import annotations

from megatron_sftrl.losses.api import LossConfig, LossInputs, LossOutput
from megatron_sftrl.losses.registry import register_loss


@register_loss("sft", token_local=True)
def sft(inputs: LossInputs, config: LossConfig) -> LossOutput:
    """L_t = -log pi(y_t)."""
    return LossOutput(token_loss=-inputs.policy.logprobs(inputs.batch.labels))
