"""Responses from the generators of a job in two halves (rollout.devices): both ends of every message.

    trainers (RemoteEngine)                     generators (serve)

    command/0  Update(version)      ------->    every rank reads the commands one after the other
    weights, shard to shard         ------->    WeightStream -> the shards of its own model
    done/0                          <-------    Done(report, seconds, idle_seconds)
    command/1  Ask(prompts, sampling) ----->    engine.generate()
    answer/1/<trainer>/<number>     <-------    each response when it has ended
    done/1                          <-------    Done(...)

Objects lie in the job's store under these names; engine/sides.py tells the end of a side to the other one.
A response goes to the one trainer that judges it, and at the end of an ask the trainers gather them all.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch.distributed as dist

from megatron_sftrl.engine.live_weights import live_weights
from megatron_sftrl.engine.policy import PolicyEngine
from megatron_sftrl.engine.sides import Bridge
from megatron_sftrl.rollout.api import OnResponse, RolloutEngine, no_matter
from megatron_sftrl.rollout.reshard import Resharder, ReshardReport
from megatron_sftrl.types import Prompt, Rollout, RolloutGroup, SamplingParams

# The messages.


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """The weights behind so many steps follow."""

    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """As RolloutEngine.generate."""

    prompts: tuple[Prompt, ...]
    sampling: SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """A command has been carried out.

    Args:
        seconds: that it took.
        idle_seconds: that the generators waited for it.
        report: what an update cost their first rank.
    """

    seconds: float
    idle_seconds: float
    report: ReshardReport | None = None


_LOOK = 0.02
"""Seconds between two looks of a trainer for its next response."""

Answer = tuple[int, int, Rollout]
"""The place of a prompt among those of the ask, the number of a response to it, and the response."""


def judge_of(place: int, number: int, *, size: int, num_trainers: int) -> int:
    """The trainer that gets this response of groups of `size`."""
    return (place * size + number) % num_trainers


# The trainers' end.


class Generation(Protocol):
    """Groups that have been asked of an engine."""

    @property
    def seconds(self) -> float:
        """That the engine took, once groups() has returned."""
        ...

    def wait(self) -> None:
        """Until the engine is done with them."""
        ...

    def groups(self) -> list[RolloutGroup]:
        """All of them, in order, on every rank; collective, and the same at every further call."""
        ...

    def close(self) -> None:
        """They are not wanted any more."""
        ...


@dataclass(frozen=True, slots=True)
class Generated:
    """Groups of an engine in this process, which were there when it returned."""

    _groups: list[RolloutGroup]
    seconds: float

    def wait(self) -> None: ...

    def groups(self) -> list[RolloutGroup]:
        return self._groups

    def close(self) -> None: ...


def begin(
    engine: RolloutEngine, prompts: Sequence[Prompt], sampling: SamplingParams, on_response: OnResponse
) -> Generation:
    """RolloutEngine.generate, which generators elsewhere do while this process goes on."""
    if isinstance(engine, RemoteEngine):
        return engine.begin(prompts, sampling, on_response)
    started = time.perf_counter()
    groups = engine.generate(prompts, sampling, on_response)
    return Generated(groups, time.perf_counter() - started)


class RemoteEngine:
    """A RolloutEngine (see api.py) whose ranks are the other side of the job; construction is collective.

    Args:
        on_move: called while this rank waits for the generators and they live.
        bucket_bytes, has_checksums: of weights in flight, as for Resharder.
    """

    def __init__(
        self,
        policy: PolicyEngine,
        bridge: Bridge,
        on_move: Callable[[], None],
        *,
        bucket_bytes: int,
        has_checksums: bool = False,
    ) -> None:
        self._parallel, self._bridge, self._on_move = policy.parallel, bridge, on_move
        self._resharder = Resharder(
            lambda: live_weights(policy.chunks, policy.architecture),
            policy.architecture,
            {},
            bridge,
            policy.parallel.device,
            bucket_bytes=bucket_bytes,
            has_checksums=has_checksums,
        )
        bridge.gather(None)  # until every generator has its engine
        self._num_commands, self._version = 0, -1
        self._last: RemoteGeneration | None = None
        self._waited = self._busy = self._idle = 0.0
        self.last_report: ReshardReport | None = None

    def update(self, policy: PolicyEngine, *, version: int) -> None:
        """Send the weights, unless the generators have those of this version."""
        if version == self._version:
            return
        number = self._command(Update(version=version))
        with self._bridge.named_failures(), self._resharder.stream():
            pass
        self._bridge.wait(lambda: self._bridge.has(f"done/{number}"), self._on_move)
        self.last_report = self.done(number).report
        self._version = version

    def begin(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, on_response: OnResponse = no_matter
    ) -> RemoteGeneration:
        """Ask; `on_response` is called by a thread, as responses come."""
        assert self._version >= 0, "update() comes first"
        number = self._command(Ask(prompts=tuple(prompts), sampling=sampling))
        self._last = RemoteGeneration(
            self, self._bridge, number, prompts, sampling, on_response, self._version, after=self._last
        )
        return self._last

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, on_response: OnResponse = no_matter
    ) -> list[RolloutGroup]:
        return self.begin(prompts, sampling, on_response).groups()

    def sleep(self) -> None:
        """Nothing: the generators' memory is their own."""

    def close(self) -> None:
        if self._last is not None:
            self._last.close()

    def numbers(self) -> dict[str, float]:
        """Since the last call: what this rank waited for responses, and how idle the generators were."""
        waited, busy, idle = self._waited, self._busy, self._idle
        self._waited = self._busy = self._idle = 0.0
        share = {"rollout/generator_idle": idle / (busy + idle)} if busy + idle else {}
        return {"rollout/wait_seconds": waited, **share}

    def done(self, number: int) -> Done:
        """Of a command that has been carried out."""
        done: Done = self._bridge.read(f"done/{number}")
        if self._parallel.rank == 0:
            self._bridge.remove(f"command/{number}")  # prompts of a step
        self._busy += done.seconds
        self._idle += done.idle_seconds
        return done

    def wait(self, is_done: Callable[[], bool]) -> None:
        """For responses; raises as Bridge.wait."""
        started = time.perf_counter()
        self._bridge.wait(is_done, self._on_move)
        self._waited += time.perf_counter() - started

    def _command(self, command: Update | Ask) -> int:
        number = self._num_commands
        self._num_commands += 1
        if self._parallel.rank == 0:
            self._bridge.put(f"command/{number}", command)
        return number


class RemoteGeneration:
    """A Generation whose responses come one by one to a thread of this process."""

    def __init__(
        self,
        engine: RemoteEngine,
        bridge: Bridge,
        number: int,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        on_response: OnResponse,
        version: int,
        *,
        after: RemoteGeneration | None,
    ) -> None:
        self._engine, self._bridge, self._number = engine, bridge, number
        self._prompts, self._sampling, self._version = prompts, sampling, version
        self._on_response, self._after = on_response, after
        self._mine: list[Answer] = []
        self._groups: list[RolloutGroup] | None = None
        self._error: BaseException | None = None
        self._is_closed = threading.Event()
        self.seconds = 0.0
        self._thread = threading.Thread(target=self._receive, name="responses", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Raises as Bridge.wait."""
        self._engine.wait(lambda: not self._thread.is_alive())
        if self._error is not None:
            raise self._error

    def groups(self) -> list[RolloutGroup]:
        if self._groups is None:
            self.wait()
            self.seconds = self._engine.done(self._number).seconds
            shares: list[list[Answer]] = [[]] * self._bridge.side.world_size
            dist.all_gather_object(shares, self._mine)
            found = {(place, number): rollout for share in shares for place, number, rollout in share}
            self._groups = [
                RolloutGroup(
                    prompt=prompt,
                    rollouts=tuple(found[place, number] for number in range(self._sampling.num_samples)),
                    version=self._version,
                )
                for place, prompt in enumerate(self._prompts)
            ]
        return self._groups

    def close(self) -> None:
        self._is_closed.set()
        self._thread.join()

    def _receive(self) -> None:
        """Take this trainer's responses as they come, and wait for the end of the command."""
        try:
            if self._after is not None:
                self._after._thread.join()
                self._after = None
            size, side = self._sampling.num_samples, self._bridge.side
            places = itertools.product(range(len(self._prompts)), range(size))
            judges = [judge_of(*each, size=size, num_trainers=side.world_size) for each in places]
            for number in range(judges.count(side.rank)):
                name = _answer_name(self._number, side.rank, number)
                self._until_there(name)
                answer: Answer = self._bridge.read(name)
                self._bridge.remove(name)
                self._mine.append(answer)
                place, sample, rollout = answer
                self._on_response(self._prompts[place], sample, rollout)
            self._until_there(f"done/{self._number}")
        except _GivenUp:
            pass
        except BaseException as error:
            self._error = error

    def _until_there(self, name: str) -> None:
        while not self._bridge.has(name):
            if self._is_closed.wait(_LOOK):
                raise _GivenUp


class _GivenUp(Exception):
    """Nothing waits for these responses any more."""


def _answer_name(command: int, trainer: int, number: int) -> str:
    return f"answer/{command}/{trainer}/{number}"


# The generators' end.


def serve(
    bridge: Bridge,
    engine: RolloutEngine,
    update: Callable[[int], ReshardReport | None],
    on_move: Callable[[], None],
) -> bool:
    """Carry out commands until the trainers end; whether their run is finished (Bridge.is_finished).

    Args:
        update: takes the weights that are sent into `engine`, as those of a version.
        on_move: called while this rank waits for a command and the trainers live.
    Raises:
        UserError, RuntimeError: on every generator: the trainers have failed, or one of them is gone.
    """
    bridge.gather(None)  # the trainers send nothing before an engine is there
    for number in itertools.count():
        idle_since, name = time.perf_counter(), f"command/{number}"
        bridge.wait(lambda name=name: bridge.has(name) or bridge.other_end is not None, on_move)
        if (is_finished := bridge.other_end) is not None:
            return is_finished
        command, started, report = bridge.read(name), time.perf_counter(), None
        if isinstance(command, Update):
            with bridge.named_failures():
                report = update(command.version)
        else:
            engine.generate(command.prompts, command.sampling, _Sender(bridge, number, command))
        if bridge.side.rank == 0:
            seconds = time.perf_counter() - started
            done = Done(seconds=seconds, idle_seconds=started - idle_since, report=report)
            bridge.put(f"done/{number}", done)
    raise AssertionError("commands are counted without an end")


class _Sender:
    """An OnResponse that sends each response of an ask to the trainer that judges it."""

    def __init__(self, bridge: Bridge, number: int, ask: Ask) -> None:
        self._bridge, self._number = bridge, number
        self._size = ask.sampling.num_samples
        self._places = {prompt.id: place for place, prompt in enumerate(ask.prompts)}

    def __call__(self, prompt: Prompt, sample: int, rollout: Rollout) -> None:
        place, num_trainers = self._places[prompt.id], len(self._bridge.side.others)
        judge = judge_of(place, sample, size=self._size, num_trainers=num_trainers)
        # Any generator may have the next one for this trainer.
        number = self._bridge.count(f"answers/{self._number}/{judge}")
        self._bridge.put(_answer_name(self._number, judge, number), (place, sample, rollout))
