"""Fine-tuning that is paid for keeping its entropy."""

from __future__ import annotations

from megatron_sftrl.losses.api import LossConfig, LossInputs, LossOutput
from megatron_sftrl.losses.registry import register_loss


class EntropyConfig(LossConfig):
    """Options of `entropy`."""

    coef: float = 0.1
    """c, nats of loss per nat of entropy; positive keeps the policy diverse."""


@register_loss("entropy", config=EntropyConfig, token_local=True)
def entropy(inputs: LossInputs, config: EntropyConfig) -> LossOutput:
    """L_t = -log pi(y_t) - c H(pi_t)."""
    policy = inputs.policy
    return LossOutput(token_loss=-policy.logprobs(inputs.batch.labels) - config.coef * policy.entropy())
