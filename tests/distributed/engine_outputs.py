"""Numbers out of an engine that was built from a Hugging Face directory; runs on every rank."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sftrl.config.schema import RunConfig
from megatron_sftrl.models import Architecture
from megatron_sftrl.models.tensors import Region
from megatron_sftrl.types import Prompt, SamplingParams, TokenBatch
from tests.ranks import end_groups

if TYPE_CHECKING:
    from megatron_sftrl.engine.parallel import ParallelContext
    from megatron_sftrl.engine.policy import PolicyEngine


def engine_config(directory: Path, parallel: dict, dtype: str) -> RunConfig:
    """A run with the weights in `directory`; only its model and parallel sections matter here."""
    return RunConfig.model_validate(
        {
            "run_dir": "unused",
            "model": {"hf": directory, "dtype": dtype},
            "tokenizer": {"path": "unused"},
            "parallel": parallel,
            "data": {"train": ["unused"], "max_length": 64},
            "batch": {"global_size": 1},
            "loss": {"name": "sft"},
            "optim": {"lr": 0.01},
            "train": {"steps": 1},
        }
    )


@dataclass(frozen=True, kw_only=True)
class Case:
    """What to run a model on.

    Args:
        tokens, labels: [T] packed sequences of `lengths`.
        prompts: to continue with `num_new` tokens; none under a layout without a cache.
    """

    config: RunConfig
    architecture: Architecture
    tokens: Tensor
    labels: Tensor
    lengths: list[int]
    prompts: list[tuple[int, ...]]
    num_new: int


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """Of one model on one rank.

    Args:
        logits: [T, V] fp32; None before the last stage.
        weights, gradients: this rank's parts of each Hugging Face tensor, the latter of the mean nll.
        responses: greedy.
        sizes: elements of each parameter, by chunk.
    """

    logits: Tensor | None
    weights: dict[str, list[tuple[Region, Tensor]]]
    gradients: dict[str, list[tuple[Region, Tensor]]]
    responses: list[tuple[int, ...]]
    sizes: list[list[int]]


def engine_numbers(cases: list[Case]) -> list[Numbers]:
    """Of each case, all of one layout, one after the other."""
    found = []
    for case in cases:
        found.append(_numbers(case))
        end_groups()
    return found


def _numbers(case: Case) -> Numbers:
    from megatron_sftrl.losses.registry import build_loss

    context, policy = _loaded_policy(case.config, case.architecture, with_optimizer=True)
    logits = _whole_logits(policy, case.architecture, case.tokens, case.lengths)
    weights = _hf_parts(policy, case.architecture, {})
    batch = _packed(case.tokens, case.lengths, labels=case.labels)
    share = batch.token_weight / len(case.tokens) / context.pp_size / context.dp_size
    batch = dataclasses.replace(batch, token_weight=share)
    policy.forward_backward([batch] * context.pp_size, build_loss("sft", {}))
    grads = {
        id(p): p.main_grad  # type: ignore[attr-defined]
        for chunk in policy.chunks
        for p in chunk.parameters()
        if p.requires_grad
    }
    return Numbers(
        logits=logits,
        weights=weights,
        gradients=_hf_parts(policy, case.architecture, grads),
        responses=_greedy(policy, case.prompts, case.num_new) if case.prompts else [],
        sizes=[[each.numel() for each in chunk.parameters()] for chunk in policy.chunks],
    )


def _hf_parts(
    policy: PolicyEngine, architecture: Architecture, instead: dict[int, Tensor]
) -> dict[str, list[tuple[Region, Tensor]]]:
    """Copies of this rank's parts of each Hugging Face tensor, or of what stands in the weights' places."""
    from megatron_sftrl.engine.checkpoint.tensors import model_tensors
    from megatron_sftrl.models.tensors import hf_regions, megatron_tensors

    table = {(tensor.key, tensor.index): tensor for tensor in megatron_tensors(architecture)}
    depth = {key: len(index) for key, index in table}
    parts: dict[str, list[tuple[Region, Tensor]]] = {}
    for shard in model_tensors(policy.chunks, prefix="", instead=instead):
        key = shard.key.removeprefix(".")
        offset, shape = shard.global_offset, shard.local_shape[depth[key] :]
        assert shard.data is not None
        data = shard.data.detach().view(shape)
        region = Region.of(shape, offset[depth[key] :])
        for each in hf_regions(table[key, tuple(offset[: depth[key]])], region):
            parts.setdefault(each.name, []).append(
                (each.source, each.as_in_file(data[each.target.slices]).clone())
            )
    return parts


def engine_logits(
    config: RunConfig, architecture: Architecture, tokens: Tensor, lengths: list[int]
) -> Tensor | None:
    """[T, V] fp32 of the packed sequences; None before the last stage."""
    from megatron.core import parallel_state

    _, policy = _loaded_policy(config, architecture)
    logits = _whole_logits(policy, architecture, tokens, lengths)
    parallel_state.destroy_model_parallel()
    return logits


def _whole_logits(
    policy: PolicyEngine, architecture: Architecture, tokens: Tensor, lengths: list[int]
) -> Tensor | None:
    from megatron_sftrl.engine.context_parallel import local_rows
    from megatron_sftrl.engine.schedule import LastStageInput, as_megatron_loss, run_schedule

    context = policy.parallel

    def whole_logits(stage: LastStageInput) -> tuple[Tensor, Tensor, Tensor]:
        local = stage.model.logits(stage.hidden_states)  # [T/cp, V_padded/tp]
        columns = [torch.empty_like(local) for _ in range(context.tp_size)]
        dist.all_gather(columns, local.contiguous(), group=context.tp_group)
        rows = local_rows(stage.lengths, cp_rank=context.cp_rank, cp_size=context.cp_size)
        whole = torch.zeros(len(tokens), architecture.vocab_size)
        whole[rows] = torch.cat(columns, dim=1)[:, : architecture.vocab_size].float()
        dist.all_reduce(whole, group=context.cp_group)
        return as_megatron_loss(local.new_zeros(()), whole)

    # A virtual pipeline wants as many micro-batches as stages.
    batches = [_packed(tokens, lengths)] * context.pp_size
    with torch.no_grad():
        logits = run_schedule(policy.chunks, batches, whole_logits, context, forward_only=True)
    return logits[0] if logits else None


def engine_token_numbers(
    config: RunConfig, architecture: Architecture, tokens: Tensor, lengths: list[int], base: Path
) -> Tensor | None:
    """[3, T]: log p of each token itself and entropy at temperature 0.7, KL(p || base) at 1; nats."""
    from megatron.core import parallel_state

    from megatron_sftrl.config.schema import ReferenceSection
    from megatron_sftrl.engine.live_weights import load_hf_weights
    from megatron_sftrl.engine.reference import ReferenceModel
    from megatron_sftrl.models.hf_weights import open_weights
    from megatron_sftrl.trainers.experience import ask_logprobs_and_entropies, ask_logprobs_and_kl

    context, policy = _loaded_policy(config, architecture)
    reference = ReferenceModel(architecture, config, ReferenceSection(kind="frozen"), context)
    with open_weights(base) as weights:
        load_hf_weights(reference.chunks, weights, architecture, context)

    def ask(policy, prior, labels):
        _, kl = ask_logprobs_and_kl(policy, prior, labels)
        return [*ask_logprobs_and_entropies(policy, prior, labels, temperature=0.7), kl]

    batches = [_packed(tokens, lengths)] * context.pp_size
    found = policy.token_numbers(batches, ask, reference)
    parallel_state.destroy_model_parallel()
    return found[0] if found else None


def engine_greedy(
    config: RunConfig, architecture: Architecture, prompts: list[tuple[int, ...]], num_new: int
) -> list[tuple[int, ...]]:
    """The most likely `num_new` tokens after each prompt, generated with the cache of keys and values."""
    from megatron.core import parallel_state

    _, policy = _loaded_policy(config, architecture)
    responses = _greedy(policy, prompts, num_new)
    parallel_state.destroy_model_parallel()
    return responses


def _greedy(policy: PolicyEngine, prompts: list[tuple[int, ...]], num_new: int) -> list[tuple[int, ...]]:
    from megatron_sftrl.rollout.in_process import InProcessEngine

    engine = InProcessEngine(policy.parallel, max_responses=len(prompts))
    engine.update(policy, version=0)
    groups = engine.generate(
        [Prompt(id=number, tokens=prompt) for number, prompt in enumerate(prompts)],
        SamplingParams(temperature=0.0, max_new_tokens=num_new),
    )
    return [group.rollouts[0].response_tokens for group in groups]


def engine_cos_sin(config: RunConfig, architecture: Architecture, length: int) -> Tensor:
    """[length, head_dim] (cos, sin) of half the dimensions each, as torch's layers apply them."""
    from megatron.core import parallel_state

    from megatron_sftrl.engine.packed_sequences import PackedSequences

    context, policy = _loaded_policy(config, architecture)
    half, chunk = architecture.head_dim // 2, policy.chunks[0]
    unit = torch.cat([torch.ones(length, 1, half), torch.zeros(length, 1, half)], dim=-1)
    unit = unit.to(policy.config.params_dtype)
    packed = PackedSequences.of([length], device=context.device)
    turn = packed.turn(architecture.rope, chunk.frequencies[architecture.rope], context.cp_group, unit.dtype)
    rotated = turn(unit)
    parallel_state.destroy_model_parallel()
    return rotated[:, 0]


def embedded(config: RunConfig, tokens: Tensor) -> Tensor:
    """[T, H] that the first layer is given, in one process."""
    from megatron.core import parallel_state

    from megatron_sftrl.models import architecture_of

    _, policy = _loaded_policy(config, architecture_of(config.model))
    found = policy.chunks[0].embedding(input_ids=tokens[None], position_ids=None)  # type: ignore[operator]
    parallel_state.destroy_model_parallel()
    return found[:, 0]


def _loaded_policy(
    config: RunConfig, architecture: Architecture, *, with_optimizer: bool = False
) -> tuple[ParallelContext, PolicyEngine]:
    from megatron_sftrl.engine.live_weights import load_hf_weights
    from megatron_sftrl.engine.parallel import initialize_parallel
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.models.hf_weights import open_weights

    context = initialize_parallel(config.parallel)
    policy = PolicyEngine(architecture, config, context, with_optimizer=with_optimizer)
    assert config.model.hf is not None
    with open_weights(config.model.hf) as weights:
        load_hf_weights(policy.chunks, weights, architecture, context)
    return context, policy


def _packed(tokens: Tensor, lengths: list[int], labels: Tensor | None = None) -> TokenBatch:
    return TokenBatch(
        tokens=tokens,
        labels=tokens if labels is None else labels,
        positions=torch.cat([torch.arange(length) for length in lengths]),
        loss_mask=torch.ones(len(tokens), dtype=torch.bool),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        token_weight=torch.ones(len(tokens)),
    )
