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


def train(context: Any, parallel: dict[str, Any], model: dict[str, Any], how: dict[str, Any]) -> list[Step]:
    """(loss, gradient norm, load-balancing loss if any, every gradient) of two steps of this rank."""
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.losses.registry import build_loss

    tree = make_config(parallel, **model).model_dump(exclude_unset=True)
    tree["train"] |= how
    tree["model"]["moe_aux_loss_coeff"] = 1.0 if "num_experts" in model else 0.0
    run = RunConfig.model_validate(tree)
    assert run.model.architecture is not None
    policy = PolicyEngine(from_section(run.model.architecture), run, context)
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
