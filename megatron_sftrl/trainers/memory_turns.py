"""Trainer and rollout engine share one device's memory: each leaves it to the other for its turn."""

from __future__ import annotations

from collections.abc import Callable

from megatron_sftrl.engine.optimizer import TrainingState
from megatron_sftrl.rollout.api import RolloutEngine


class MemoryTurns:
    """Whose turn it is, and the most memory that each took; the trainer begins.

    Args:
        engine: asleep.
        training_state: what the trainer gives up for the engine's turn; None if it gives up nothing.
        take_peak: bytes of the device that were in use at the worst moment since the last call; None on the
            CPU, whose peak cannot be started anew.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        training_state: TrainingState | None,
        *,
        take_peak: Callable[[], int] | None,
    ) -> None:
        self._engine, self._training_state, self._take_peak = engine, training_state, take_peak
        self._peaks: dict[str, int] = {}

    def to_engine(self) -> None:
        """The trainer leaves, then the engine wakes."""
        self._note("train")
        if self._training_state is not None:
            self._training_state.leave()
        self._engine.wake()

    def to_trainer(self) -> None:
        """The engine sleeps, then the trainer comes back."""
        self._note("generate")
        self._engine.sleep()
        if self._training_state is not None:
            self._training_state.come_back()

    def peaks(self) -> dict[str, int]:
        """Most bytes in use in each one's turns since the last call; in the trainer's turn."""
        self._note("train")
        peaks, self._peaks = self._peaks, {}
        return peaks

    def _note(self, whose: str) -> None:
        if self._take_peak is not None:
            self._peaks[whose] = max(self._peaks.get(whose, 0), self._take_peak())
