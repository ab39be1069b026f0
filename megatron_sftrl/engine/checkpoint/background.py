"""Work beside the training: one action at a time on a thread of its own, whose end all ranks see together."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

import torch
import torch.distributed as dist

from megatron_sftrl.engine.parallel import ParallelContext

T = TypeVar("T")

_ENDED, _RUNNING, _FAILED = range(3)
_SECONDS_BETWEEN_LOOKS = 0.02
_SECONDS_TO_FAIL = 3.0
_SECONDS_TO_END = 120.0


class BackgroundAction(Generic[T]):
    """An action that runs on every rank beside the training; every rank calls every method.

    A thread, not a process: it ends with its rank, so nothing of a killed run writes on, and no heap with
    CUDA in it is forked. What takes its time (writing, hashing, forcing to disk) gives Python's lock away.
    """

    def __init__(self, parallel: ParallelContext) -> None:
        self._parallel = parallel
        group = dist.new_group(backend="gloo", timeout=parallel.timeout)
        assert isinstance(group, dist.ProcessGroup)
        self.group = group
        """All ranks, for the action's collectives; in the default group the training's go on."""
        self._outcome: Future[T] | None = None
        self._thread: threading.Thread | None = None

    def start(self, action: Callable[[], T]) -> None:
        """Run `action` from now on; the one before has been taken."""
        assert self._outcome is None, "an action is under way"
        outcome: Future[T] = Future()

        def run() -> None:
            try:
                if self._parallel.device.type == "cuda":
                    # A thread begins on device 0, whatever the main thread has chosen.
                    torch.cuda.set_device(self._parallel.device)
                outcome.set_result(action())
            except BaseException as error:
                outcome.set_exception(error)

        self._outcome = outcome
        # A daemon: a process that ends because of an error must not wait for ranks that do not answer.
        self._thread = threading.Thread(target=run, name="background-action", daemon=True)
        self._thread.start()

    def take(self, *, wait: bool) -> T | None:
        """The action's result, once; None when there is none or, without `wait`, while a rank is still at it.

        Raises:
            BaseException: on every rank, when it failed on any: what the action raised, or a RuntimeError
                where it has not ended. Not a UserError: that would say that starting again cannot help.
        """
        if self._outcome is None:
            return None
        while (status := self._agreed_status()) == _RUNNING:
            if not wait:
                return None
            self._join(_SECONDS_BETWEEN_LOOKS)
        outcome, self._outcome = self._outcome, None
        if status == _FAILED:
            # Ranks that fail together do not end in the same moment.
            self._join(_SECONDS_TO_FAIL)
            if not outcome.done():
                raise RuntimeError("another rank failed; its message says why")
        return outcome.result()

    def abandon(self) -> BaseException | None:
        """Let the action end on this rank, without asking the others; what it raised, if anything.

        For a rank that is about to fail, when no rank knows where the others stand.
        """
        outcome, self._outcome = self._outcome, None
        if outcome is None:
            return None
        self._join(_SECONDS_TO_END)
        return outcome.exception() if outcome.done() else None

    def _join(self, seconds: float) -> None:
        assert self._thread is not None
        self._thread.join(seconds)

    def _agreed_status(self) -> int:
        """The highest of all ranks: a failure anywhere is everyone's, an end is one when it is everyone's."""
        assert self._outcome is not None
        status = _RUNNING
        if self._outcome.done():
            status = _ENDED if self._outcome.exception() is None else _FAILED
        worst = torch.tensor(status, device=self._parallel.device)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        return int(worst)
