"""Losses that count, weigh or add up by themselves what the step as a whole decides."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist

from megatron_sftrl import LossInputs, LossOptions, LossOutput, register_loss


class CountsOptions(LossOptions):
    """Options of `counts`."""

    defect: Literal["local_count", "weight", "world_size", "own_sequences", "unbiased"] = "local_count"
    """What is wrong with it."""


@register_loss("counts", config=CountsOptions)
def counts(inputs: LossInputs, config: CountsOptions) -> LossOutput:
    """-log pi(y), scaled."""
    batch, nll = inputs.batch, -inputs.policy.logprobs(inputs.batch.labels)
    if config.defect == "local_count":
        return LossOutput(token_loss=nll / batch.loss_mask.sum())
    if config.defect == "weight":
        return LossOutput(token_loss=nll * batch.token_weight)
    if config.defect == "world_size":
        return LossOutput(token_loss=nll * (dist.get_world_size() if dist.is_initialized() else 1))
    if config.defect == "own_sequences":  # whole sequences, or so it believes
        parts = nll.detach().split(batch.cu_seqlens.diff().tolist())
        return LossOutput(token_loss=nll * torch.cat([part.mean().expand(part.numel()) for part in parts]))
    return LossOutput(token_loss=nll / (inputs.sequences.count() - 1))


@register_loss("numbers", config=LossOptions)
def numbers(inputs: LossInputs, config: LossOptions) -> LossOutput:
    """-log(pi(y)) through pi(y) itself, which is 0 for an impossible label."""
    return LossOutput(token_loss=-inputs.policy.logprobs(inputs.batch.labels).exp().log())


@register_loss("cancels", config=LossOptions)
def cancels(inputs: LossInputs, config: LossOptions) -> LossOutput:
    """-log pi(y) with digits that float32 cannot keep."""
    return LossOutput(token_loss=1e4 - (inputs.policy.logprobs(inputs.batch.labels) + 1e4))


@register_loss("undeclared", config=LossOptions)
def undeclared(inputs: LossInputs, config: LossOptions) -> LossOutput:
    """KL to a reference that it did not ask for."""
    assert inputs.reference is not None, "no reference"
    return LossOutput(token_loss=inputs.policy.kl_to(inputs.reference))


@register_loss("neighbours", config=LossOptions, token_local=True)
def neighbours(inputs: LossInputs, config: LossOptions) -> LossOutput:
    """-log pi(y), weighted by how likely the label before was: not token-local, as it claims."""
    logprobs = inputs.policy.logprobs(inputs.batch.labels)
    before = logprobs.detach().roll(1).masked_fill(inputs.batch.positions == 0, 0.0)
    return LossOutput(token_loss=-before.exp() * logprobs)
