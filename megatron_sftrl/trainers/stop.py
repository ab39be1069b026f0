"""A request from outside to end a run early: at the next step boundary, with a checkpoint."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from megatron_sftrl.engine.parallel import ParallelContext

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
STOP_FILE = "SFTRL_STOP_FILE"
"""Environment variable: path of a file whose appearance asks as well. Who stops a job on many nodes has one
place to write to, and signals no process that a rank has started (a verifier, a compiler)."""


class StopRequest:
    """Notes SIGUSR1 and SIGTERM while it is entered; every rank answers alike whether there was one.

    Slurm sends SIGTERM to what it preempts and, where asked for, SIGUSR1 ahead of a time limit.
    """

    def __init__(self) -> None:
        self._received = 0
        file = os.environ.get(STOP_FILE)
        self._file = Path(file) if file else None
        self._handlers: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            self._handlers[number] = signal.signal(number, self._note)
            # A system call of gloo or NCCL shall go on after the signal, not fail.
            signal.siginterrupt(number, False)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            if handler is not None:  # None: it was not installed from Python, and cannot be again
                signal.signal(number, handler)  # type: ignore[arg-type]

    def agreed(self, parallel: ParallelContext, *, step: int, num_steps: int) -> bool:
        """Whether any rank was asked to stop; every rank calls it after every step and gets the same answer.

        Args:
            parallel: this rank's place.
            step: steps done.
            num_steps: of the whole run.
        """
        asked = self._received
        if parallel.rank == 0 and self._file is not None and self._file.exists():
            asked = signal.SIGUSR1
        answer = torch.tensor(int(asked), device=parallel.device)
        dist.all_reduce(answer, op=dist.ReduceOp.MAX)
        if answer and parallel.rank == 0:
            print(
                f"{signal.Signals(int(answer)).name}: stopping after step {step} of {num_steps} with a "
                "checkpoint; the same command goes on from there",
                file=sys.stderr,
                flush=True,
            )
        return bool(answer)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = number
