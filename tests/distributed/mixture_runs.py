"""Short runs of toy mixtures, for the tests of expert parallelism; everything here runs on every rank."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_sftrl.models.architecture import from_section
from tests.distributed.test_layouts import Curve, make_config, step_batches

NUM_STEPS = 12
NUM_BATCHES = 3
CLIP_GRAD = 0.1
STEP = 3e-4
"""Length of a step along a gradient, for slopes by differences."""
EXPERTS = {"num_experts": 4, "experts_per_token": 2, "ffn_hidden_size": 24}
QWEN3_MOE = {"family": "qwen3_moe", **EXPERTS}
MIXTRAL = {"family": "mixtral", **EXPERTS, "tie_embeddings": True, "norm_eps": 1e-5}

Place = tuple[str, tuple[int, ...], tuple[int, ...]]
"""Key, global shape and global offset of a shard, stacked axes included."""


@dataclass(frozen=True, kw_only=True)
class MixtureRun:
    """What a rank saw.

    Args:
        curve: (loss, gradient norm, entropy) of each step.
        gradients: of the first step, before clipping; the shards whose main copy this rank holds. Empty with
            the distributed optimizer, which sums only each rank's own range.
        smallest_gap: between the last chosen expert's logit and the first one left out, over the whole run.
        fewest_tokens: of any expert in any micro-batch.
        balance: load-balancing loss of each step; NaN without.
    """

    curve: Curve
    gradients: list[tuple[Place, Tensor]]
    smallest_gap: float
    fewest_tokens: int
    balance: list[float]


def run_mixture(
    parallel: dict[str, Any],
    model: dict[str, Any],
    *,
    num_microbatches: int = 2,
    recompute: str = "none",
    aux_loss_coeff: float = 0.0,
) -> MixtureRun:
    """Train NUM_STEPS steps of a toy mixture."""
    from megatron.core import parallel_state

    from megatron_sftrl.engine.parallel import initialize_parallel
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.losses.registry import build_loss

    run = make_config(parallel, **model)
    changes = {
        "train": run.train.model_copy(update={"recompute": recompute}),
        "model": run.model.model_copy(update={"moe_aux_loss_coeff": aux_loss_coeff}),
    }
    run = run.model_copy(update=changes)
    assert run.model.architecture is not None
    context = initialize_parallel(run.parallel)
    policy = PolicyEngine(from_section(run.model.architecture), run, context)
    gaps, counts = _watch_routers(policy.chunks)
    loss = build_loss("sft", {})
    curve: Curve = []
    gradients: list[tuple[Place, Tensor]] = []
    balance = []
    for step in range(NUM_STEPS):
        batches = step_batches(
            step % NUM_BATCHES,  # seen again, so that the loss falls and a test can tell
            num_groups=context.dp_size,
            group=context.dp_rank,
            multiple=2 * context.cp_size * context.tp_size,
            num_microbatches=num_microbatches,
        )
        report = policy.forward_backward(batches, loss)
        if step == 0 and not run.parallel.distributed_optimizer:
            gradients = main_gradients(policy.chunks)
        update = policy.optim_step(step, num_steps=NUM_STEPS)
        curve.append((report.loss, update.grad_norm, report.metrics["entropy"]))
        balance.append(report.metrics.get("moe/load_balancing_loss", math.nan))
    parallel_state.destroy_model_parallel()
    return MixtureRun(
        curve=curve,
        gradients=gradients,
        smallest_gap=min(gaps),
        fewest_tokens=min(counts),
        balance=balance,
    )


def _watch_routers(chunks: list[Any]) -> tuple[list[float], list[int]]:
    """Lists that fill while the model runs: smallest gap of each forward, fewest tokens of any expert."""
    from megatron.core.transformer.moe.router import TopKRouter

    gaps: list[float] = []
    counts: list[int] = []

    def watch(router: Any, args: tuple[Tensor, ...]) -> None:
        logits = args[0].detach().flatten(0, 1) @ router.weight.detach().T
        ordered = logits.sort(dim=1, descending=True).values
        gaps.append(float((ordered[:, router.topk - 1] - ordered[:, router.topk]).min()))
        chosen = logits.topk(router.topk, dim=1).indices.flatten()
        counts.append(int(torch.bincount(chosen, minlength=logits.shape[1]).min()))

    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, TopKRouter):
                module.register_forward_pre_hook(watch)
    return gaps, counts


def main_gradients(chunks: list[Any], *, all_copies: bool = False) -> list[tuple[Place, Tensor]]:
    """main_grad of every shard on this rank, or only of those whose main copy it holds."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    found = []
    for chunk in chunks:
        for value in chunk.sharded_state_dict().values():
            parameter: Any = value.data
            if isinstance(value, ShardedTensorFactory):
                of_gradient: Any = dataclasses.replace(value, data=parameter.main_grad)
                shards: list[Any] = of_gradient.build()
            elif isinstance(value, ShardedTensor):
                shards = [dataclasses.replace(value, data=parameter.main_grad)]
            else:
                continue
            for shard in shards:
                if all_copies or shard.replica_id == (0, 0, 0):
                    place = (shard.key, shard.global_shape, shard.global_offset)
                    found.append((place, shard.data.clone()))
    return found


def whole_gradients(runs: list[MixtureRun]) -> dict[str, Tensor]:
    """Every tensor of the model as one, layers and experts stacked, from the shards of all ranks."""
    whole: dict[str, Tensor] = {}
    for (key, shape, offset), shard in (pair for run in runs for pair in run.gradients):
        target = whole.setdefault(key, torch.full(shape, torch.nan))
        stacked = (1,) * (len(shape) - shard.dim())
        box = tuple(slice(a, a + b) for a, b in zip(offset, (*stacked, *shard.shape), strict=True))
        target[box] = shard.view(*stacked, *shard.shape)
    return whole


def mixture_layer(*, normalizes_weights: bool, dtype: str) -> dict[str, Tensor]:
    """Input, output and weights of the first block's mixture in one process."""
    from megatron.core import parallel_state
    from megatron.core.transformer.moe.moe_layer import MoELayer

    from megatron_sftrl.engine.parallel import initialize_parallel
    from megatron_sftrl.engine.policy import PolicyEngine

    run = make_config({}, **QWEN3_MOE)
    run = run.model_copy(update={"model": run.model.model_copy(update={"dtype": dtype})})
    assert run.model.architecture is not None
    architecture = from_section(run.model.architecture)
    assert architecture.mixture is not None
    mixture = dataclasses.replace(architecture.mixture, normalizes_weights=normalizes_weights)
    context = initialize_parallel(run.parallel)
    policy = PolicyEngine(dataclasses.replace(architecture, mixture=mixture), run, context)
    layer: Any = next(module for module in policy.chunks[0].modules() if isinstance(module, MoELayer))
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 1, architecture.hidden_size, generator=generator).to(layer.router.weight.dtype)
    with torch.no_grad():
        output, _ = layer(hidden)
    parallel_state.destroy_model_parallel()
    experts = layer.experts.local_experts
    return {
        "input": hidden[:, 0],
        "output": output[:, 0],
        "router": layer.router.weight.detach(),
        "fc1": torch.stack([expert.linear_fc1.weight.detach() for expert in experts]),
        "fc2": torch.stack([expert.linear_fc2.weight.detach() for expert in experts]),
    }


def clipped_update() -> tuple[float, float]:
    """(learning rate, L2 norm of the change of all weights) of one plain SGD step with a clipped gradient."""
    from megatron.core import parallel_state

    from megatron_sftrl.engine.parallel import initialize_parallel
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.losses.registry import build_loss

    run = make_config({}, **QWEN3_MOE)
    sgd = {"name": "sgd", "momentum": 0.0, "weight_decay": 0.0, "clip_grad": CLIP_GRAD}
    run = run.model_copy(update={"optim": run.optim.model_copy(update=sgd)})
    assert run.model.architecture is not None
    context = initialize_parallel(run.parallel)
    policy = PolicyEngine(from_section(run.model.architecture), run, context)
    before = [parameter.detach().clone() for parameter in policy.chunks[0].parameters()]
    policy.forward_backward(
        step_batches(0, num_groups=1, group=0, multiple=2, num_microbatches=2), build_loss("sft", {})
    )
    update = policy.optim_step(0, num_steps=NUM_STEPS)
    moved = [p.detach() - old for p, old in zip(policy.chunks[0].parameters(), before, strict=True)]
    parallel_state.destroy_model_parallel()
    assert update.grad_norm > 10 * CLIP_GRAD
    return update.lr, float(torch.cat([part.flatten() for part in moved]).norm())


@dataclass(frozen=True, kw_only=True)
class BalanceGradients:
    """The load-balancing loss of one micro-batch in one process.

    Args:
        balance: the metric.
        is_padding: [T] bool.
        router_inputs: [T, H] of each layer.
        routers: [E, H] of each layer.
        router_gradient: [E, H] of the last router: with the coefficient less without.
        gradient_norm: of all weights: with less without.
        slope: of coefficient * num_layers * balance along that gradient, by differences.
    """

    balance: float
    is_padding: Tensor
    router_inputs: list[Tensor]
    routers: list[Tensor]
    router_gradient: Tensor
    gradient_norm: float
    slope: float


def balance_gradients(coefficient: float) -> BalanceGradients:
    """Gradients of one step with the coefficient and with a negligible one, and of shifted weights."""
    from megatron.core import parallel_state
    from megatron.core.transformer.moe.router import TopKRouter

    from megatron_sftrl.engine.parallel import initialize_parallel
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.losses.registry import build_loss

    run = make_config({}, **QWEN3_MOE)
    assert run.model.architecture is not None
    architecture = from_section(run.model.architecture)
    context = initialize_parallel(run.parallel)
    batches = step_batches(0, num_groups=1, group=0, multiple=4, num_microbatches=1)
    loss = build_loss("sft", {})

    def policy_with(value: float) -> PolicyEngine:
        model = run.model.model_copy(update={"moe_aux_loss_coeff": value})
        return PolicyEngine(architecture, run.model_copy(update={"model": model}), context)

    plain, policy = policy_with(0.0), policy_with(coefficient)
    assert {type(m) for m in plain.chunks[0].modules() if isinstance(m, TopKRouter)} == {TopKRouter}
    plain.forward_backward(batches, loss)
    routers = [module for module in policy.chunks[0].modules() if isinstance(module, TopKRouter)]
    inputs: list[Tensor] = []
    hooks = [
        router.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach().flatten(0, 1)))
        for router in routers
    ]
    balance = policy.forward_backward(batches, loss).metrics["moe/load_balancing_loss"]
    for hook in hooks:
        hook.remove()
    parameters: list[Any] = list(policy.chunks[0].parameters())
    without: list[Any] = list(plain.chunks[0].parameters())
    difference = [p.main_grad - q.main_grad for p, q in zip(parameters, without, strict=True)]
    (last,) = (i for i, p in enumerate(parameters) if p is routers[-1].weight)
    norm = float(torch.cat([part.flatten() for part in difference]).norm())
    shifted = []
    for sign in (1, -2):
        with torch.no_grad():
            for parameter, part in zip(parameters, difference, strict=True):
                parameter.add_(part, alpha=sign * STEP / norm)
        shifted.append(policy.forward_backward(batches, loss).metrics["moe/load_balancing_loss"])
    with torch.no_grad():
        for parameter, part in zip(parameters, difference, strict=True):
            parameter.add_(part, alpha=STEP / norm)
    parallel_state.destroy_model_parallel()
    assert batches[0].is_padding is not None
    assert batches[0].is_padding.any()
    return BalanceGradients(
        balance=balance,
        is_padding=batches[0].is_padding,
        router_inputs=inputs,
        routers=[router.weight.detach().clone() for router in routers],
        router_gradient=difference[last].clone(),
        gradient_norm=norm,
        slope=coefficient * architecture.num_layers * (shifted[0] - shifted[1]) / (2 * STEP),
    )
