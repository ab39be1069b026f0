"""Micro-batches of two losses in one step: the gradient is the weighted sum of what each gives alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_sftrl.config.schema import ParallelSection
from tests.distributed.test_layouts import make_config, step_batches
from tests.ranks import run_ranks

MU = 0.3
# Not token-local and token-local: fused, one goes through its chunks twice and the other once.
LOSSES = (("pear", {"variant": "block"}), ("chord_phi", {}))


def errors(parallel: dict, fused: str) -> dict[str, float]:
    """Largest differences from the two parts done apart, over the gradient's largest number, on this rank."""
    from megatron.core import parallel_state

    from megatron_sftrl.engine.parallel import initialize_parallel
    from megatron_sftrl.engine.policy import Part, PolicyEngine
    from megatron_sftrl.losses.registry import build_loss
    from megatron_sftrl.models.architecture import from_section
    from megatron_sftrl.trainers.grpo import of_one_length, weighted

    config = make_config(parallel, fused=fused)
    assert config.model.architecture is not None
    context = initialize_parallel(ParallelSection.model_validate(parallel))
    policy = PolicyEngine(from_section(config.model.architecture), config, context)
    losses = [build_loss(name, options) for name, options in LOSSES]
    steps = [
        step_batches(
            step,
            num_groups=context.dp_size,
            group=context.dp_rank,
            multiple=2 * context.cp_size,
            num_microbatches=count,
        )
        for step, count in ((0, 2), (1, 4))
    ]

    def gradients() -> Tensor:
        parameters = [each for chunk in policy.chunks for each in chunk.parameters()]
        return torch.cat([each.main_grad.flatten() for each in parameters])  # type: ignore[attr-defined]

    alone = []
    for batches, loss in zip(steps, losses, strict=True):
        report = policy.forward_backward(batches, loss)
        alone.append((report, gradients()))
    shares = (1 - MU, MU)
    parts = [
        Part(batches=weighted(batches, share), loss=loss)
        for batches, share, loss in zip(steps, shares, losses, strict=True)
    ]
    lengths = {part.batches[0].num_tokens for part in parts}
    assert len(lengths) == 2, "both parts have one length: the test is blind"
    reports = policy.forward_backward_parts(of_one_length(parts))
    expected = sum(share * gradient for share, (_, gradient) in zip(shares, alone, strict=True))
    assert isinstance(expected, Tensor)
    found = {"gradient": ((gradients() - expected).abs().max() / expected.abs().max()).item()}
    for name, share, report, (truth, _) in zip("ab", shares, reports, alone, strict=True):
        found[f"loss {name}"] = abs(report.loss - share * truth.loss)
        assert report.metrics.keys() == truth.metrics.keys()
        for metric, value in truth.metrics.items():
            found[f"{metric} {name}"] = abs(report.metrics[metric] - value)
    parallel_state.destroy_model_parallel()
    return found


@pytest.mark.parametrize(
    ("world_size", "parallel", "fused"),
    [
        (1, {}, "off"),
        (1, {}, "on"),
        (2, {"tp": 2, "sequence_parallel": True}, "on"),
        (2, {"pp": 2, "vp": 2}, "off"),
        (2, {"cp": 2}, "on"),
        (2, {}, "off"),
    ],
    ids=str,
)
def test_two_losses_in_one_step_give_the_weighted_sum_of_their_gradients(
    world_size: int, parallel: dict, fused: str
) -> None:
    for found in run_ranks(world_size, errors, parallel, fused):
        assert {name: error for name, error in found.items() if not error < 2e-6} == {}
