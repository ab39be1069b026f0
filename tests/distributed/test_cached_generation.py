"""Generation with a cache of keys and values gives the tokens of generation that runs every prefix anew."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch

from megatron_sftrl.types import Prompt, RolloutGroup, SamplingParams
from tests.contract.models import VOCAB_SIZE, save_versions
from tests.distributed.engine_outputs import engine_config
from tests.ranks import run_ranks

MODELS = ("mistral", "qwen2", "qwen2_window", "qwen3")
SAMPLING = SamplingParams(max_new_tokens=24, num_samples=2, seed=3, stop_ids=frozenset({5, 6, 7}))


def both_ways(directories: list[Path]) -> list[tuple[list[RolloutGroup], list[RolloutGroup], int]]:
    """On one rank, of each model: responses with and without cache, and how many tokens a cached step ran."""
    from megatron.core import parallel_state

    from megatron_sftrl.engine.parallel import initialize_parallel
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.models import architecture_of
    from megatron_sftrl.rollout import in_process
    from megatron_sftrl.rollout.in_process import InProcessEngine
    from tests.contract.rollout_contract import load

    generator = torch.Generator().manual_seed(0)
    prompts = [
        Prompt(id=number, tokens=tuple(torch.randint(VOCAB_SIZE, (size,), generator=generator).tolist()))
        for number, size in enumerate((1, 12, 5))
    ]
    found = []
    for directory in directories:
        config = engine_config(directory, {}, "fp32")
        context = initialize_parallel(config.parallel)
        policy = PolicyEngine(architecture_of(config.model), config, context, with_optimizer=False)
        load(policy, directory)
        engine = InProcessEngine(context, max_responses=4)
        engine.update(policy, version=0)
        with mock.patch.object(in_process, "pack_new_tokens", wraps=in_process.pack_new_tokens) as packed:
            cached = engine.generate(prompts, SAMPLING)
        with mock.patch.object(policy.config, "transformer_impl", "transformer_engine"):
            anew = engine.generate(prompts, SAMPLING)
        found.append((cached, anew, packed.call_count))
        parallel_state.destroy_model_parallel()
    return found


def test_a_cache_changes_no_token(tmp_path: Path) -> None:
    directories = [save_versions(name, tmp_path, num_versions=1).directories[0] for name in MODELS]
    found = run_ranks(1, both_ways, directories)[0]
    for name, (cached, anew, num_cached_steps) in zip(MODELS, found, strict=True):
        assert num_cached_steps >= SAMPLING.max_new_tokens - 1, f"{name}: the cache was not used"
        for ours, theirs in zip(cached, anew, strict=True):
            for one, other in zip(ours.rollouts, theirs.rollouts, strict=True):
                assert one.response_tokens == other.response_tokens, name
                # The same sums in fp32 in another order; log-probabilities near -4.6.
                assert one.logprobs == pytest.approx(other.logprobs, abs=2e-6), name
        lengths = {len(rollout.response_tokens) for group in cached for rollout in group.rollouts}
        assert len(lengths) > 1, f"{name}: all responses have one length: the test is blind to their ends"
