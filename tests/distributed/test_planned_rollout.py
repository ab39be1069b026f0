"""sftrl plan's memory of generation in process: the cache to the byte, the fullest moment closely."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_sftrl.apps.plan.activations import microbatch_of
from megatron_sftrl.apps.plan.job import Hardware
from megatron_sftrl.apps.plan.memory import plan_memory, rollout_memory
from megatron_sftrl.apps.plan.model_state import grid_of
from megatron_sftrl.config.schema import GrpoConfig
from megatron_sftrl.data.prompts import PromptRow
from megatron_sftrl.engine.kv_cache import KvCache
from megatron_sftrl.models.architecture import from_section
from megatron_sftrl.rl.rewards import Scored
from megatron_sftrl.trainers.experience import Response
from megatron_sftrl.types import Prompt, Rollout, SamplingParams
from tests.distributed.memory_runs import allocated_peak, storage_bytes
from tests.distributed.test_layouts import make_config
from tests.grid import cases
from tests.ranks import run_ranks


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A step's generation in which every prompt and every response is as long as the configuration allows."""

    world_size: int = 1
    parallel: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    dtype: str = "fp32"
    max_prompt_length: int = 48
    max_new_tokens: int = 80
    rollout: dict[str, Any] = field(default_factory=dict)
    num_held_out: int = 0  # instead of a step's generation: an evaluation of so many prompts
    bound: float = 0.05  # measured: 0.98 to 1.04


SIZES = {"hidden_size": 64, "ffn_hidden_size": 192, "vocab_size": 600, "max_position_embeddings": 4096}
GENERATIONS = {
    "fp32": Generation(),
    "bf16, biases": Generation(dtype="bf16", model={"family": "qwen2"}),
    "a large vocabulary": Generation(model={"vocab_size": 8000}),
    "a large vocabulary, top p": Generation(model={"vocab_size": 8000}, rollout={"top_p": 0.9}),
    # The logits of all tokens of all prompts, of which few rows are wanted, would be 65 MB.
    "long prompts": Generation(max_prompt_length=512, max_new_tokens=8, model={"vocab_size": 8000}),
    "a cache that grows twice": Generation(max_prompt_length=16, max_new_tokens=160),
    # Planned for one prompt more than meet here, where all responses end together.
    "places that are taken again": Generation(
        rollout={"max_concurrent": 6}, max_prompt_length=256, bound=0.3
    ),
    # The last ones take their places beside a cache that has grown to its whole length.
    "an evaluation of many prompts": Generation(num_held_out=20, max_prompt_length=160, max_new_tokens=200),
    "tp 2": Generation(world_size=2, parallel={"tp": 2}),
    "sequence parallelism": Generation(world_size=2, parallel={"tp": 2, "sequence_parallel": True}),
    "pp 2": Generation(world_size=2, parallel={"pp": 2}),
    "dp 2": Generation(world_size=2),
    "cp 2, without a cache": Generation(world_size=2, parallel={"cp": 2}, max_new_tokens=8),
}


def make_run(case: Generation) -> GrpoConfig:
    tree = make_config(case.parallel, **{**SIZES, **case.model}).model_dump(exclude_unset=True)
    tree["model"]["dtype"] = case.dtype
    return GrpoConfig.model_validate(
        {
            **{name: tree[name] for name in ("run_dir", "seed", "model", "tokenizer", "parallel")},
            "data": {
                "train": ["unused"],
                "valid": ["unused"] if case.num_held_out else [],
                "max_prompt_length": case.max_prompt_length,
            },
            "rollout": {
                "engine": "in_process",
                "prompts_per_step": 4,
                "group_size": 4,
                "max_new_tokens": case.max_new_tokens,
                **case.rollout,
            },
            "rewards": [{"name": "length"}],
            "batch": {"global_size": 8},
            "loss": {"name": "grpo"},
            "optim": {"lr": 0.01},
            "train": {"steps": 1},
        }
    )


@dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes of one rank: of the whole cache at the end, and at the fullest moment."""

    cache: int
    peak: int


def measure(run: GrpoConfig, num_held_out: int) -> Held:
    """One step's generation, or an evaluation, with random weights; on every rank."""
    from megatron.core import parallel_state

    from megatron_sftrl.engine.parallel import initialize_parallel
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.rollout import in_process
    from megatron_sftrl.rollout.build import build_engine

    assert run.model.architecture is not None
    architecture, rollout = from_section(run.model.architecture), run.rollout
    context = initialize_parallel(run.parallel)
    policy = PolicyEngine(architecture, run, context, with_optimizer=False)
    engine = build_engine(run, policy, str)
    engine.update(policy, version=0)
    draw = torch.Generator().manual_seed(0)
    size = (num_held_out or rollout.prompts_per_step, run.data.max_prompt_length)
    ids = torch.randint(architecture.vocab_size, size, generator=draw).tolist()
    prompts = [Prompt(id=i, tokens=tuple(tokens)) for i, tokens in enumerate(ids)]
    sampling = SamplingParams(
        max_new_tokens=rollout.max_new_tokens,
        num_samples=1 if num_held_out else rollout.group_size,
        top_p=rollout.top_p,
        seed=1,
    )
    make, caches = in_process.KvCache, []

    def remember(**sizes: int) -> KvCache:
        caches.append(make(**sizes))
        return caches[-1]

    with mock.patch.object(in_process, "KvCache", remember):
        peak = allocated_peak(lambda: engine.generate(prompts, sampling))
    parallel_state.destroy_model_parallel()
    cache = storage_bytes(tensor for each in caches for pair in each._layers.values() for tensor in pair)
    return Held(cache=cache, peak=peak)


SELDOM = ["fp32", "bf16, biases", "a large vocabulary", "a cache that grows twice", "tp 2", "dp 2"]
SELDOM += ["an evaluation of many prompts"]


@pytest.mark.parametrize("name", cases(GENERATIONS, rarely=SELDOM))
def test_the_cache_is_planned_to_the_byte_and_the_fullest_moment_closely(name: str) -> None:
    case = GENERATIONS[name]
    run = make_run(case)
    assert run.model.architecture is not None
    architecture, grid = from_section(run.model.architecture), grid_of(run.parallel, case.world_size)
    batch = microbatch_of(run, grid, "torch")
    planned = rollout_memory(architecture, run, grid, batch, Hardware(gpu_memory=80e9))
    for held in run_ranks(case.world_size, measure, run, case.num_held_out):
        assert planned.cache == held.cache
        assert planned.cache + planned.work == pytest.approx(held.peak, rel=case.bound)


@dataclass(frozen=True, kw_only=True)
class Experts:
    """Bytes of router replay on one rank: of all responses, and of the batches of one update."""

    told: int
    batched: int


def measure_experts(run: GrpoConfig) -> Experts:
    """A step's generation with random weights, and its first update; on every rank."""
    from megatron.core import parallel_state

    from megatron_sftrl.engine.parallel import initialize_parallel
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.rollout.build import build_engine
    from megatron_sftrl.trainers.checked import batch_layout
    from megatron_sftrl.trainers.experience import ExperienceBatches

    assert run.model.architecture is not None
    context = initialize_parallel(run.parallel)
    policy = PolicyEngine(from_section(run.model.architecture), run, context, with_optimizer=False)
    engine = build_engine(run, policy, str)
    engine.update(policy, version=0)
    length, rollout = run.data.max_prompt_length, run.rollout
    prompts = [Prompt(id=i, tokens=(i,) * length) for i in range(rollout.prompts_per_step)]
    sampling = SamplingParams(max_new_tokens=rollout.max_new_tokens, num_samples=rollout.group_size, seed=1)
    rollouts = [each for group in engine.generate(prompts, sampling) for each in group.rollouts]
    assert policy.router_replay is not None
    data = ExperienceBatches(
        batch=run.batch,
        layout=batch_layout(run, dp_rank=context.dp_rank, dp_size=context.dp_size),
        max_length=rollout.max_new_tokens,
        pad_id=0,
        mask_truncated=False,
        experts_shape=policy.router_replay.shape,
    ).lay_out([_response(each) for each in rollouts[: run.batch.global_size]])
    parallel_state.destroy_model_parallel()
    assert data is not None
    told = sum(each.experts.nbytes for each in rollouts if each.experts is not None)
    return Experts(told=told, batched=sum(b.experts.nbytes for b in data.batches if b.experts is not None))


def _response(rollout: Rollout) -> Response:
    row = PromptRow(tokens=rollout.prompt_tokens, values={}, source="rows.jsonl:1")
    scored = Scored(reward=0.0, lenient=0.0, parts=())
    return Response(
        group=0, row=row, rollout=rollout, scored=scored, advantage=1.0, old_logprobs=rollout.logprobs
    )


MIXTURE = {"family": "qwen3_moe", "experts_per_token": 2, "num_layers": 2}
REPLAYS = {
    "bytes": Generation(model={**MIXTURE, "num_experts": 4}, world_size=2, parallel={"ep": 2}),
    "two bytes": Generation(model={**MIXTURE, "num_experts": 260, "ffn_hidden_size": 8}),
}


@pytest.mark.parametrize("name", cases(REPLAYS, rarely=["two bytes"]))
def test_the_experts_of_router_replay_are_planned_to_the_byte(name: str) -> None:
    case = replace(REPLAYS[name], max_prompt_length=5, max_new_tokens=4, rollout={"router_replay": True})
    run = make_run(case)
    assert run.model.architecture is not None
    architecture, grid = from_section(run.model.architecture), grid_of(run.parallel, case.world_size)
    planned = plan_memory(architecture, run, grid, Hardware(gpu_memory=80e9, gpus_per_node=1)).host_experts
    held = run_ranks(case.world_size, measure_experts, run)
    assert [each.told + each.batched for each in held] == [planned] * case.world_size
    assert held[0].told == 16 * 8 * 2 * 2 * (2 if name == "two bytes" else 1)
