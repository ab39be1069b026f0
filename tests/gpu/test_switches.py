"""What Megatron and Transformer Engine are told on one CUDA device changes no number beyond its rounding."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from megatron_sftrl.errors import UserError
from megatron_sftrl.models.architecture import from_section
from tests.distributed.mixture_runs import QWEN3_MOE
from tests.distributed.test_layouts import make_config, step_batches

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
HAS_TE = importlib.util.find_spec("transformer_engine") is not None
needs_te = pytest.mark.skipif(not HAS_TE, reason="needs Transformer Engine")
# Sides that products in eight bits can have, and a head of the size that attention kernels know.
SIZES = {"hidden_size": 256, "ffn_hidden_size": 512, "head_dim": 64}
DISTRIBUTED = {"distributed_optimizer": True}


def curve(*, model: dict, train: dict, optim: dict, parallel: dict) -> list[tuple[float, float]]:
    """(loss, gradient norm) of four steps in bf16."""
    from megatron_sftrl.engine.megatron_config import check_megatron
    from megatron_sftrl.engine.parallel import parallel_context
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.losses.registry import build_loss

    run = make_config(parallel, **{**SIZES, **model})
    raw = run.model_dump(mode="json", exclude_unset=True)
    raw["model"]["dtype"] = "bf16"
    run = type(run).model_validate(
        {**raw, "train": {**raw["train"], **train}, "optim": {**raw["optim"], **optim}}
    )
    assert run.model.architecture is not None
    architecture = from_section(run.model.architecture)
    check_megatron(run, architecture, is_cuda=True)
    with parallel_context(run.parallel, deterministic=run.train.deterministic) as context:
        policy = PolicyEngine(architecture, run, context)
        found = []
        for step in range(4):
            batches = step_batches(
                step, num_groups=1, group=0, multiple=policy.token_multiple, num_microbatches=2
            )
            loss = policy.forward_backward(batches, build_loss("sft", {})).loss
            found.append((loss, policy.optim_step(step, num_steps=4).grad_norm))
    return found


def run(**sections: Any) -> torch.Tensor:
    nothing: dict[str, dict] = {"model": {}, "train": {}, "optim": {}, "parallel": {}}
    return torch.tensor(curve(**{**nothing, **sections}), dtype=torch.float64)


@pytest.mark.parametrize("model", [{}, QWEN3_MOE], ids=["dense", "mixture"])
def test_a_deterministic_run_has_the_same_bits_twice(model: dict) -> None:
    first, second = (run(model=model, train={"deterministic": True}) for _ in range(2))
    assert torch.equal(first, second)
    # Another order of sums in bf16.
    torch.testing.assert_close(first, run(model=model), rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("fusion", ["bias_activation_fusion", "gradient_accumulation_fusion"])
@pytest.mark.parametrize("model", [{}, QWEN3_MOE], ids=["dense", "mixture"])
def test_a_fusion_changes_the_rounding_alone(fusion: str, model: dict) -> None:
    plain = run(model=model, parallel={"megatron": {fusion: False}})
    torch.testing.assert_close(run(model=model), plain, rtol=2e-2, atol=1e-2)


@needs_te
@pytest.mark.parametrize("parallel", [{"moe_permute_fusion": True}, {"moe_router_fusion": True}], ids=str)
def test_an_experts_kernel_changes_the_rounding_alone(parallel: dict) -> None:
    torch.testing.assert_close(
        run(model=QWEN3_MOE, parallel=parallel), run(model=QWEN3_MOE), rtol=2e-2, atol=1e-2
    )


@needs_te
@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "mxfp8"])
@pytest.mark.parametrize("model", [{}, QWEN3_MOE], ids=["dense", "mixture"])
def test_eight_bits_follow_bf16(recipe: str, model: dict) -> None:
    try:
        found = run(model=model, train={"fp8": {"recipe": recipe}})
    except UserError as error:
        pytest.skip(str(error))
    # Three bits of mantissa: a few per cent in a gradient, much less in a loss.
    torch.testing.assert_close(found[:, 0], run(model=model)[:, 0], rtol=5e-2, atol=5e-2)
    torch.testing.assert_close(found[:, 1], run(model=model)[:, 1], rtol=0.3, atol=0.1)


@needs_te
@pytest.mark.parametrize(
    "optim",
    [
        {"cpu_offload": 0.5},
        {"cpu_offload": 1.0},
        {"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"},
        {"exp_avg_sq_dtype": "bf16"},
    ],
    ids=str,
)
def test_an_optimizer_that_keeps_less_here_moves_the_same_way(optim: dict) -> None:
    plain = run(parallel=DISTRIBUTED)
    torch.testing.assert_close(run(optim=optim, parallel=DISTRIBUTED), plain, rtol=2e-2, atol=1e-2)
