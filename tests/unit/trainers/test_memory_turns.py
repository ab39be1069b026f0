"""Who has the memory when, and what each turn took of it."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_sftrl.engine.policy import PolicyEngine
from megatron_sftrl.trainers import engine_updates
from megatron_sftrl.trainers.engine_updates import EngineUpdates


class Recorder:
    """Stands for the engine and for the training state."""

    last_report = None

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: self.calls.append(name)


def updates_of(both: Recorder, *, offload: bool, device: str = "cpu") -> EngineUpdates:
    policy: Any = object.__new__(PolicyEngine)
    policy.training_state = both
    policy.parallel = SimpleNamespace(device=torch.device(device))
    policy.gather_parameters = lambda: None
    config: Any = SimpleNamespace(rollout=SimpleNamespace(engine="in_process", offload=offload))
    nothing: Any = None
    engine: Any = both
    return EngineUpdates(config, engine, policy, (), nothing, nothing)


def turn(updates: EngineUpdates) -> None:
    with updates.engine_turn(0, timed=nullcontext()):
        pass


def test_one_leaves_before_the_other_comes() -> None:
    both = Recorder()
    updates = updates_of(both, offload=True)
    turn(updates)
    assert both.calls == ["leave", "update", "sleep", "come_back"]
    assert updates.numbers() == {}


def test_without_offload_the_trainer_stays() -> None:
    engine = Recorder()
    turn(updates_of(engine, offload=False))
    assert engine.calls == ["update", "sleep"]


def test_a_failure_in_the_engine_s_turn_brings_nothing_back() -> None:
    both = Recorder()
    with pytest.raises(ZeroDivisionError), updates_of(both, offload=True).engine_turn(0, timed=nullcontext()):
        raise ZeroDivisionError
    assert both.calls == ["leave", "update"]


def test_each_turn_has_its_own_peak_and_each_report_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    # In the order of the turns: training, generating, training; evaluating and training again.
    peaks = [70, 90, 20, 95, 60, 10]
    monkeypatch.setattr(engine_updates, "take_device_peak", lambda device: peaks.pop(0))
    updates = updates_of(Recorder(), offload=False, device="cuda")
    turn(updates)
    turn(updates)
    assert updates.numbers() == {"memory/train_peak_bytes": 70, "memory/generate_peak_bytes": 95}
    assert updates.numbers() == {"memory/train_peak_bytes": 10}
    assert peaks == []
