"""vLLM's numbers of experts are the trainer's, layer by layer, and what becomes of its own record of them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.contract.models import save_versions
from tests.contract.rollout_contract import GREEDY, MAX_LENGTH, PROMPTS
from tests.distributed.engine_outputs import _loaded_policy, _packed, engine_config
from tests.grid import cases
from tests.ranks import run_ranks

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not here: bash tests/oracles.sh installs it"
)


class Listener:
    """In the place of vLLM's capturer, whose record is of GPUs alone: what each router says, in order."""

    def __init__(self, num_layers: int, num_choices: int) -> None:
        self._heard: dict[int, list[NDArray[Any]]] = {}
        self._shape = (num_layers, num_choices)

    def capture(self, layer_id: int, topk_ids: Any) -> None:
        self._heard.setdefault(layer_id, []).append(topk_ids.cpu().numpy().copy())

    def take(self) -> NDArray[np.uint8]:
        """[n, all layers, k] since the last call, 0 for layers without experts, as vLLM's record has it."""
        of_layers = {layer: np.concatenate(parts) for layer, parts in self._heard.items()}
        self._heard = {}
        told = np.zeros((len(next(iter(of_layers.values()))), *self._shape), np.uint8)
        for layer, experts in of_layers.items():
            told[:, layer] = experts
        return told


def experts_of_both(directory: Path) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    """Of a response to each prompt: vLLM's experts of its tokens as a rollout has them, and the trainer's."""
    import torch
    from megatron.core import parallel_state
    from vllm.model_executor.layers.fused_moe.routed_experts_capturer import bind_routed_experts_capturer

    from megatron_sftrl.engine.router_replay import RouterReplay
    from megatron_sftrl.models import architecture_of
    from megatron_sftrl.rollout.vllm import beside_trainer, with_experts
    from megatron_sftrl.rollout.vllm_settings import VllmSettings
    from megatron_sftrl.trainers.experience import ask_logprobs

    config = engine_config(directory, {}, "fp32")
    architecture = architecture_of(config.model)
    context, policy = _loaded_policy(config, architecture)
    policy.router_replay = RouterReplay(policy.chunks, architecture, context)
    settings = VllmSettings(tp=1, max_model_len=MAX_LENGTH, max_num_seqs=7, enable_prefix_caching=False)
    engine = beside_trainer(policy, settings)
    engine.update(policy, version=0)
    assert architecture.mixture is not None
    listener = Listener(architecture.num_layers, architecture.mixture.experts_per_token)
    bind_routed_experts_capturer(engine._model, listener)  # type: ignore[arg-type]
    found = []
    for prompt in PROMPTS:
        (group,) = engine.generate([prompt], GREEDY)
        rollout = with_experts(group.rollouts[0], listener.take(), architecture)
        whole = torch.tensor([*rollout.prompt_tokens, *rollout.response_tokens])
        batch = _packed(whole[:-1], [len(whole) - 1], labels=whole[1:])
        with policy.evaluation():
            _, (ours,) = policy.router_replay.recorded(
                lambda batch=batch: policy.token_numbers([batch], ask_logprobs), [batch]
            )
        assert rollout.experts is not None
        found.append((rollout.experts, ours))
    engine.close()
    parallel_state.destroy_model_parallel()
    return found


@needs_vllm
@pytest.mark.parametrize("model", cases(["qwen3_moe", "glm4_moe"], rarely=["glm4_moe"]))
def test_vllm_chooses_the_experts_that_the_trainer_chooses(model: str, tmp_path: Path) -> None:
    """fp32; the first layer of a glm4_moe has no experts."""
    (directory,) = save_versions(model, tmp_path, num_versions=1).directories
    (found,) = run_ranks(1, experts_of_both, directory, timeout_s=300)
    assert len(found) == len(PROMPTS)
    for theirs, ours in found:
        assert len(ours) > GREEDY.max_new_tokens - 1
        np.testing.assert_array_equal(np.sort(theirs, axis=2), np.sort(ours, axis=2))
