"""A loss that takes its own mean: as one number, or as that number at every token."""

from __future__ import annotations

from typing import Literal

from megatron_sftrl import LossInputs, LossOptions, LossOutput, register_loss


class ReducesOptions(LossOptions):
    """Options of `reduces`."""

    shape: Literal["scalar", "expanded"] = "scalar"
    """What it returns."""


@register_loss("reduces", config=ReducesOptions)
def reduces(inputs: LossInputs, config: ReducesOptions) -> LossOutput:
    """-mean over loss tokens of log pi(y)."""
    mean = -inputs.policy.logprobs(inputs.batch.labels)[inputs.batch.loss_mask].mean()
    return LossOutput(token_loss=mean if config.shape == "scalar" else mean.expand(inputs.batch.num_tokens))
