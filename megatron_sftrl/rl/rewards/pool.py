"""Scores responses in worker processes: whatever a sample does to its worker, it costs that sample alone."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from megatron_sftrl.config.rewards import RewardSection, RewardWorkersSection
from megatron_sftrl.errors import UserError
from megatron_sftrl.rl.rewards.registry import (
    LARGEST,
    Outcome,
    Part,
    Reward,
    RewardInputs,
    Scored,
    build_rewards,
    portable,
    weighted,
)

# One worker process as the trainer sees it: started bare, spoken to in JSON lines, killed with its children.
# It gets no environment but a short list, no file descriptor but its end of a socket, and a directory of its
# own for home, working directory and temporary files. It runs as the same user, so this keeps accidents and
# text that a model wrote away from the trainer; it is no jail for someone who means harm (worker.py says what
# is refused).
# Not a library's pool: pebble 5.2.3, which has timeouts, gives its workers the trainer's environment,
# unpickles what they send, and leaves behind what a sample that ran out of time had started (each tried).

# What an interpreter may need to start: where programs and libraries are, and how text is encoded.
INHERITED = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ")
# Numbers and short texts only; more than this is no reply of ours.
LONGEST_REPLY = 2**20
_CHUNK = 2**16
# Bytes of a worker's log that are worth showing.
_PRINTED = 300
# Seconds that the kernel may take to end a process whose socket is closed already.
_LAST_MOMENT = 2.0


class WorkerProcess:
    """A started worker. Ready once it has answered its setup; then one job at a time.

    `setup`, its first message, has rewards, memory_bytes and seconds; it may take `start_seconds` to load.
    """

    def __init__(self, *, setup: Mapping[str, Any], start_seconds: float) -> None:
        self.is_ready = False
        self.deadline = time.monotonic() + start_seconds
        self.began = time.monotonic()
        self._directory = tempfile.TemporaryDirectory(prefix="sftrl_reward_", ignore_cleanup_errors=True)
        home = Path(self._directory.name)
        self._log = home / "worker.log"
        self._incoming = bytearray()
        self._channel, theirs = socket.socketpair()
        with theirs, self._log.open("wb") as log, _signals_held_back():
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "megatron_sftrl.rl.rewards.worker"],
                stdin=theirs.fileno(),
                stdout=log,
                stderr=log,
                cwd=home,
                env=_environment(home),
                close_fds=True,
                start_new_session=True,  # killed with its children; no Ctrl-C reaches it
            )
        self._channel.setblocking(False)
        self._outgoing = json.dumps(setup).encode("ascii") + b"\n"

    def fileno(self) -> int:
        """The socket, to wait for."""
        return self._channel.fileno()

    @property
    def is_sending(self) -> bool:
        """A message is not out yet; a worker that hangs may never take it."""
        return bool(self._outgoing)

    @property
    def is_alive(self) -> bool:
        """The process runs."""
        # Without reaping: until stop() the number of its process group stays its own.
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None

    def begin(self, message: bytes, *, seconds: float) -> None:
        """Give it a job and a time by which it must be done."""
        self.began = time.monotonic()
        self.deadline = self.began + seconds
        self._outgoing = message
        self.send()

    def send(self) -> None:
        """Send as much of the message as the socket takes."""
        # A worker that is gone shows itself at the next receive.
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            sent = self._channel.send(self._outgoing)
            self._outgoing = self._outgoing[sent:]

    def receive(self) -> Mapping[str, Any] | None:
        """The reply, None until complete; EOFError if the worker ended, ValueError if it is no reply."""
        with contextlib.suppress(BlockingIOError):
            try:
                chunk = self._channel.recv(_CHUNK)
            except ConnectionResetError:
                chunk = b""
            if not chunk:
                raise EOFError
            self._incoming += chunk
        line, newline, rest = self._incoming.partition(b"\n")
        if rest or len(line) > LONGEST_REPLY:
            raise ValueError("it sent more than one reply")
        if not newline:
            return None
        self._incoming.clear()
        try:
            reply = json.loads(line)
        except (ValueError, RecursionError):
            raise ValueError("it sent something that is no JSON") from None
        if not isinstance(reply, dict):
            raise ValueError("it sent something that is no reply")
        return reply

    def stop(self) -> tuple[int, str]:
        """Kill it with every process that it started, and remove its directory.

        Its return code, negative for a signal, its own if it had ended; and the end of what it printed.
        """
        # Its end of the socket closes a moment before it is gone: wait for its own return code.
        give_up = time.monotonic() + _LAST_MOMENT
        while self._hung_up() and self.is_alive and time.monotonic() < give_up:
            time.sleep(0.002)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        code = self._process.wait()
        printed = b""
        # A worker may have removed or replaced its log: nothing there is worth the run.
        with contextlib.suppress(OSError), self._log.open("rb") as log:
            log.seek(max(os.fstat(log.fileno()).st_size - _PRINTED, 0))
            printed = log.read(_PRINTED)
        self._channel.close()
        self._directory.cleanup()
        return code, printed.decode("utf-8", "replace").strip()

    def _hung_up(self) -> bool:
        try:
            return not self._channel.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """What is started meanwhile gets SIGTERM and SIGUSR1 once it lets them through itself.

    Slurm sends them to every process of a job. The trainer writes a checkpoint then, after a step in which no
    worker may have died with a response.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _environment(home: Path) -> dict[str, str]:
    package_root = str(Path(__file__).resolve().parents[3])
    paths = [str(Path(entry or ".").resolve()) for entry in [*sys.path, package_root]]
    return {name: os.environ[name] for name in INHERITED if name in os.environ} | {
        "HOME": str(home),
        "TMPDIR": str(home),
        # The same modules as here, by the same names; behind the working directory nothing is added (-P).
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
        "PYTHONHASHSEED": "0",  # the same order of sets, so the same rewards, in every process of every run
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


# Importing sympy, reasoning-gym or a user's torch on a busy file system.
START_SECONDS = 120.0
MOST_FAILED_STARTS = 3
# Second tries of one call that cost a new worker each; a reward that is broken for all would need thousands.
MOST_FRESH_STARTS = 16
_GIB = 2**30
_LONGEST_DETAIL = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """One reward of one sample: where its result goes, who judges, and the message that asks for it."""

    place: int
    reward: int
    inputs: str


class RewardPool:
    """The rewards of a run and the processes that compute them; a context manager.

    Workers start with the first samples, without torch and without the trainer's environment, and are
    replaced when they die. Each reward of each sample is a job of its own, with the limits of `workers`. One
    that fails is tried once more, in a worker that no failure has touched: a machine under load and a state
    that an earlier sample left behind say nothing about a response. What fails again has no reward. Raises
    UserError as build_rewards does.
    """

    def __init__(self, sections: Sequence[RewardSection], workers: RewardWorkersSection) -> None:
        self.rewards: tuple[Reward, ...] = build_rewards(sections)
        self._limits = workers
        self._setup = {
            "rewards": portable(sections),
            "memory_bytes": int(workers.memory_gb * _GIB),
            "seconds": workers.seconds,
        }
        self._ids = itertools.count()
        self._workers: dict[WorkerProcess, tuple[int, _Job] | None] = {}
        self._failed_starts = 0
        self._fresh_starts_left = 0

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every worker; a later score starts new ones."""
        for worker in list(self._workers):
            del self._workers[worker]
            worker.stop()

    def score(
        self, samples: Sequence[RewardInputs], on_result: Callable[[], None] = lambda: None
    ) -> list[Scored]:
        """The reward of each sample, in order; `on_result` is called for each reward of each sample.

        Raises:
            UserError: a row that lacks what a reward needs or is no JSON; a module that does not load in the
                workers.
            RuntimeError: workers do not start, or a module does not load for a reason that may pass.
        """
        num_rewards = len(self.rewards)
        weights = [reward.weight for reward in self.rewards]
        parts = self._run(range(num_rewards), samples, on_result)
        return [
            weighted(weights, tuple(parts[first : first + num_rewards]))
            for first in range(0, len(parts), num_rewards)
        ]

    def score_with(self, reward: int, samples: Sequence[RewardInputs]) -> list[Part]:
        """What one reward, given by its place in the list, says about each sample; raises like score."""
        return self._run([reward], samples)

    def _run(
        self,
        rewards: Sequence[int],
        samples: Sequence[RewardInputs],
        on_result: Callable[[], None] = lambda: None,
    ) -> list[Part]:
        """What the given rewards say about each sample, sample after sample."""
        jobs: list[_Job] = []
        for place, sample in enumerate(samples):
            inputs = _as_json(sample, place)
            for reward in rewards:
                self.rewards[reward].check_row(sample.row)
                jobs.append(_Job(place=len(jobs), reward=reward, inputs=inputs))
        results = self._judge(jobs, on_result)
        failed = [job for job in jobs if results[job.place].outcome != "ok"]
        if failed:
            self.close()
            self._fresh_starts_left = MOST_FRESH_STARTS
            again = self._judge(failed, on_result)
            self._fresh_starts_left = 0
            results |= {place: replace(part, is_retried=True) for place, part in again.items()}
        return [results[job.place] for job in jobs]

    def _judge(self, jobs: Sequence[_Job], on_result: Callable[[], None]) -> dict[int, Part]:
        """The results of all jobs, by their places."""
        waiting = deque(jobs)
        results: dict[int, Part] = {}

        def finish(job: _Job, part: Part) -> None:
            results[job.place] = part
            on_result()

        try:
            while len(results) < len(jobs):
                self._assign(waiting)
                self._wait(finish)
        except BaseException:
            self.close()  # what is under way must not be taken for an answer to the next samples
            raise
        return results

    def _assign(self, jobs: deque[_Job]) -> None:
        """Give waiting jobs to idle workers, and start the workers that are missing."""
        for worker, task in list(self._workers.items()):
            if worker.is_ready and task is None and jobs:
                if not worker.is_alive:  # it died between two jobs: no sample is to blame
                    del self._workers[worker]
                    worker.stop()
                    continue
                self._begin(worker, jobs.popleft())
        num_starting = sum(not worker.is_ready for worker in self._workers)
        while len(self._workers) < self._limits.num_workers and num_starting < len(jobs):
            self._workers[WorkerProcess(setup=self._setup, start_seconds=START_SECONDS)] = None
            num_starting += 1

    def _begin(self, worker: WorkerProcess, job: _Job) -> None:
        number = next(self._ids)
        self._workers[worker] = (number, job)
        message = f'{{"id": {number}, "reward": {job.reward}, "inputs": {job.inputs}}}\n'
        worker.begin(message.encode("ascii"), seconds=self._limits.seconds)

    def _wait(self, finish: Callable[[_Job, Part], None]) -> None:
        """Until something happens: a reply, the end of a worker, or the end of its time."""
        busy = [worker for worker, task in self._workers.items() if task is not None or not worker.is_ready]
        with selectors.PollSelector() as selector:
            for worker in busy:
                writes = selectors.EVENT_WRITE if worker.is_sending else 0
                selector.register(worker, selectors.EVENT_READ | writes)
            nearest = min((worker.deadline for worker in busy), default=0.0)
            events = selector.select(max(nearest - time.monotonic(), 0.0))
        for key, mask in events:
            worker = cast(WorkerProcess, key.fileobj)
            if mask & selectors.EVENT_WRITE:
                worker.send()
            if mask & selectors.EVENT_READ:
                self._hear(worker, finish)
        now = time.monotonic()
        for worker in busy:
            if worker in self._workers and now > worker.deadline and self._is_waited_for(worker):
                self._lose(worker, finish, reason=f"more than {self._limits.seconds:g} s", is_late=True)

    def _is_waited_for(self, worker: WorkerProcess) -> bool:
        return self._workers[worker] is not None or not worker.is_ready

    def _hear(self, worker: WorkerProcess, finish: Callable[[_Job, Part], None]) -> None:
        try:
            reply = worker.receive()
        except EOFError:
            self._lose(worker, finish, reason=None)
            return
        except ValueError as error:
            self._lose(worker, finish, reason=str(error))
            return
        if reply is None:
            return
        if not worker.is_ready:
            if "failed" in reply:
                kind = UserError if reply.get("is_users") else RuntimeError
                raise kind(f"rewards do not load in a worker process: {reply['failed']}")
            worker.is_ready, self._failed_starts = True, 0
            return
        task = self._workers[worker]
        assert task is not None, "only workers with a job are listened to"
        number, job = task
        part = _part_of(reply, number=number, name=self.rewards[job.reward].name)
        if part is None:
            self._lose(worker, finish, reason="it sent something that is no reply to its job")
            return
        finish(job, replace(part, seconds=time.monotonic() - worker.began))
        self._workers[worker] = None
        is_touched = part.outcome != "ok" and self._fresh_starts_left > 0
        self._fresh_starts_left -= is_touched
        if reply.get("is_last") or is_touched:
            del self._workers[worker]
            worker.stop()

    def _lose(
        self,
        worker: WorkerProcess,
        finish: Callable[[_Job, Part], None],
        *,
        reason: str | None,
        is_late: bool = False,
    ) -> None:
        """End a worker that cannot go on, at the cost of its job; no reason: it has ended by itself."""
        task = self._workers.pop(worker)
        code, printed = worker.stop()
        if reason is None:
            is_late = code == -signal.SIGXCPU
            reason = f"it ended with code {code}"
            reason = f"signal {-code} ({signal.strsignal(-code)}) ended it" if code < 0 else reason
        detail = f"{reason}; it printed: {printed}" if printed else reason
        if task is None:
            self._failed_starts += 1
            if self._failed_starts >= MOST_FAILED_STARTS:
                raise RuntimeError(
                    f"reward workers do not start, {self._failed_starts} times in a row ({detail}): "
                    "raise memory_gb if a library needs more address space, or see what the reward's file "
                    "imports"
                )
            return
        job = task[1]
        part = Part(
            name=self.rewards[job.reward].name,
            outcome="timeout" if is_late else "crashed",
            seconds=time.monotonic() - worker.began,
            detail=detail,
        )
        finish(job, part)


def _as_json(sample: RewardInputs, place: int) -> str:
    try:
        return json.dumps(
            {
                "prompt": sample.prompt,
                "response": sample.response,
                "row": dict(sample.row),
                "num_response_tokens": sample.num_response_tokens,
                "is_finished": sample.is_finished,
            }
        )
    except (TypeError, ValueError) as error:
        raise UserError(
            f"sample {place}: expected its row to hold JSON (text, numbers, lists, objects), got {error}; "
            "convert it when the data is written"
        ) from None


def _part_of(reply: Mapping[str, Any], *, number: int, name: str) -> Part | None:
    """The reply as a result; None if it is not what a worker of ours sends for this job."""
    outcome, metrics = reply.get("outcome"), reply.get("metrics", {})
    if reply.get("id") != number or outcome not in ("ok", "error", "nonfinite"):
        return None
    if outcome != "ok":
        return Part(
            name=name, outcome=cast(Outcome, outcome), detail=str(reply.get("detail"))[:_LONGEST_DETAIL]
        )
    numbers = list(metrics.values()) if isinstance(metrics, dict) else [None]
    values = [reply.get("reward"), reply.get("lenient"), *numbers]
    if not all(isinstance(value, float) and abs(value) <= LARGEST for value in values):
        return None
    answer = reply.get("answer")
    if not isinstance(answer, str | None):
        return None
    return Part(
        name=name,
        outcome="ok",
        reward=reply["reward"],
        lenient=reply["lenient"],
        metrics=metrics,
        answer=answer,
    )
