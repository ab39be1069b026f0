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

from megatron_sftrl.models import architecture_of
from megatron_sftrl.types import Prompt, RolloutGroup, SamplingParams
from tests.contract.models import VOCAB_SIZE, save_versions
from tests.distributed.engine_outputs import _greedy, _loaded_policy, engine_config
from tests.distributed.hf_models import save_model
from tests.distributed.te_layers import copy_into_fused_layers, layers_like_transformer_engines
from tests.grid import HOW_TO_RUN_ALL, cases, is_full
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
    """Of one kind of layers: with and without a cache.

    Args:
        num_cached_steps: ran new tokens alone.
        num_runs: the most that attention read in one of them.
        num_sorted: times that responses were given other slots.
    """

    cached: list[RolloutGroup]
    again: list[RolloutGroup]
    num_cached_steps: int
    num_runs: int
    num_sorted: int


# Their greedy tokens are held against transformers' in test_families_against_transformers.py.
OTHERS = ("olmo3", "granite", "phi3", "ministral3", "qwen2_moe", "glm4", "gemma3_text", "minimax_m2")
"""Of blocks that Transformer Engine's specification is changed for."""


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
    from megatron_sftrl.engine import kv_cache
    from megatron_sftrl.rollout import in_process
    from megatron_sftrl.rollout.in_process import InProcessEngine

    engine = InProcessEngine(policy.parallel, max_responses=4)
    engine.update(policy, version=0)
    steps: list[int] = []

    def packed(*arguments: Any) -> in_process.Packed:
        made = pack_new_tokens(*arguments)
        steps.append(max(len(each.runs) for each in made[2]))
        return made

    pack_new_tokens, reorder = in_process.pack_new_tokens, mock.Mock(wraps=kv_cache.KvCache.reorder)
    with (
        mock.patch.object(kv_cache, "_SHORT", 4),
        mock.patch.object(in_process, "pack_new_tokens", packed),
        mock.patch.object(kv_cache.KvCache, "reorder", lambda *arguments: reorder(*arguments)),
    ):
        cached = engine.generate(prompts(), SAMPLING)
    with mock.patch.object(in_process, "why_no_cache", return_value="a test says so"):
        again = engine.generate(prompts(), SAMPLING)
    return Generated(
        cached=cached,
        again=again,
        num_cached_steps=len(steps),
        num_runs=max(steps),
        num_sorted=reorder.call_count,
    )


def generated(directories: list[Path], parallel: dict[str, Any]) -> list[dict[str, Generated]]:
    """On one rank, of each model and kind of layers."""
    found = []
    for directory in directories:
        with both_kinds(directory, parallel) as (_, policies):
            for kind, policy in policies.items():
                assert policy.config.transformer_impl == kind
            found.append({kind: both_ways(policy) for kind, policy in policies.items()})
    return found


def assert_same(
    ours: list[RolloutGroup], theirs: list[RolloutGroup], what: str, *, nats: float = SAME_NATS
) -> None:
    for one, other in zip(ours, theirs, strict=True):
        for mine, yours in zip(one.rollouts, other.rollouts, strict=True):
            assert mine.response_tokens == yours.response_tokens, what
            assert mine.logprobs == pytest.approx(yours.logprobs, abs=nats), what


@pytest.mark.parametrize(
    ("world_size", "parallel", "models"),
    [
        (1, {}, (*MODELS, "mixtral", "qwen3_moe", *(OTHERS if is_full() else ()))),
        (2, {"tp": 2, "sequence_parallel": True}, ("qwen2_window", "qwen3", "mixtral")),
        pytest.param(
            2,
            {"pp": 2},
            ("qwen2_window", "qwen3", "mixtral"),
            marks=pytest.mark.skipif(not is_full(), reason=HOW_TO_RUN_ALL),
        ),
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
                assert each.num_runs > 1, f"{name}: all were read to one length"
                assert each.num_sorted > 0, f"{name}: responses kept their slots"
                assert_same(each.cached, each.again, f"{name} with layers of {kind}")
                lengths = {
                    len(rollout.response_tokens) for group in each.cached for rollout in group.rollouts
                }
                assert len(lengths) > 1, f"{name}: all responses have one length: blind to their ends"
            assert_same(kinds["local"].cached, kinds["transformer_engine"].cached, f"{name}: both kinds")


@dataclass(frozen=True)
class LastTokens:
    """What a run of 32 sequences leaves of the last token of each, on the CPU.

    Args:
        kept: of each layer, [2, 32, groups, head_dim] keys and values in the cache.
        logprobs: [32] nats of the likeliest next token.
    """

    kept: list[torch.Tensor]
    logprobs: torch.Tensor

    @property
    def first_keys(self) -> torch.Tensor:
        return self.kept[0][0]


def last_tokens(policy: PolicyEngine) -> tuple[LastTokens, LastTokens]:
    """As part of the whole sequence, and as a new token behind the others; of a model on one rank."""
    from megatron_sftrl.engine.kv_cache import KvCache
    from megatron_sftrl.engine.next_token import next_tokens
    from megatron_sftrl.rollout.in_process import pack_new_tokens, pack_prefixes

    generator = torch.Generator().manual_seed(0)
    sequences = [
        tuple(torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist()) for length in range(2, 34)
    ]
    places = [len(each) - 1 for each in sequences]
    greedy = SamplingParams(temperature=0.0, max_new_tokens=1)
    # A new token is run with more room than the sequences need, as in the middle of a response.
    whole, stepwise = (KvCache(num_slots=len(sequences), max_length=64) for _ in range(2))
    parallel, uniforms = policy.parallel, torch.zeros(len(sequences), dtype=torch.float64)

    def run(packed: Any, cache: KvCache) -> LastTokens:
        batches, rows, slots = packed
        with policy.evaluation():
            drawn = next_tokens(policy, batches, rows, uniforms, greedy, places=slots)
        kept = [
            torch.stack(pair)[:, range(len(sequences)), :, places].cpu() for pair in cache._layers.values()
        ]
        return LastTokens(kept=kept, logprobs=drawn.logprobs.cpu())

    at_once = run(pack_prefixes(dict(enumerate(sequences)), parallel, whole), whole)
    run(pack_prefixes({i: each[:-1] for i, each in enumerate(sequences)}, parallel, stepwise), stepwise)
    news = [each[-1] for each in sequences]
    return at_once, run(pack_new_tokens(news, places, parallel, stepwise), stepwise)


def last_tokens_of_both_kinds(directory: Path) -> dict[str, tuple[LastTokens, LastTokens]]:
    with both_kinds(directory, {}, "bf16") as (_, policies):
        return {kind: last_tokens(policy) for kind, policy in policies.items()}


def assert_equal_in_bf16(
    at_once: LastTokens, alone: LastTokens, what: str, *, flipped: float, apart: float = 0.02
) -> None:
    """Norm, projection, norm of the keys and rope: a rounding more or less moves a tenth of bf16 numbers.

    Args:
        flipped: share of the first layer's keys that sums in another order may round otherwise.
        apart: most relative difference of a layer's keys and values, and of log-probabilities in nats.
    """
    assert (at_once.first_keys == 0).float().mean() < 0.01, "a cache that was never written to is equal, too"
    assert (at_once.first_keys != alone.first_keys).float().mean() < flipped, what
    for ours, theirs in zip(at_once.kept, alone.kept, strict=True):
        assert (ours - theirs).float().norm() < apart * ours.float().norm(), what
    torch.testing.assert_close(at_once.logprobs, alone.logprobs, rtol=0, atol=apart)


@pytest.mark.parametrize("model", cases(["qwen3", "minimax_m2"], rarely=["minimax_m2"]))
def test_a_new_token_is_rounded_as_the_layers_round_it(tmp_path: Path, model: str) -> None:
    directory = save_versions(model, tmp_path, num_versions=1).directories[0]
    found = run_ranks(1, last_tokens_of_both_kinds, directory)[0]
    for kind, (at_once, alone) in found.items():
        assert_equal_in_bf16(at_once, alone, kind, flipped=0.01)
    keys = {kind: at_once.first_keys for kind, (at_once, _) in found.items()}
    # Transformer Engine's fused rope is rounded once.
    assert (keys["local"] != keys["transformer_engine"]).float().mean() > 0.02, "a blind test"


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


def one_response(directory: Path, parallel: dict[str, Any]) -> tuple[int, ...]:
    """Greedy, alone: under a pipeline of two stages the second micro-batch has none."""
    from megatron.core import parallel_state

    config = engine_config(directory, parallel, "fp32")
    _, policy = _loaded_policy(config, architecture_of(config.model))
    (tokens,) = _greedy(policy, [(5, 9, 3)], 6)
    parallel_state.destroy_model_parallel()
    return tokens


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_5_text"])
def test_a_pipeline_with_more_micro_batches_than_responses_goes_on(tmp_path: Path, name: str) -> None:
    """Values of another width than keys, gates on what is attended to: where there is nothing, too."""
    save_model(name, tmp_path)
    (alone,) = run_ranks(1, one_response, tmp_path, {})
    assert run_ranks(2, one_response, tmp_path, {"pp": 2}) == [alone, alone]
