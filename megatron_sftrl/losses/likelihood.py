"""Losses on the likelihood of the demonstration alone.

Supervised fine-tuning (sft), dynamic fine-tuning (dft: the likelihood gradient without its 1 / pi), a bonus
for entropy, and labels mixed with the uniform distribution.
"""

from __future__ import annotations

from pydantic import Field

from megatron_sftrl.losses.api import LossInputs, LossOptions, LossOutput
from megatron_sftrl.losses.registry import register_loss
from megatron_sftrl.vocab_parallel import SmoothedLabels


@register_loss("sft", token_local=True)
def sft(inputs: LossInputs, config: LossOptions) -> LossOutput:
    """L_t = -log pi(y_t)."""
    return LossOutput(token_loss=-inputs.policy.logprobs(inputs.batch.labels))


@register_loss("dft", token_local=True)
def dft(inputs: LossInputs, config: LossOptions) -> LossOutput:
    """L_t = -sg(pi(y_t)) log pi(y_t)   (arXiv:2508.05629)."""
    logprobs = inputs.policy.logprobs(inputs.batch.labels)
    probs = logprobs.detach().exp()
    return LossOutput(token_loss=-probs * logprobs, metrics={"dft/label_prob": probs})


class EntropyOptions(LossOptions):
    """Options of `entropy`."""

    coef: float = 0.1
    """c, nats of loss per nat of entropy; positive keeps the policy diverse."""


@register_loss("entropy", config=EntropyOptions, token_local=True)
def entropy(inputs: LossInputs, config: EntropyOptions) -> LossOutput:
    """L_t = -log pi(y_t) - c H(pi_t)."""
    policy = inputs.policy
    return LossOutput(token_loss=-policy.logprobs(inputs.batch.labels) - config.coef * policy.entropy())


class LabelSmoothingOptions(LossOptions):
    """Options of `label_smoothing`."""

    smoothing: float = Field(default=0.1, ge=0, le=1)
    """s, share of the uniform distribution in the target."""


@register_loss("label_smoothing", config=LabelSmoothingOptions, token_local=True)
def label_smoothing(inputs: LossInputs, config: LabelSmoothingOptions) -> LossOutput:
    """L_t = -(1 - s) log pi(y_t) - s mean_v log pi(v)   (arXiv:1512.00567; V counts no padding)."""
    target = SmoothedLabels(labels=inputs.batch.labels, smoothing=config.smoothing)
    return LossOutput(token_loss=inputs.policy.cross_entropy(target))
