"""Scores responses in worker processes: whatever a sample does to its worker, it costs that sample alone."""

from __future__ import annotations

import contextlib
import itertools
import json
import selectors
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from megatron_sftrl.config.rewards import RewardSection, RewardWorkersSection
from megatron_sftrl.errors import UserError
from megatron_sftrl.rl.rewards.process import WorkerProcess, inherited_environment
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

# Importing sympy, reasoning-gym or a user's torch on a busy file system.
START_SECONDS = 120.0
MOST_FAILED_STARTS = 3
# Second tries of one call that cost a new worker each; a reward that is broken for all would need thousands.
MOST_FRESH_STARTS = 16
_GIB = 2**30
_LONGEST_DETAIL = 500
# Seconds between two looks at what a thread has judged.
_LOOK = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """One reward of one sample: where its result goes, who judges, and the message that asks for it."""

    place: int
    reward: int
    inputs: str


class _Stream:
    """Jobs that one thread adds while another has them judged; those that are given are all of them."""

    def __init__(self, jobs: Sequence[_Job] | None = None) -> None:
        self.waiting = deque(jobs or ())
        self.num_jobs = len(self.waiting)
        self.is_complete, self.is_abandoned = jobs is not None, False
        self._button, self.bell = socket.socketpair()
        self.bell.setblocking(False)
        self._button.setblocking(False)

    def add(self, job: _Job) -> None:
        self.waiting.append(job)
        self.num_jobs += 1
        self._ring()

    def complete(self) -> None:
        """Nothing will be added."""
        self.is_complete = True
        self._ring()

    def abandon(self) -> None:
        """No result is wanted any more."""
        self.is_abandoned = True
        self._ring()

    def hear(self) -> None:
        """The bell has rung."""
        with contextlib.suppress(BlockingIOError):
            self.bell.recv(2**16)

    def close(self) -> None:
        self._button.close()
        self.bell.close()

    def _ring(self) -> None:
        # A full pipe has rung already.
        with contextlib.suppress(BlockingIOError):
            self._button.send(b"!")


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
        # As it is now: a thread may start workers while a library has changed the environment.
        self._inherited = inherited_environment()
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
        return self._weighted(self._run(range(len(self.rewards)), samples, on_result))

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
        for sample in samples:
            jobs += self._jobs(sample, rewards, first=len(jobs))
        with contextlib.closing(_Stream(jobs)) as stream:
            results = self._judge(stream, on_result)
        return self._parts(jobs, results, on_result)

    def _jobs(self, sample: RewardInputs, rewards: Sequence[int], *, first: int) -> list[_Job]:
        """One for each reward, `first` is the place of the first one."""
        inputs = _as_json(sample, first // len(rewards))
        for reward in rewards:
            self.rewards[reward].check_row(sample.row)
        return [
            _Job(place=first + number, reward=reward, inputs=inputs) for number, reward in enumerate(rewards)
        ]

    def _parts(
        self, jobs: Sequence[_Job], results: dict[int, Part], on_result: Callable[[], None]
    ) -> list[Part]:
        """The results in the order of the jobs, what failed tried once more."""
        failed = [job for job in jobs if results[job.place].outcome != "ok"]
        if failed:
            self.close()
            self._fresh_starts_left = MOST_FRESH_STARTS
            with contextlib.closing(_Stream(failed)) as stream:
                again = self._judge(stream, on_result)
            self._fresh_starts_left = 0
            results |= {place: replace(part, is_retried=True) for place, part in again.items()}
        return [results[job.place] for job in jobs]

    def _weighted(self, parts: Sequence[Part]) -> list[Scored]:
        """Of each sample, from what every reward says about it."""
        count, weights = len(self.rewards), [reward.weight for reward in self.rewards]
        return [
            weighted(weights, tuple(parts[first : first + count])) for first in range(0, len(parts), count)
        ]

    def _judge(self, stream: _Stream, on_result: Callable[[], None]) -> dict[int, Part]:
        """The results of all jobs, by their places; without any where the stream is abandoned."""
        results: dict[int, Part] = {}

        def finish(job: _Job, part: Part) -> None:
            results[job.place] = part
            on_result()

        try:
            while not (stream.is_complete and len(results) == stream.num_jobs):
                if stream.is_abandoned:
                    self.close()
                    return {}
                self._assign(stream.waiting)
                self._wait(stream, finish)
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
            worker = WorkerProcess(setup=self._setup, start_seconds=START_SECONDS, inherited=self._inherited)
            self._workers[worker] = None
            num_starting += 1

    def _begin(self, worker: WorkerProcess, job: _Job) -> None:
        number = next(self._ids)
        self._workers[worker] = (number, job)
        message = f'{{"id": {number}, "reward": {job.reward}, "inputs": {job.inputs}}}\n'
        worker.begin(message.encode("ascii"), seconds=self._limits.seconds)

    def _wait(self, stream: _Stream, finish: Callable[[_Job, Part], None]) -> None:
        """Until something happens: a reply, the end of a worker, or of its time, or another job."""
        busy = [worker for worker, task in self._workers.items() if task is not None or not worker.is_ready]
        with selectors.PollSelector() as selector:
            for worker in busy:
                writes = selectors.EVENT_WRITE if worker.is_sending else 0
                selector.register(worker, selectors.EVENT_READ | writes)
            selector.register(stream.bell, selectors.EVENT_READ)
            nearest = min((worker.deadline for worker in busy), default=None)
            events = selector.select(None if nearest is None else max(nearest - time.monotonic(), 0.0))
        for key, mask in events:
            if key.fileobj is stream.bell:
                stream.hear()
                continue
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


class Scoring:
    """Samples that are judged while others are still being made, as they come.

    A thread of its own speaks with the workers: neither a slow reward nor what makes the samples waits for
    the other, and limits on time are kept as in RewardPool.score, but for second tries, which come with
    results(). A context manager: what has not been asked for at its end is given up.
    """

    def __init__(self, pool: RewardPool) -> None:
        self._pool = pool
        self._jobs: list[_Job] = []
        self._stream = _Stream()
        self._results: dict[int, Part] = {}
        self.num_judged = 0
        """Rewards of samples that are known, or whose first try has failed."""
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Scoring:
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._stream.abandon()
            self._thread.join()
        self._stream.close()

    def add(self, make: Callable[[], RewardInputs]) -> None:
        """Score one more sample; whatever is wrong with it is raised by results()."""
        if self._error is not None:
            return
        try:
            jobs = self._pool._jobs(make(), range(len(self._pool.rewards)), first=len(self._jobs))
        except Exception as error:
            self._error = error
            return
        self._jobs += jobs
        for job in jobs:
            self._stream.add(job)
        if self._thread is None:
            self._thread = threading.Thread(target=self._judge, name="rewards", daemon=True)
            self._thread.start()

    def results(self, on_result: Callable[[], None] = lambda: None) -> list[Scored]:
        """The reward of each sample, in the order of add(); it waits, and raises, as RewardPool.score."""
        if self._thread is not None:
            self._stream.complete()
            told = 0
            while self._thread.is_alive():
                self._thread.join(_LOOK)
                if self.num_judged > told:
                    told = self.num_judged
                    on_result()
        if self._error is not None:
            raise self._error
        return self._pool._weighted(self._pool._parts(self._jobs, self._results, on_result))

    def _judge(self) -> None:
        try:
            self._results = self._pool._judge(self._stream, self._count)
        except BaseException as error:
            self._error = error

    def _count(self) -> None:
        self.num_judged += 1


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
