"""Old log-probabilities from the update's own forward are those that a forward ahead of it finds."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from torch import Tensor

from megatron_sftrl.config.schema import ParallelSection
from megatron_sftrl.losses.api import LossInputs, LossOptions, LossOutput
from megatron_sftrl.losses.registry import Loss, build_loss
from megatron_sftrl.types import TokenBatch
from tests.distributed.test_layouts import make_config, step_batches
from tests.grid import cases
from tests.ranks import run_ranks


def users_loss(inputs: LossInputs, config: LossOptions) -> LossOutput:
    """Reads the field that it declares, and asks the policy at no other temperature than 1."""
    batch = inputs.batch
    assert batch.old_logprobs is not None
    assert batch.advantages is not None
    assert not batch.old_logprobs.requires_grad
    logprobs = inputs.policy.logprobs(batch.labels)
    moved = (logprobs - batch.old_logprobs).clamp(-2, 2)
    return LossOutput(token_loss=-moved.exp() * batch.advantages, metrics={"mine/moved": moved.detach()})


def losses(temperature: float) -> dict[str, Loss]:
    grpo = partial(build_loss, "grpo")
    mine = Loss(name="mine", config=LossOptions(), needs=("old_logprobs", "advantages"), function=users_loss)
    return {
        "tis": grpo({"correction": "tis", "correction_cap": 1.05, "temperature": temperature}),
        "gspo": grpo({"ratio": "sequence", "clip_low": 3e-4, "temperature": temperature}),
        "cispo": grpo({"objective": "cispo", "temperature": temperature}),
        "of a user": mine,
        "of a user, token-local": dataclasses.replace(mine, is_token_local=True),
    }


def response_batches(multiple: int, num_groups: int, group: int) -> list[TokenBatch]:
    """Two micro-batches of responses with nonsense for old log-probabilities."""
    batches = step_batches(0, num_groups=num_groups, group=group, multiple=multiple, num_microbatches=2)
    return [
        dataclasses.replace(
            batch,
            advantages=(batch.tokens % 5 - 2).float() * batch.loss_mask,
            rollout_logprobs=-4.6 - 0.1 * (batch.labels % 3).float(),
            old_logprobs=torch.full(batch.tokens.shape, 7.0),
        )
        for batch in batches
    ]


def differences(parallel: dict, fused: str, temperature: float) -> dict[str, float]:
    """From a forward ahead of the update, on this rank, of every loss."""
    from megatron.core import parallel_state

    from megatron_sftrl.engine.parallel import initialize_parallel
    from megatron_sftrl.engine.policy import Part, PolicyEngine
    from megatron_sftrl.models.architecture import from_section
    from megatron_sftrl.trainers.experience import ask_logprobs_and_entropies

    config = make_config(parallel, fused=fused)
    assert config.model.architecture is not None
    context = initialize_parallel(ParallelSection.model_validate(parallel))
    policy = PolicyEngine(from_section(config.model.architecture), config, context)
    batches = response_batches(2 * context.cp_size, context.dp_size, context.dp_rank)
    ask = partial(ask_logprobs_and_entropies, temperature=temperature)
    with policy.evaluation():
        ahead = policy.token_numbers(batches, ask)
    known = batches
    if ahead:
        known = [
            dataclasses.replace(batch, old_logprobs=torch.where(batch.loss_mask, numbers[0], 0.0))
            for batch, numbers in zip(batches, ahead, strict=True)
        ]

    def gradient() -> Tensor:
        parameters = [each for chunk in policy.chunks for each in chunk.parameters()]
        return torch.cat([each.main_grad.flatten() for each in parameters])  # type: ignore[attr-defined]

    found = {}
    for name, loss in losses(temperature).items():
        (truth,) = policy.forward_backward_parts([Part(batches=known, loss=loss)])
        expected = gradient()
        (report,) = policy.forward_backward_parts([Part(batches=batches, loss=loss, sampled_at=temperature)])
        assert expected.abs().max() > 1e-3, "nothing is learned: the test is blind"
        found[f"{name}: gradient"] = ((gradient() - expected).abs().max() / expected.abs().max()).item()
        found[f"{name}: loss"] = abs(report.loss - truth.loss)
        assert report.metrics.keys() == truth.metrics.keys()
        for metric, value in truth.metrics.items():
            found[f"{name}: {metric}"] = abs(report.metrics[metric] - value)
        if name != "of a user" and "local" not in name:
            found[f"{name}: a ratio of 1"] = abs(report.metrics["grpo/ratio"] - 1.0)
        assert len(report.seen) == len(ahead), "none before the last stage"
        for number, (seen, numbers, batch) in enumerate(zip(report.seen, ahead, batches, strict=False)):
            apart = (seen - numbers).abs()[:, batch.loss_mask]
            found[f"{name}: seen in {number}"] = apart.max().item() if apart.numel() else 0.0
    parallel_state.destroy_model_parallel()
    return found


LAYOUTS = {
    "one": (1, {}, "off", 0.7),
    "one, fused": (1, {}, "on", 1.0),
    "tp2": (2, {"tp": 2}, "off", 1.0),
    "tp2, fused": (2, {"tp": 2, "sequence_parallel": True}, "on", 0.7),
    "pp2": (2, {"pp": 2}, "on", 0.7),
    "vp2": (2, {"pp": 2, "vp": 2}, "off", 1.0),
    "cp2": (2, {"cp": 2}, "off", 1.0),
    "cp2, fused": (2, {"cp": 2}, "on", 0.7),
    "dp2": (2, {}, "off", 0.7),
}


@pytest.mark.parametrize("layout", cases(LAYOUTS, rarely=("tp2", "pp2", "cp2", "dp2")))
def test_an_update_knows_the_old_logprobs_of_its_own_weights(layout: str) -> None:
    world_size, parallel, fused, temperature = LAYOUTS[layout]
    for found in run_ranks(world_size, differences, parallel, fused, temperature):
        assert {name: error for name, error in found.items() if not error < 2e-6} == {}
