"""Generation in process that finds no memory says what to change."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_sftrl.types import Prompt, SamplingParams


def generate_with(error: Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's generate(), in which the forward raises; torch's own error of the CPU by None."""
    from megatron_sftrl.rollout import in_process

    def forward(*_: object, **__: object) -> None:
        if error is not None:
            raise error
        torch.empty(2**60, dtype=torch.uint8)  # more than any address space

    monkeypatch.setattr(in_process, "generate_in_flight", forward)
    places = {"dp_rank": 0, "tp_rank": 0, "pp_rank": 0, "cp_rank": 0}
    sizes = {"dp_size": 1, "tp_size": 1, "pp_size": 1, "cp_size": 1}
    parallel: Any = SimpleNamespace(rank=0, **places, **sizes)
    architecture = SimpleNamespace(max_position_embeddings=64, vocab_size=8)
    config = SimpleNamespace(context_parallel_size=1, fp8=None, fp4=None)
    policy: Any = SimpleNamespace(architecture=architecture, config=config)
    engine = in_process.InProcessEngine(parallel, max_responses=7)
    engine.update(policy, version=0)
    engine.generate([Prompt(id=0, tokens=(1,))], SamplingParams(max_new_tokens=4))


@pytest.mark.parametrize("error", [None, torch.OutOfMemoryError("CUDA out of memory")], ids=["CPU", "CUDA"])
def test_not_enough_memory_says_what_to_change(
    error: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeError, match="not enough memory to generate up to 7 responses") as caught:
        generate_with(error, monkeypatch)
    assert "lower the length of responses or, for `sftrl grpo`, rollout.max_concurrent" in str(caught.value)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_another_error_keeps_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="shapes do not match") as caught:
        generate_with(RuntimeError("shapes do not match"), monkeypatch)
    assert "not enough memory" not in str(caught.value)
