"""What the backward computes again is what the forward computed. test_planned_memory.py: it holds less."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_sftrl.config.schema import ParallelSection, RunConfig
from megatron_sftrl.models.architecture import from_section
from tests.distributed.mixture_runs import QWEN3_MOE, Place, main_gradients
from tests.distributed.test_layouts import make_config, step_batches
from tests.grid import cases
from tests.ranks import run_ranks

SPLIT = {"tp": 2, "sequence_parallel": True}
Step = tuple[float, float, list[float], list[tuple[Place, torch.Tensor]]]
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "one process": (1, {}, {}),
    "biases, tp 2, sequence parallel": (2, SPLIT, {"family": "qwen2"}),
    "tp 2": (2, {"tp": 2}, {}),
    "pp 2 vp 2": (2, {"pp": 2, "vp": 2}, {"num_layers": 8}),
    "cp 2": (2, {"cp": 2}, {}),
    "experts, ep 2": (2, {"ep": 2}, QWEN3_MOE),
    "experts, tp 2, pp 2": (4, {**SPLIT, "ep": 2, "etp": 1, "pp": 2}, QWEN3_MOE),
}
DENSE = (["mlp_act"], ["layernorm"], ["mlp"], ["layernorm", "mlp"])
MIXTURE = (["moe_act"], ["layernorm"], ["moe"], ["layernorm", "moe"])


def ways(model: dict[str, Any]) -> list[dict[str, Any]]:
    """Every way to recompute in blocks of the kind."""
    named = MIXTURE if "num_experts" in model else DENSE
    return [
        {"recompute": "full"},
        {"recompute": "full", "recompute_layers": 1},
        {"recompute": "selective"},
        *({"recompute": "selective", "recompute_modules": modules} for modules in named),
    ]


def train(
    context: Any,
    parallel: dict[str, Any],
    model: dict[str, Any],
    how: dict[str, Any],
    *,
    with_megatrons: bool = False,
) -> list[Step]:
    """(loss, gradient norm, load-balancing loss if any, every gradient) of two steps of this rank."""
    from megatron.core.transformer.mlp import MLP

    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.engine.recompute import LeanMLP
    from megatron_sftrl.losses.registry import build_loss

    tree = make_config(parallel, **model).model_dump(exclude_unset=True)
    tree["train"] |= how
    tree["model"]["moe_aux_loss_coeff"] = 1.0 if "num_experts" in model else 0.0
    run = RunConfig.model_validate(tree)
    assert run.model.architecture is not None
    policy = PolicyEngine(from_section(run.model.architecture), run, context)
    lean: list[torch.nn.Module] = [
        module for chunk in policy.chunks for module in chunk.modules() if isinstance(module, LeanMLP)
    ]
    assert lean, "Megatron's own MLP runs: its name or its fusion has changed"
    for module in lean if with_megatrons else []:
        module.__class__ = MLP
    found = []
    for step in range(2):
        batches = step_batches(
            step,
            num_groups=context.dp_size,
            group=context.dp_rank,
            multiple=2 * context.cp_size * context.tp_size,
            num_microbatches=4,
        )
        report = policy.forward_backward(batches, build_loss("sft", {}))
        gradients = main_gradients(policy.chunks, all_copies=True)
        norm = policy.optim_step(step, num_steps=3).grad_norm
        balance = [value for name, value in report.metrics.items() if "load_balancing" in name]
        found.append((report.loss, norm, balance, gradients))
    return found


def differing(parallel: dict[str, Any], model: dict[str, Any]) -> list[str]:
    """What this rank computes otherwise when it recomputes, and what it should not have had equal."""
    from megatron.core import parallel_state

    from megatron_sftrl.engine.parallel import initialize_parallel

    context = initialize_parallel(ParallelSection.model_validate(parallel))
    kept = train(context, parallel, model, {})
    problems = [] if kept[0][0] != kept[1][0] else ["nothing was learned: the test is blind"]
    for how in ways(model):
        # A norm made on its own adds the terms of its input's gradient in another order.
        modules = how.get("recompute_modules", ["layernorm"]) if how["recompute"] == "selective" else []
        limit = 1e-5 if "layernorm" in modules else 0.0
        for number, (ours, theirs) in enumerate(zip(train(context, parallel, model, how), kept, strict=True)):
            values, truth = ([*step[:2], *step[2]] for step in (ours, theirs))
            if values != pytest.approx(truth, rel=limit, abs=0):
                problems.append(f"{how}, step {number}: {values}, expected {truth}")
            for (place, gradient), (also, true) in zip(ours[3], theirs[3], strict=True):
                if place != also or not (gradient - true).norm() <= limit * true.norm():
                    problems.append(f"{how}, step {number}: gradient of {place}")
    parallel_state.destroy_model_parallel()
    return problems


@pytest.mark.parametrize("layout", cases(LAYOUTS, rarely=["tp 2", "cp 2", "experts, ep 2"]))
def test_recomputing_changes_no_loss_and_no_gradient(layout: str) -> None:
    world_size, parallel, model = LAYOUTS[layout]
    assert run_ranks(world_size, differing, parallel, model) == [[]] * world_size


def differing_from_megatrons(model: dict[str, Any]) -> list[str]:
    """What a policy computes otherwise than one with Megatron's own MLP."""
    from megatron.core import parallel_state

    from megatron_sftrl.engine.parallel import initialize_parallel

    context = initialize_parallel(ParallelSection())
    ours, theirs = (train(context, {}, model, {}, with_megatrons=which) for which in (False, True))
    parallel_state.destroy_model_parallel()
    problems = [] if ours[0][0] != ours[1][0] else ["nothing was learned: the test is blind"]
    for mine, true in zip(ours, theirs, strict=True):
        if mine[:3] != true[:3]:
            problems.append(f"{mine[:3]}, expected {true[:3]}")
        for (place, gradient), (_, expected) in zip(mine[3], true[3], strict=True):
            if not torch.equal(gradient, expected):
                problems.append(f"gradient of {place}")
    return problems


@pytest.mark.parametrize("model", [{}, QWEN3_MOE], ids=["dense", "experts"])
def test_a_lean_mlp_computes_megatrons_bits(model: dict[str, Any]) -> None:
    assert run_ranks(1, differing_from_megatrons, model) == [[]]


@pytest.mark.parametrize("name", ["silu", "gelu_tanh"])
def test_a_gate_rounds_as_autograd_does_in_bf16(name: str) -> None:
    from megatron_sftrl.engine.recompute import gated, gelu_tanh

    activation = torch.nn.functional.silu if name == "silu" else gelu_tanh
    both, grad = torch.randn(2, 7, 32, generator=torch.manual_seed(0)).bfloat16()
    ours, plain = both.clone().requires_grad_(), both.clone().requires_grad_()
    gate, linear = plain.chunk(2, dim=-1)
    expected = activation(gate) * linear
    product = gated(ours, activation)
    product.backward(grad[:, :16])
    expected.backward(grad[:, :16])
    assert torch.equal(product, expected)
    assert ours.grad is not None
    assert plain.grad is not None
    assert torch.equal(ours.grad, plain.grad)
