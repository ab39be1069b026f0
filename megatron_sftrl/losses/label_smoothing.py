"""Cross-entropy against labels mixed with the uniform distribution."""

from __future__ import annotations

from pydantic import Field

from megatron_sftrl.losses.api import LossConfig, LossInputs, LossOutput
from megatron_sftrl.losses.registry import register_loss
from megatron_sftrl.vocab_parallel import SmoothedLabels


class LabelSmoothingConfig(LossConfig):
    """Options of `label_smoothing`."""

    smoothing: float = Field(default=0.1, ge=0, le=1)
    """s, share of the uniform distribution in the target."""


@register_loss("label_smoothing", config=LabelSmoothingConfig, token_local=True)
def label_smoothing(inputs: LossInputs, config: LabelSmoothingConfig) -> LossOutput:
    """L_t = -(1 - s) log pi(y_t) - s mean_v log pi(v)   (arXiv:1512.00567; V counts no padding)."""
    target = SmoothedLabels(labels=inputs.batch.labels, smoothing=config.smoothing)
    return LossOutput(token_loss=inputs.policy.cross_entropy(target))
