"""The product as a user starts it: command lines in processes of their own, or in waiting rank workers.

`start_product` is what a user types: python -m, or torchrun on a free port. A start costs seconds of
imports, so runs that vary one setting go through `sftrl`, which hands the same command lines to
megatron_sftrl.cli.main in the rank workers of tests/ranks.py.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.ranks import ROOT, free_port, run_ranks

TIMEOUT_S = 300.0  # a run takes seconds; the machine may be shared with other jobs


@dataclass(frozen=True)
class Ended:
    """A command line that has ended: its exit code and what it wrote to standard error."""

    code: int
    stderr: str

    def expect(self, code: int) -> Ended:
        """Itself, when it ended as expected; else the test fails with what the command said."""
        assert self.code == code, f"expected exit code {code}, got {self.code}; it said:\n{self.stderr}"
        return self


def sftrl(*arguments: str, ranks: int = 1) -> Ended:
    """One command line on `ranks` ranks that must succeed."""
    return sftrl_each([arguments], ranks=ranks)[0].expect(0)


def sftrl_each(command_lines: Sequence[Sequence[str]], *, ranks: int = 1) -> list[Ended]:
    """Command lines one after the other in the rank workers; what rank 0 saw of each."""
    ports = [free_port() for _ in command_lines]
    lines = [[str(part) for part in line] for line in command_lines]
    return run_ranks(ranks, call_main, lines, ports, timeout_s=TIMEOUT_S, group=False)[0]


def call_main(command_lines: list[list[str]], ports: list[int]) -> list[Ended]:
    """On every rank; each command line makes a process group of its own."""
    from megatron_sftrl.cli import main

    ended = []
    for arguments, port in zip(command_lines, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            try:
                code = main(arguments)
            except Exception:  # as Python ends a program
                traceback.print_exc(file=said)
                code = 1
        ended.append(Ended(code, said.getvalue()))
        if code and int(os.environ["WORLD_SIZE"]) > 1:
            raise RuntimeError(f"{arguments} failed:\n{said.getvalue()}")  # peers may stand in a collective
    return ended


class Started:
    """A command line in processes of its own, with its output in a file. Ends them all when left."""

    def __init__(self, command: Sequence[str], log: Path, environment: dict[str, str]) -> None:
        self._log = log
        self._file = log.open("w")
        self._process = subprocess.Popen(
            command,
            stdout=self._file,
            stderr=subprocess.STDOUT,
            # On SIGABRT every process prints where each of its threads stands.
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1", **environment},
        )

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._file.close()

    @property
    def is_running(self) -> bool:
        """It has not ended yet."""
        return self._process.poll() is None

    def output(self) -> str:
        """What it has written so far, to standard output and standard error."""
        return self._log.read_text(errors="replace")

    def wait(self, *, timeout_s: float = TIMEOUT_S) -> int:
        """Its exit code; at the timeout the test fails with the output and the stack of every process."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            for process in reversed(self.processes()):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGABRT)
                time.sleep(0.5)  # one stack after the other
            raise AssertionError(f"no end within {timeout_s} s; it said:\n{self.output()}") from None

    def kill(self) -> None:
        """SIGKILL to all of its processes at once: torchrun gives each rank a session of its own."""
        family = self.processes()
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=30)
        self._process.wait(30)

    def processes(self) -> list[psutil.Process]:
        """Its own and all below, while it runs."""
        try:
            mother = psutil.Process(self._process.pid)
            return [mother, *mother.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


def start_product(*arguments: str, log: Path, ranks: int = 1, program: Sequence[str] = ()) -> Started:
    """`python -m megatron_sftrl <arguments>`, under torchrun where there are several ranks.

    Args:
        arguments: of the command line.
        log: file for its output.
        ranks: processes.
        program: another program than `-m megatron_sftrl`, a tool's path for example.
    """
    command = [*(program or ("-m", "megatron_sftrl")), *map(str, arguments)]
    if ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [*launcher, *command]
    return Started([sys.executable, *command], log, {"OMP_NUM_THREADS": "1", "WANDB_SILENT": "true"})


def run_product(*arguments: str, log: Path, ranks: int = 1, program: Sequence[str] = ()) -> str:
    """Like `start_product`, to its good end; what it said."""
    with start_product(*arguments, log=log, ranks=ranks, program=program) as started:
        code = started.wait()
        assert code == 0, f"exit code {code}; it said:\n{started.output()}"
        return started.output()
