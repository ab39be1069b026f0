"""Transformer Engine's own layers with a cache: a new token alone is what it is in the whole sequence."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from unittest import mock

import pytest
import torch

from megatron_sftrl.types import Prompt, SamplingParams
from tests.contract.models import save_versions
from tests.distributed.engine_outputs import engine_config
from tests.distributed.test_cached_generation import assert_equal_in_bf16, last_tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or importlib.util.find_spec("transformer_engine") is None,
        reason="needs a CUDA device and Transformer Engine",
    ),
]


# Windows of 16 in sequences of up to 33; biases; norms of queries and keys; experts in grouped products.
@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe"])
def test_a_new_token_is_what_it_is_in_the_whole_sequence(name: str, tmp_path: Path) -> None:
    from megatron_sftrl.engine.parallel import parallel_context
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.models import architecture_of
    from megatron_sftrl.rollout import in_process
    from tests.contract.rollout_contract import load

    (directory,) = save_versions(name, tmp_path, num_versions=1).directories
    config = engine_config(directory, {}, "bf16")
    with parallel_context(config.parallel) as parallel:
        policy = PolicyEngine(architecture_of(config.model), config, parallel, with_optimizer=False)
        assert policy.config.transformer_impl == "transformer_engine"
        load(policy, directory)
        # Kernels for one row and for many sum in different orders, and a token may meet another expert.
        apart = 0.2 if policy.architecture.mixture is not None else 0.02
        assert_equal_in_bf16(*last_tokens(policy), name, flipped=0.05, apart=apart)
        engine = in_process.InProcessEngine(parallel, max_responses=4)
        engine.update(policy, version=0)
        prompts = [Prompt(id=i, tokens=tuple(range(1, 2 + 5 * i))) for i in range(3)]
        with mock.patch.object(in_process, "pack_new_tokens", wraps=in_process.pack_new_tokens) as packed:
            groups = engine.generate(prompts, SamplingParams(max_new_tokens=8, num_samples=2))
        assert packed.call_count >= 7
        assert {len(each.response_tokens) for group in groups for each in group.rollouts} == {8}
