"""A loss that writes into what it was given: the batch's advantages, or the logits."""

from __future__ import annotations

from typing import Literal

from megatron_sftrl import LossInputs, LossOptions, LossOutput, register_loss
from tests.unit.doctor.planted.shard import columns_of


class InPlaceOptions(LossOptions):
    """Options of `in_place`."""

    target: Literal["advantages", "logits"] = "advantages"
    """What it writes into."""


@register_loss("in_place", config=InPlaceOptions, needs=("advantages",))
def in_place(inputs: LossInputs, config: InPlaceOptions) -> LossOutput:
    """-A log pi(y), A scaled to be at most 1."""
    advantages = inputs.batch.advantages
    assert advantages is not None
    if config.target == "logits":
        columns_of(inputs.policy)[0].mul_(0.5)
    else:
        advantages.clamp_(max=1.0)
    return LossOutput(token_loss=-advantages * inputs.policy.logprobs(inputs.batch.labels))
