"""In which order an engine gives its memory back and takes it again."""

from __future__ import annotations

import pytest
import torch

from megatron_sftrl.rollout.vllm import EngineMemory


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was called, torch's cache included, which is emptied on CUDA only."""
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("torch gives back"))
    return calls


def memory(calls: list[str], *, is_cuda: bool) -> EngineMemory:
    return EngineMemory(
        sleep=lambda: calls.append("sleep"), wake=lambda part: calls.append(part), is_cuda=is_cuda
    )


def test_weights_wake_before_the_cache_and_torch_gives_back_what_it_keeps_before_each(
    calls: list[str],
) -> None:
    engine = memory(calls, is_cuda=True)
    engine.wake("weights")
    engine.wake("kv_cache")
    assert calls == [], "an engine that is awake was woken"
    engine.sleep()
    engine.sleep()
    with pytest.raises(AssertionError, match="weights wake before the cache"):
        engine.wake("kv_cache")
    for _ in range(2):
        engine.wake("weights")
    engine.wake("kv_cache")
    assert calls == ["sleep", "torch gives back", "weights", "torch gives back", "kv_cache"]


def test_an_engine_that_woke_in_part_sleeps_again(calls: list[str]) -> None:
    engine = memory(calls, is_cuda=True)
    engine.sleep()
    engine.wake("weights")
    engine.sleep()
    assert calls.count("sleep") == 2


def test_a_part_that_found_no_memory_stays_asleep(calls: list[str]) -> None:
    def fail(part: str) -> None:
        raise torch.OutOfMemoryError(part)

    engine = EngineMemory(sleep=lambda: None, wake=fail, is_cuda=True)
    engine.sleep()
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            engine.wake("weights")


def test_on_the_cpu_nothing_is_asked_of_the_engine(calls: list[str]) -> None:
    engine = memory(calls, is_cuda=False)
    engine.sleep()
    engine.wake("weights")
    engine.wake("kv_cache")
    assert calls == []
