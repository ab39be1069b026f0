"""Generation with a cache of keys and values gives the tokens of generation that runs every prefix again."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import torch

from megatron_sftrl.types import Prompt, RolloutGroup, SamplingParams
from tests.contract.models import VOCAB_SIZE, save_versions
from tests.distributed.engine_outputs import engine_config
from tests.distributed.te_layers import copy_into_fused_layers, layers_like_transformer_engines
from tests.ranks import run_ranks

if TYPE_CHECKING:
    from megatron_sftrl.engine.parallel import ParallelContext
    from megatron_sftrl.engine.policy import PolicyEngine

MODELS = ("mistral", "qwen2", "qwen2_window", "qwen3")
SAMPLING = SamplingParams(max_new_tokens=24, num_samples=2, seed=3, stop_ids=frozenset({5, 6, 7}))
# The same sums in fp32 in another order; log-probabilities near -4.6.
SAME_NATS = 2e-6


@dataclass(frozen=True)
class Generated:
    """Of one kind of layers: with and without a cache, and how many steps ran new tokens alone."""

    cached: list[RolloutGroup]
    again: list[RolloutGroup]
    num_cached_steps: int


def prompts() -> list[Prompt]:
    generator = torch.Generator().manual_seed(0)
    return [
        Prompt(id=number, tokens=tuple(torch.randint(VOCAB_SIZE, (size,), generator=generator).tolist()))
        for number, size in enumerate((1, 12, 5))
    ]


@contextlib.contextmanager
def both_kinds(
    directory: Path, parallel: dict[str, Any], dtype: str = "fp32"
) -> Iterator[tuple[ParallelContext, dict[str, PolicyEngine]]]:
    """One model with torch's layers, and with layers that are built like Transformer Engine's."""
    from megatron.core import parallel_state

    from megatron_sftrl.engine.parallel import initialize_parallel
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.models import architecture_of
    from tests.contract.rollout_contract import load

    config = engine_config(directory, parallel, dtype)
    context = initialize_parallel(config.parallel)
    architecture = architecture_of(config.model)
    local = PolicyEngine(architecture, config, context, with_optimizer=False)
    load(local, directory)
    with layers_like_transformer_engines():
        fused = PolicyEngine(architecture, config, context, with_optimizer=False)
        for ours, theirs in zip(local.chunks, fused.chunks, strict=True):
            copy_into_fused_layers(ours, theirs)
        yield context, {"local": local, "transformer_engine": fused}
    parallel_state.destroy_model_parallel()


def both_ways(policy: PolicyEngine) -> Generated:
    from megatron_sftrl.rollout import in_process
    from megatron_sftrl.rollout.in_process import InProcessEngine

    engine = InProcessEngine(policy.parallel, max_responses=4)
    engine.update(policy, version=0)
    with mock.patch.object(in_process, "pack_new_tokens", wraps=in_process.pack_new_tokens) as packed:
        cached = engine.generate(prompts(), SAMPLING)
    with mock.patch.object(in_process, "why_no_cache", return_value="a test says so"):
        again = engine.generate(prompts(), SAMPLING)
    return Generated(cached=cached, again=again, num_cached_steps=packed.call_count)


def generated(directories: list[Path], parallel: dict[str, Any]) -> list[dict[str, Generated]]:
    """On one rank, of each model and kind of layers."""
    found = []
    for directory in directories:
        with both_kinds(directory, parallel) as (_, policies):
            for kind, policy in policies.items():
                assert policy.config.transformer_impl == kind
            found.append({kind: both_ways(policy) for kind, policy in policies.items()})
    return found


def assert_same(ours: list[RolloutGroup], theirs: list[RolloutGroup], what: str) -> None:
    for one, other in zip(ours, theirs, strict=True):
        for mine, yours in zip(one.rollouts, other.rollouts, strict=True):
            assert mine.response_tokens == yours.response_tokens, what
            assert mine.logprobs == pytest.approx(yours.logprobs, abs=SAME_NATS), what


@pytest.mark.parametrize(
    ("world_size", "parallel", "models"),
    [
        (1, {}, (*MODELS, "mixtral", "qwen3_moe")),
        (2, {"tp": 2, "sequence_parallel": True}, ("qwen2_window", "qwen3", "mixtral")),
        (2, {"pp": 2}, ("qwen2_window", "qwen3", "mixtral")),
    ],
    ids=["one", "tp2", "pp2"],
)
def test_a_cache_changes_no_token_whichever_layers(
    tmp_path: Path, world_size: int, parallel: dict[str, Any], models: tuple[str, ...]
) -> None:
    directories = [save_versions(name, tmp_path, num_versions=1).directories[0] for name in models]
    for found in run_ranks(world_size, generated, directories, parallel):
        for name, kinds in zip(models, found, strict=True):
            for kind, each in kinds.items():
                assert each.num_cached_steps >= SAMPLING.max_new_tokens - 1, f"{name}: no cache was used"
                assert_same(each.cached, each.again, f"{name} with layers of {kind}")
                lengths = {len(rollout.response_tokens) for group in each.cached for rollout in group.rollouts}
                assert len(lengths) > 1, f"{name}: all responses have one length: blind to their ends"
            assert_same(kinds["local"].cached, kinds["transformer_engine"].cached, f"{name}: both kinds")


def keys_of_prompt_and_of_decoding(directory: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """bf16 keys of the first layer at the last token of 32 sequences: run as a whole, and as a new token."""
    from megatron_sftrl.engine.kv_cache import KvCache
    from megatron_sftrl.engine.next_token import next_tokens
    from megatron_sftrl.rollout.in_process import pack_new_tokens, pack_prefixes

    generator = torch.Generator().manual_seed(0)
    sequences = [
        tuple(torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist()) for length in range(2, 34)
    ]
    last = torch.tensor([len(each) - 1 for each in sequences])

    def run(policy: PolicyEngine, packed: Any) -> None:
        batches, rows, places = packed
        uniforms = torch.zeros(len(sequences), dtype=torch.float64)
        with policy.evaluation():
            next_tokens(policy, batches, rows, uniforms, SAMPLING, places=places)

    found = {}
    with both_kinds(directory, {}, "bf16") as (context, policies):
        for kind, policy in policies.items():
            whole, stepwise = (KvCache(num_slots=len(sequences), max_length=64) for _ in range(2))
            run(policy, pack_prefixes(dict(enumerate(sequences)), context, whole))
            run(policy, pack_prefixes({i: each[:-1] for i, each in enumerate(sequences)}, context, stepwise))
            tokens = [each[-1] for each in sequences]
            run(policy, pack_new_tokens(tokens, last.tolist(), context, stepwise))
            one, other = (
                cache._layers[1][0][torch.arange(len(sequences)), :, last] for cache in (whole, stepwise)
            )
            found[kind] = (one, other)
    return found


def test_a_new_tokens_keys_are_rounded_as_the_layers_round_them(tmp_path: Path) -> None:
    """Norm, projection, norm of the keys and rope: any rounding more or less moves a tenth of bf16 numbers."""
    directory = save_versions("qwen3", tmp_path, num_versions=1).directories[0]
    found = run_ranks(1, keys_of_prompt_and_of_decoding, directory)[0]
    for kind, (whole, stepwise) in found.items():
        assert (whole == 0).float().mean() < 0.01, "a cache that was never written to is equal, too"
        assert (whole != stepwise).float().mean() < 0.01, kind
    assert (found["local"][0] != found["transformer_engine"][0]).float().mean() > 0.1, "a blind test"


def warnings_of_engine(directory: Path, parallel: dict[str, Any]) -> list[str]:
    """What an engine says in two updates."""
    from megatron_sftrl.rollout import in_process
    from megatron_sftrl.rollout.in_process import InProcessEngine

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    in_process.LOGGER.addHandler(handler)
    try:
        with both_kinds(directory, parallel) as (context, policies):
            engine = InProcessEngine(context, max_responses=4)
            for version in range(2):
                engine.update(policies["local"], version=version)
    finally:
        in_process.LOGGER.removeHandler(handler)
    return said


def test_an_engine_without_a_cache_says_so_once_with_the_remedy(tmp_path: Path) -> None:
    directory = save_versions("qwen2", tmp_path, num_versions=1).directories[0]
    assert run_ranks(1, warnings_of_engine, directory, {}) == [[]]
    (said,), silent = run_ranks(2, warnings_of_engine, directory, {"cp": 2})
    assert "since parallel.cp is 2: every token runs its whole prefix again" in said
    assert "rollout.engine: vllm" in said
    assert silent == []
