"""What the tests of router replay run on every rank, and transformers' routers with forced experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_sftrl.config.schema import RunConfig
from megatron_sftrl.models.tensors import Region
from megatron_sftrl.types import OWN_CHOICE, Prompt, Rollout, SamplingParams
from tests.distributed.engine_outputs import _hf_parts, _loaded_policy, _packed, engine_config

Weigh = Callable[[Any, Tensor, Tensor], Tensor]
"""From a model's configuration, router logits [T, E] and experts [T, k] to their weights [T, k]."""


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """Of one rank: a step over micro-batches of the same tokens, each with experts of its own."""

    loss: float
    changed: float
    gradients: dict[str, list[tuple[Region, Tensor]]]


def replayed_step(
    config: RunConfig, tokens: Tensor, labels: Tensor, lengths: list[int], experts: list[Tensor]
) -> Replayed:
    """The mean nll over all micro-batches, its gradients, and what the metric says."""
    from megatron.core import parallel_state

    from megatron_sftrl.engine.router_replay import CHANGED_METRIC, RouterReplay
    from megatron_sftrl.losses.registry import build_loss
    from megatron_sftrl.models import architecture_of

    architecture = architecture_of(config.model)
    context, policy = _loaded_policy(config, architecture, with_optimizer=True)
    policy.router_replay = RouterReplay(policy.chunks, architecture, context)
    batch = _packed(tokens, lengths, labels=labels)
    share = batch.token_weight / len(tokens) / len(experts) / context.dp_size
    batches = [dataclasses.replace(batch, token_weight=share, experts=each) for each in experts]
    report = policy.forward_backward(batches, build_loss("sft", {}))
    grads = {
        id(p): p.main_grad  # type: ignore[attr-defined]
        for chunk in policy.chunks
        for p in chunk.parameters()
        if p.requires_grad
    }
    gradients = _hf_parts(policy, architecture, grads)
    parallel_state.destroy_model_parallel()
    return Replayed(loss=report.loss, changed=report.metrics[CHANGED_METRIC], gradients=gradients)


def recorded_rollouts(
    config: RunConfig, prompts: list[tuple[int, ...]], sampling: SamplingParams
) -> list[Rollout]:
    """Responses to all prompts from the training engine, fewer at once than there are."""
    from megatron.core import parallel_state

    from megatron_sftrl.engine.router_replay import RouterReplay
    from megatron_sftrl.models import architecture_of
    from megatron_sftrl.rollout.in_process import InProcessEngine

    architecture = architecture_of(config.model)
    context, policy = _loaded_policy(config, architecture)
    policy.router_replay = RouterReplay(policy.chunks, architecture, context)
    engine = InProcessEngine(context, max_responses=2)
    engine.update(policy, version=0)
    asked = [Prompt(id=number, tokens=prompt) for number, prompt in enumerate(prompts)]
    rollouts = [rollout for group in engine.generate(asked, sampling) for rollout in group.rollouts]
    parallel_state.destroy_model_parallel()
    return rollouts


def largest_mismatches(
    directory: Path, prompts: list[tuple[int, ...]], sampling: SamplingParams
) -> list[float]:
    """Nats between a bf16 engine and an fp32 trainer of the same weights: without and with router replay."""
    from megatron.core import parallel_state

    from megatron_sftrl.engine.router_replay import RouterReplay
    from megatron_sftrl.models import architecture_of
    from megatron_sftrl.trainers.experience import ask_logprobs

    rollouts = recorded_rollouts(engine_config(directory, {}, "bf16"), prompts, sampling)
    config = engine_config(directory, {}, "fp32")
    architecture = architecture_of(config.model)
    context, policy = _loaded_policy(config, architecture)
    policy.router_replay = RouterReplay(policy.chunks, architecture, context)
    found = []
    for is_replayed in (False, True):
        largest = 0.0
        for rollout in rollouts:
            whole = torch.tensor([*rollout.prompt_tokens, *rollout.response_tokens])
            batch = _packed(whole[:-1], [len(whole) - 1], labels=whole[1:])
            if is_replayed:
                assert rollout.experts is not None
                batch = dataclasses.replace(batch, experts=torch.from_numpy(rollout.experts.astype("int16")))
            with policy.evaluation():
                (ours,) = policy.token_numbers([batch], ask_logprobs)
            start = len(rollout.prompt_tokens) - 1
            theirs = torch.tensor(rollout.logprobs)
            largest = max(largest, float((ours[0, start:] - theirs).abs().max()))
        found.append(largest)
    parallel_state.destroy_model_parallel()
    return found


def reference_and_policy(
    directory: Path, tokens: Tensor, lengths: list[int], experts: Tensor
) -> tuple[bool, bool]:
    """Whether the experts of a batch leave a reference's last states as they are, and the policy's.

    The reference is the policy's own weights, as beside adapters.
    """
    from megatron.core import parallel_state

    from megatron_sftrl.config.schema import ReferenceSection
    from megatron_sftrl.engine.reference import SharedReference
    from megatron_sftrl.engine.router_replay import RouterReplay
    from megatron_sftrl.models import architecture_of
    from megatron_sftrl.trainers.experience import ask_logprobs

    config = engine_config(directory, {}, "fp32")
    architecture = architecture_of(config.model)
    context, policy = _loaded_policy(config, architecture)
    policy.router_replay = RouterReplay(policy.chunks, architecture, context)
    section = ReferenceSection(kind="frozen")
    reference = SharedReference(section, context, policy.chunks, keeps_start=False)
    own = _packed(tokens, lengths)
    told = dataclasses.replace(own, experts=experts)
    with policy.evaluation():
        states = [reference.hidden_states([batch])[0] for batch in (own, told)]
        logprobs = [policy.token_numbers([batch], ask_logprobs)[0] for batch in (own, told)]
    parallel_state.destroy_model_parallel()
    return torch.equal(*states), torch.equal(*logprobs)


# The same by transformers: a router's module returns (logits, weights, experts).


class Gates:
    """Forces experts on the routers of a model of transformers, and remembers what they had chosen."""

    def __init__(self, model: Any, weigh: Weigh) -> None:
        self.chosen: list[Tensor] = []  # [T, k] of each layer
        self._forced: Tensor | None = None
        mlps = [layer.mlp for layer in model.model.layers]
        gates = [getattr(mlp, name) for mlp in mlps for name in ("gate", "router") if hasattr(mlp, name)]
        for place, gate in enumerate(gates):

            def force(module: Any, _: object, output: tuple, place: int = place) -> tuple:
                logits, _, own = output
                self.chosen.append(own)
                if self._forced is None:
                    return output
                told = self._forced[:, place].long()
                experts = torch.where(told == OWN_CHOICE, own, told)
                return logits, weigh(model.config, logits, experts), experts

            gate.register_forward_hook(force)

    def run(self, forward: Callable[[], Tensor], experts: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the model makes of one sequence, and the routers' own [T, layers, k]."""
        self._forced, self.chosen = experts, []
        result = forward()
        return result, torch.stack(self.chosen, dim=1)


def softmax_weights(config: Any, logits: Tensor, experts: Tensor) -> Tensor:
    weights = logits.float().softmax(dim=1).gather(1, experts)
    if getattr(config, "norm_topk_prob", True):
        weights = weights / weights.sum(dim=1, keepdim=True)
    return weights * getattr(config, "routed_scaling_factor", 1.0)


def sigmoid_weights(config: Any, logits: Tensor, experts: Tensor) -> Tensor:
    weights = logits.float().sigmoid().gather(1, experts)
    return weights / weights.sum(dim=1, keepdim=True) * getattr(config, "routed_scaling_factor", 1.0)
