"""Who has the memory when, and what each turn took of it."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_sftrl.trainers.engine_updates import MemoryTurns


class Recorder:
    """Stands for the engine and for the training state."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return lambda: self.calls.append(name)


def test_one_leaves_before_the_other_comes() -> None:
    both: Any = Recorder()
    turns = MemoryTurns(both, both, take_peak=None)
    turns.to_engine()
    turns.to_trainer()
    assert both.calls == ["leave", "wake", "sleep", "come_back"]
    assert turns.peaks() == {}


def test_without_offload_the_trainer_stays() -> None:
    engine: Any = Recorder()
    turns = MemoryTurns(engine, None, take_peak=None)
    turns.to_engine()
    turns.to_trainer()
    assert engine.calls == ["wake", "sleep"]


def test_each_turn_has_its_own_peak_and_each_report_starts_anew() -> None:
    engine: Any = Recorder()
    # In the order of the turns: training, generating, training; evaluating and training again.
    peaks = iter([70, 90, 20, 95, 60, 10])
    turns = MemoryTurns(engine, None, take_peak=lambda: next(peaks))
    turns.to_engine()
    turns.to_trainer()
    turns.to_engine()
    turns.to_trainer()
    assert turns.peaks() == {"train": 70, "generate": 95}
    assert turns.peaks() == {"train": 10}
    with pytest.raises(StopIteration):
        turns.to_engine()
