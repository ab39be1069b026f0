"""The policy's own start, hotter, as the teacher of its own responses: entropy back before further RL."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_sftrl.losses.api import LossInputs, LossOptions, LossOutput
from megatron_sftrl.losses.registry import register_loss


class TsOpsdOptions(LossOptions):
    """Options of `ts_opsd`."""

    tau: float = Field(gt=1)
    """Temperature of the teacher. No published default is known: choose it by `ts_opsd/teacher_entropy` in
    the first step, the entropy that the policy is on its way to."""
    direction: Literal["reverse", "forward"] = "reverse"
    """reverse: KL(policy || teacher), as distillation on own samples usually has it. forward:
    KL(teacher || policy). Which one the paper has is not known here; both have the same minimum."""


@register_loss("ts_opsd", config=TsOpsdOptions, needs=("reference",), token_local=True, on_policy=True)
def ts_opsd(inputs: LossInputs, config: TsOpsdOptions) -> LossOutput:
    """L_t = KL(pi_t || softmax(u_t / tau)) over the whole vocabulary, on responses that pi has sampled.

    (arXiv:2606.00755, by its abstract: the start's own logits u at a high temperature are distilled back on
    the policy's own samples.) u is the model that training starts from (`kind: frozen`); the policy is taken
    at temperature 1, whatever rollout.temperature it samples at. Rewards are measured and teach nothing.
    """
    assert inputs.reference is not None
    teacher = inputs.reference.detach().tempered(config.tau)
    policy = inputs.policy
    divergence = policy.kl_to(teacher) if config.direction == "reverse" else policy.kl_from(teacher)
    return LossOutput(
        token_loss=divergence,
        metrics={"ts_opsd/kl": divergence.detach(), "ts_opsd/teacher_entropy": teacher.entropy().detach()},
    )
