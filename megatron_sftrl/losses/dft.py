"""Dynamic fine-tuning: the likelihood gradient without its 1 / pi."""

from __future__ import annotations

from megatron_sftrl.losses.api import LossConfig, LossInputs, LossOutput
from megatron_sftrl.losses.registry import register_loss


@register_loss("dft", token_local=True)
def dft(inputs: LossInputs, config: LossConfig) -> LossOutput:
    """L_t = -sg(pi(y_t)) log pi(y_t)   (arXiv:2508.05629)."""
    logprobs = inputs.policy.logprobs(inputs.batch.labels)
    probs = logprobs.detach().exp()
    return LossOutput(token_loss=-probs * logprobs, metrics={"dft/label_prob": probs})
