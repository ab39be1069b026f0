"""vLLM's numbers of experts are the trainer's, layer by layer, and what becomes of its own record of them."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from megatron_sftrl.types import Prompt, SamplingParams
from tests.contract.models import save_versions
from tests.contract.rollout_contract import GREEDY, MAX_LENGTH, PROMPTS
from tests.distributed.engine_outputs import _loaded_policy, _packed, engine_config
from tests.grid import cases
from tests.ranks import run_ranks
from tests.unit.rollout.test_vllm_answers import END, mixture, told

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


def experts_of_both(
    directory: Path, dtype: str = "fp32", prompts: Sequence[Prompt] = PROMPTS
) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    """Of a response to each prompt: vLLM's experts of its tokens as a rollout has them, and the trainer's."""
    import torch
    from megatron.core import parallel_state
    from vllm.model_executor.layers.fused_moe.routed_experts_capturer import bind_routed_experts_capturer

    from megatron_sftrl.engine.router_replay import RouterReplay
    from megatron_sftrl.models import architecture_of
    from megatron_sftrl.rollout.vllm import beside_trainer, with_experts
    from megatron_sftrl.rollout.vllm_settings import VllmSettings
    from megatron_sftrl.trainers.experience import ask_logprobs

    config = engine_config(directory, {}, dtype)
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
    for prompt in prompts:
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
@pytest.mark.parametrize(
    "model",
    cases(["qwen3_moe", "glm4_moe", "minimax_m2", "gpt_oss"], rarely=["glm4_moe", "minimax_m2", "gpt_oss"]),
)
def test_vllm_chooses_the_experts_that_the_trainer_chooses(model: str, tmp_path: Path) -> None:
    """fp32; the first layer of a glm4_moe has no experts."""
    (directory,) = save_versions(model, tmp_path, num_versions=1).directories
    (found,) = run_ranks(1, experts_of_both, directory, timeout_s=300)
    assert len(found) == len(PROMPTS)
    for theirs, ours in found:
        assert len(ours) > GREEDY.max_new_tokens - 1
        np.testing.assert_array_equal(np.sort(theirs, axis=2), np.sort(ours, axis=2))


class OneByOne:
    """In the place of vLLM's loop: a step ends one response, the last one that was asked first."""

    def __init__(self, experts: NDArray[np.uint8]) -> None:
        self._waiting: list[str] = []
        self._experts = experts

    def add_request(self, number: str, *_: object) -> None:
        self._waiting.append(number)

    def has_unfinished_requests(self) -> bool:
        return bool(self._waiting)

    def step(self) -> list[Any]:
        number = self._waiting.pop()
        output = told(END, experts=self._experts + int(number))
        output.request_id = number
        return [output]


@needs_vllm
def test_a_response_has_its_experts_when_it_is_told_before_the_others_have_ended() -> None:
    """As generators elsewhere send it."""
    from megatron_sftrl.rollout.vllm import VllmEngine
    from megatron_sftrl.rollout.vllm_settings import VllmSettings

    engine, architecture = VllmEngine.__new__(VllmEngine), mixture()
    prompt = Prompt(id=1, tokens=(5, 6, 7))
    experts = np.zeros((3, architecture.num_layers, 2), np.uint8)
    engine._architecture, engine._decode, engine._progress = architecture, None, None
    engine._settings = VllmSettings(tp=1, max_model_len=8, max_num_seqs=2, returns_experts=True)
    engine._llm = SimpleNamespace(llm_engine=OneByOne(experts))  # type: ignore[assignment]
    heard: list[tuple[int, Any]] = []
    sampling = SamplingParams(max_new_tokens=4, stop_ids=frozenset({END}), seed=1)
    given = engine._answer([(prompt, 0), (prompt, 1)], sampling, lambda *each: heard.append(each))
    assert [number for number, _ in heard] == [1, 0]
    for number, rollout in heard:
        np.testing.assert_array_equal(rollout.experts, experts + number)
        np.testing.assert_array_equal(given[number].experts, experts + number)
