"""GIFT: fine-tuning towards the base model's own distribution, tilted to the demonstration."""

from __future__ import annotations

from pydantic import Field

from megatron_sftrl.losses.api import LossInputs, LossOptions, LossOutput
from megatron_sftrl.losses.registry import register_loss


class GiftOptions(LossOptions):
    """Options of `gift`."""

    beta: float = Field(default=20.0, ge=0)
    """Log-odds added to the label under the reference; 0 is distillation, infinity is SFT."""
    smoothing: float = Field(default=0.0, ge=0, le=1)
    """lambda, share of the uniform distribution in the prior."""
    eps: float = Field(default=1e-10, ge=0)
    """Added to every prior probability: 1e-10 in the release, 0 in the paper. With it a label that the
    reference gives probability 0 still gets the weight eps (e^beta - 1) = 0.046."""


@register_loss("gift", config=GiftOptions, needs=("reference",), token_local=True)
def gift(inputs: LossInputs, config: GiftOptions) -> LossOutput:
    """L_t = -sum_v target(v) log pi(v), target = softmax(log p~ + beta 1[v = y_t]), p~ = (1 - lambda) q +
    lambda / V + eps.

    (arXiv:2601.09233, Alg. 1; q is the frozen model that training starts from.) Computed in closed form as
    the mixture w NLL + (1 - w) CE(p~ / sum p~, pi), w = g p~(y) / (sum p~ + g p~(y)), g = e^beta - 1, which
    equals the released trainer's six steps without a target tensor. `gift/label_weight` is w.
    """
    assert inputs.reference is not None
    target = inputs.reference.tilted(inputs.batch.labels, config.beta, config.smoothing, config.eps)
    token_loss = inputs.policy.cross_entropy(target)
    return LossOutput(token_loss=token_loss, metrics={"gift/label_weight": target.label_weight()})
