"""What vLLM tells of a response, without vLLM: its experts come with the last token, or not at all."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_sftrl.models.architecture import Architecture, from_section
from megatron_sftrl.rollout.api import Stops
from megatron_sftrl.rollout.vllm import _Answer, with_experts
from megatron_sftrl.types import Prompt, SamplingParams
from tests.unit.rollout.test_build import config_of

PROMPT = Prompt(id=1, tokens=(5, 6, 7))
END = 2


def mixture() -> Architecture:
    """Two choices among four experts in each layer."""
    config = config_of({}, family="qwen3_moe", num_experts=4, experts_per_token=2)
    assert config.model.architecture is not None
    return from_section(config.model.architecture)


def told(token: int, *, experts: np.ndarray | None = None) -> Any:
    """One new token."""
    completion = SimpleNamespace(
        token_ids=[token],
        logprobs=[{token: SimpleNamespace(logprob=-0.5)}],
        finish_reason=None if experts is None else "stop",
        routed_experts=experts,
    )
    return SimpleNamespace(outputs=[completion], finished=experts is not None)


def answered(experts: np.ndarray | None) -> _Answer:
    answer, stops = _Answer(), Stops(SamplingParams(stop_ids=frozenset({END})), None)
    for output in (told(8), told(9), told(END, experts=experts)):
        answer.take(output, stops)
    return answer


def test_a_rollout_has_the_experts_of_every_token_but_the_last() -> None:
    architecture = mixture()
    experts = np.arange(5 * architecture.num_layers * 2, dtype=np.uint8).reshape(
        5, architecture.num_layers, 2
    )
    answer = answered(experts)
    rollout = with_experts(answer.rollout(PROMPT), answer.experts, architecture)
    assert rollout.response_tokens == (8, 9, END)
    assert rollout.experts is not None
    np.testing.assert_array_equal(rollout.experts, experts[:, list(architecture.layers_with_experts)])


@pytest.mark.parametrize("num_tokens", [None, 4, 6])
def test_experts_of_other_tokens_are_found(num_tokens: int | None) -> None:
    architecture = mixture()
    shape = None if num_tokens is None else (num_tokens, architecture.num_layers, 2)
    answer = answered(None if shape is None else np.zeros(shape, np.uint8))
    with pytest.raises(RuntimeError, match=r"expected vLLM's experts of \(5, \d, 2\)"):
        with_experts(answer.rollout(PROMPT), answer.experts, architecture)
