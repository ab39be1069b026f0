"""Gradients kept and summed in bf16 are the fp32 ones up to its rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_sftrl.config.schema import RunConfig
from megatron_sftrl.models.architecture import from_section
from tests.distributed.mixture_runs import QWEN3_MOE
from tests.distributed.test_layouts import Curve, make_config, step_batches
from tests.grid import cases
from tests.ranks import run_ranks

NUM_STEPS, NUM_MICROBATCHES = 6, 2
ROUNDING = 2.0**-8
"""bf16's, to nearest, of one operation at most."""


def gradients_and_curve(
    parallel: dict[str, Any], model: dict[str, Any], fused: str
) -> tuple[list[torch.Tensor], set[torch.dtype], Curve]:
    """Every gradient of the first step, of what dtype it is kept, and the run; on every rank."""
    from megatron.core import parallel_state

    from megatron_sftrl.engine.parallel import initialize_parallel
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.losses.registry import build_loss

    tree = make_config(parallel, fused=fused, **model).model_dump(exclude_unset=True)
    tree["model"]["dtype"] = "bf16"
    run = RunConfig.model_validate(tree)
    assert run.model.architecture is not None
    context = initialize_parallel(run.parallel)
    policy = PolicyEngine(from_section(run.model.architecture), run, context)
    gradients: list[torch.Tensor] = []
    curve: Curve = []
    for step in range(NUM_STEPS):
        batches = step_batches(
            0,
            num_groups=context.dp_size,
            group=context.dp_rank,
            multiple=2 * context.cp_size * context.tp_size,
            num_microbatches=NUM_MICROBATCHES,
        )
        report = policy.forward_backward(batches, build_loss("sft", {}))
        if step == 0:
            parameters = [each for chunk in policy.chunks for each in chunk.parameters()]
            gradients = [each.main_grad.clone() for each in parameters]  # type: ignore[attr-defined]
        norm = policy.optim_step(step, num_steps=NUM_STEPS).grad_norm
        curve.append((report.loss, norm, report.metrics["entropy"]))
    parallel_state.destroy_model_parallel()
    return [each.float() for each in gradients], {each.dtype for each in gradients}, curve


SHARDED = {"distributed_optimizer": True, "overlap_grad_reduce": True}
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any], str]] = {
    "dp 2": (2, {}, {}, "off"),
    "dp 2, fused head": (2, {}, {}, "on"),
    "dp 2, fused tied head": (2, {}, {"tie_embeddings": True}, "on"),
    "tp 2, fused head": (2, {"tp": 2, "sequence_parallel": True}, {}, "on"),
    "pp 2, tied": (2, {"pp": 2}, {"tie_embeddings": True}, "off"),
    "experts, ep 2": (2, {"ep": 2}, QWEN3_MOE, "off"),
}


@pytest.mark.parametrize("case", cases(CASES, rarely=["dp 2", "dp 2, fused head"]))
def test_gradients_in_bf16_are_those_in_fp32_up_to_rounding(case: str) -> None:
    world_size, parallel, model, fused = CASES[case]
    halves, wholes = (
        run_ranks(world_size, gradients_and_curve, {**parallel, "grad_reduce_dtype": dtype}, model, fused)
        for dtype in ("bf16", "fp32")
    )
    for (ours, dtypes, curve), (theirs, _, truth) in zip(halves, wholes, strict=True):
        assert dtypes == {torch.bfloat16}
        assert curve[0][0] == truth[0][0]
        for gradient, true in zip(ours, theirs, strict=True):
            # A rounding for each micro-batch and one for each sum over ranks.
            assert (gradient - true).norm() <= (NUM_MICROBATCHES + 1) * ROUNDING * true.norm()
        assert not all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))
        # Adam's steps follow: the same sequences again, so that the loss falls far below the difference.
        assert curve[-1][0] == pytest.approx(truth[-1][0], rel=0.02)
        assert curve[-1][0] < 0.8 * curve[0][0]


def test_a_sharded_optimizer_steps_from_bf16_gradients_in_fp32() -> None:
    curves = [
        run_ranks(2, gradients_and_curve, {**sharded, "grad_reduce_dtype": dtype}, {}, "on")[0][2]
        for sharded in ({}, SHARDED)
        for dtype in ("bf16", "fp32")
    ]
    torch.testing.assert_close(torch.tensor(curves[0]), torch.tensor(curves[2]), rtol=1e-3, atol=0)
    assert curves[2][-1][0] == pytest.approx(curves[3][-1][0], rel=0.02)
