"""Runs a function on several ranks, in worker processes that live as long as their pool.

    def total(x):                                     # module-level: pickled by reference
        t = torch.tensor(x)
        torch.distributed.all_reduce(t)
        return t.item()

    with RankPool() as pool:
        assert pool.run(2, total, 3) == [6, 6]

Importing torch and Megatron costs seconds, so one process does it and every worker is a fork of that one;
the workers are kept from call to call, and every call gets a fresh gloo group. A rank that raises is reported
with its traceback, a call that does not end with the stack of every rank. After either the workers are
killed, because a rank may still stand in a collective, and the next call forks others; so it does where calls
have left too many threads.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import gc
import multiprocessing
import os
import pickle
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

IMPORTED_BEFORE_THE_FORKS = ["megatron_sftrl.trainers.grpo", "megatron_sftrl.trainers.sft"]
"""They start no thread, which a fork would lose."""

MANY_THREADS = 100
"""Of ended calls, in a worker: each group has three, one of which wakes up a hundred times a second."""

GRACE_S = 1.0  # how long the other ranks may take to report after the first one raised


class RankError(RuntimeError):
    """A rank raised, died, or did not finish in time."""


@dataclass(frozen=True)
class _Call:
    function: Callable
    args: tuple
    rank: int
    world_size: int
    store_file: str
    port: int
    timeout_s: float
    group: bool


@dataclass(frozen=True)
class _Answer:
    value: Any
    num_threads: int


@dataclass(frozen=True)
class _Worker:
    process: BaseProcess
    pipe: Connection
    stack_file: Path


class RankPool:
    """Owns the worker processes: started when first needed, more of them when a call needs more.

    Args:
        imports: modules that the workers will need beside the package's; they may start no thread.
    """

    def __init__(self, imports: Sequence[str] = ()) -> None:
        self._imports = [*IMPORTED_BEFORE_THE_FORKS, *imports]
        self._workers: list[_Worker] = []
        self._folder: tempfile.TemporaryDirectory | None = None
        self._num_calls = 0

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(
        self, world_size: int, function: Callable, *args: Any, timeout_s: float = 120, group: bool = True
    ) -> list[Any]:
        """Call `function(*args)` on ranks 0..world_size-1 of a fresh gloo group.

        Inside, torch.distributed is initialised, RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT
        are set, all random seeds are 0 and torch uses one thread.

        Args:
            function: of a module, since it travels by pickle like arguments and results: return tensors
                detached.
            timeout_s: seconds, the start of workers included.
            group: False lets the function find the variables and make the group itself. (Taking down the
                group that it was given would race: a peer may still be connecting.)
        Returns:
            The results by rank.
        Raises:
            RankError: with the traceback of each rank that raised, or the stack of each rank at the timeout.
        """
        self._grow(world_size)
        assert self._folder is not None
        workers = self._workers[:world_size]
        self._num_calls += 1
        store_file = os.path.join(self._folder.name, f"store-{self._num_calls}")
        port = free_port()
        for rank, worker in enumerate(workers):
            call = _Call(function, args, rank, world_size, store_file, port, timeout_s, group)
            # sys.path first: unpickling the call imports the test's module, which pytest may have put there
            worker.pipe.send_bytes(pickle.dumps(sys.path))
            worker.pipe.send_bytes(pickle.dumps(call))
        results, problems, waiting = _collect(workers, time.monotonic() + timeout_s)
        if not problems and not waiting:
            if any(answer.num_threads > MANY_THREADS for answer in results.values()):
                self.close()
            return [results[rank].value for rank in range(world_size)]
        if waiting and not problems:
            problems.append(f"{function.__qualname__} did not finish within {timeout_s} s")
        stacks = [f"rank {rank} stood here:\n{_stack(workers[rank])}" for rank in sorted(waiting)]
        self.close()
        raise RankError("\n".join([f"{world_size} ranks:", *problems, *stacks]))

    def close(self) -> None:
        """Kill the workers; the next call starts new ones."""
        for worker in self._workers:
            _kill(worker.process)
            worker.pipe.close()
        self._workers = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _grow(self, size: int) -> None:
        if any(not worker.process.is_alive() for worker in self._workers):
            self.close()
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(self._imports)
        for index in range(len(self._workers), size):
            ours, theirs = context.Pipe()
            stack_file = Path(self._folder.name) / f"stack-{index}"
            # not daemonic: a daemonic process may have no children, and Megatron's checkpoint writer forks
            process = context.Process(target=_serve, args=(theirs, str(stack_file)), name=f"rank-{index}")
            process.start()
            theirs.close()
            self._workers.append(_Worker(process, ours, stack_file))


def _collect(workers: list[_Worker], deadline: float) -> tuple[dict[int, _Answer], list[str], set[int]]:
    """Results by rank, a text for each failed rank, and the ranks that said nothing before the deadline."""
    results: dict[int, _Answer] = {}
    problems: list[str] = []
    waiting = set(range(len(workers)))
    rank_of = {workers[rank].pipe: rank for rank in waiting}
    while waiting and (left := deadline - time.monotonic()) > 0:
        for pipe in wait([workers[rank].pipe for rank in waiting], timeout=left):
            assert isinstance(pipe, Connection)
            rank = rank_of[pipe]
            waiting.discard(rank)
            payload: Any
            try:
                is_good, payload = pickle.loads(pipe.recv_bytes())
            except (EOFError, ConnectionResetError):
                workers[rank].process.join(1)
                is_good, payload = False, f"died with exit code {workers[rank].process.exitcode}"
            if is_good:
                results[rank] = payload
            else:
                problems.append(f"rank {rank}: {payload}")
                deadline = min(deadline, time.monotonic() + GRACE_S)
    return results, problems, waiting


def _stack(worker: _Worker) -> str:
    """Where a worker stands now, every thread of it."""
    if not worker.process.is_alive() or worker.process.pid is None:
        return "(the process is gone)"
    os.kill(worker.process.pid, signal.SIGUSR2)
    deadline = time.monotonic() + 2
    text, previous = "", None
    while time.monotonic() < deadline and (not text or text != previous):
        time.sleep(0.1)
        previous, text = text, worker.stack_file.read_text() if worker.stack_file.exists() else ""
    return text or "(no answer to the signal)"


def _kill(process: BaseProcess) -> None:
    """End the worker and whatever it started (it leads a process group of its own)."""
    if process.pid is not None and process.is_alive():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
    process.join()


def free_port() -> int:
    """A port that is free, from below the range that the kernel hands out to connections by itself.

    A port of that range (bind to 0) may be some connection's own by the time a group wants to listen on it.
    """
    draw = random.SystemRandom()
    while True:
        port = draw.randrange(15_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _serve(pipe: Connection, stack_file: str) -> None:
    """The worker's life: answer calls until the parent closes the pipe."""
    os.setpgrp()
    gc.freeze()  # what was imported before the fork is never garbage: collections need not look at it
    with open(stack_file, "w") as stacks:
        faulthandler.register(signal.SIGUSR2, file=stacks, all_threads=True)
        num_left = 0
        while True:
            try:
                for path in pickle.loads(pipe.recv_bytes()):
                    if path not in sys.path:
                        sys.path.append(path)
                packed_call = pipe.recv_bytes()
            except (EOFError, ConnectionResetError):  # the parent is done, or was killed
                return
            try:
                value = _answer(pickle.loads(packed_call))
                num_left = _collect_groups(num_left)
                answer = pickle.dumps((True, _Answer(value, num_left)))
                del value
            except BaseException:
                answer = pickle.dumps((False, traceback.format_exc()))
            try:
                pipe.send_bytes(answer)
            except BrokenPipeError:
                return


def _collect_groups(num_left: int) -> int:
    """End the threads of the last call's groups; returns how many threads go on.

    A model is a cycle of references and holds its groups. Left to the collector's own time their threads go
    on polling, hundreds of them after some calls, and take the processor from every later call. A collection
    costs too, so it is done only when threads have come in addition to those that the last one left. What
    it cannot end, since libraries hold it outside of Python, is for the pool to count (MANY_THREADS).
    """
    if _num_threads() <= num_left:
        return num_left
    gc.collect()
    return _num_threads()


def _num_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def _answer(call: _Call) -> Any:
    import numpy as np
    import torch
    import torch.distributed as dist

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.update(
        RANK=str(call.rank),
        LOCAL_RANK=str(call.rank),
        WORLD_SIZE=str(call.world_size),
        LOCAL_WORLD_SIZE=str(call.world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(call.port),
    )
    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    if not call.group:
        return call.function(*call.args)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(call.store_file, call.world_size),
        rank=call.rank,
        world_size=call.world_size,
        timeout=datetime.timedelta(seconds=call.timeout_s + 30),
    )
    # No try/finally: destroying the group of a rank that raised would make its peers raise too, and their
    # broken connections would bury the cause. The pool kills such a worker anyway.
    result = call.function(*call.args)
    dist.barrier()  # a rank that left early would break the connections of the others
    dist.destroy_process_group()
    return result
