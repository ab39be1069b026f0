"""A job in two halves (rollout.devices): the last ranks only generate, the others train.

Each side has a default process group of its own, so that the code of either sees its own ranks alone. What
passes between them goes through a Bridge: objects through the job's store, tensors through a group over all
ranks.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import torch.distributed as dist
from torch import Tensor

from megatron_sftrl.engine.parallel import ParallelContext, Ranks
from megatron_sftrl.errors import UserError

T = TypeVar("T")
Name = Literal["trainers", "generators"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """This process's place in its half of the job.

    Args:
        rank, world_size: on this side.
        job_rank, job_size: in the whole job.
        store: the job's, which both sides see.
    """

    name: Name
    rank: int
    world_size: int
    job_rank: int
    job_size: int
    store: dist.Store

    @property
    def is_generator(self) -> bool:
        return self.name == "generators"

    @property
    def other(self) -> Name:
        return "trainers" if self.is_generator else "generators"

    @property
    def others(self) -> range:
        """Ranks in the whole job of the other side."""
        num_trainers = self.job_size - self.world_size if self.is_generator else self.world_size
        return range(num_trainers) if self.is_generator else range(num_trainers, self.job_size)

    @property
    def ranks(self) -> Ranks:
        """Of the default group of this side."""
        store = dist.PrefixStore(self.name, self.store)
        return Ranks(rank=self.rank, world_size=self.world_size, store=store)


def side_of(num_generators: int) -> Side | None:
    """The side of this process, by RANK and WORLD_SIZE as torchrun sets them; None without generators.

    It waits for the process that keeps the job's store. `num_generators` leaves a trainer (check_run).
    """
    if not num_generators:
        return None
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store, _, _ = next(dist.rendezvous("env://", rank, size))
    num_trainers = size - num_generators
    is_generator = rank >= num_trainers
    return Side(
        name="generators" if is_generator else "trainers",
        rank=rank - num_trainers if is_generator else rank,
        world_size=num_generators if is_generator else num_trainers,
        job_rank=rank,
        job_size=size,
        store=store,
    )


_SECONDS_OF_SILENCE = 120.0
"""After so long without a beat a process is gone. (One that lives and does not move is ended by its own
HangWatch.)"""
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.001, 0.05
"""Seconds between two looks into the store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _End:
    """How a side has ended: `failure` is None where it ended well."""

    is_finished: bool
    failure: str | None
    is_users: bool


class Bridge:
    """Between the two sides, for as long as a run lasts: a context manager, entered by every process.

    While it is open, a thread of each process shows the other side that the process lives. The end of a side,
    and what it failed with, is told to the other one: no wait outlasts it.

    Args:
        hang_minutes: train.hang_minutes; silence counts as the end of a process well before.
    """

    def __init__(self, side: Side, parallel: ParallelContext, *, hang_minutes: float) -> None:
        self.side, self.rank = side, side.job_rank
        self.is_finished = True
        """What this side tells at its end: of the trainers, whether the run is at its last step."""
        self._silence = min(_SECONDS_OF_SILENCE, 30 * hang_minutes or _SECONDS_OF_SILENCE)
        self._beats = self._silence / 20
        self._store = dist.PrefixStore("bridge", side.store)
        self._timeout = parallel.timeout
        self._closed = threading.Event()
        self._num_gathers = 0
        self._tensors = _tensor_group(side, parallel)

    def __enter__(self) -> Self:
        self._store.set(f"host/{self.rank}", socket.gethostname())
        self._store.add(f"beat/{self.rank}", 1)
        self._store.wait([f"beat/{rank}" for rank in self.side.others], self._timeout)
        threading.Thread(target=self._beat, name="bridge", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        is_told = self.has(f"end/{self.side.other}") and self.read(f"end/{self.side.other}").failure
        if (error is not None and not is_told) or (error is None and self.side.rank == 0):
            failure = None if error is None else f"{self._place(self.rank)}: {type(error).__name__}: {error}"
            end = _End(is_finished=self.is_finished, failure=failure, is_users=isinstance(error, UserError))
            self.put(f"end/{self.side.name}", end)
        num_left = self._store.add("left", 1)
        if error is None and self.rank == 0 and num_left < self.side.job_size:
            # The job's store may live in its first process, which leaves last.
            self.wait(lambda: self._store.add("left", 0) == self.side.job_size)
        self._closed.set()

    # Objects.

    def put(self, name: str, value: object) -> None:
        """Leave something for those who look under this name, which is used once."""
        self._store.set(name, pickle.dumps(value))  # type: ignore[arg-type]

    def has(self, name: str) -> bool:
        return self._store.check([name])

    def read(self, name: str) -> Any:
        """What is there under this name."""
        return pickle.loads(self._store.get(name))

    def remove(self, name: str) -> None:
        self._store.delete_key(name)

    def count(self, name: str) -> int:
        """How often this name was counted before, by any process."""
        return self._store.add(name, 1) - 1

    def wait(self, is_done: Callable[[], bool], on_move: Callable[[], None] = lambda: None) -> None:
        """Until it is done; `on_move` is called while the other side lives.

        Raises:
            UserError, RuntimeError: the other side has failed, or one of its processes is gone.
        """
        heard = {rank: (b"", time.monotonic()) for rank in self.side.others}
        looked, pause = 0.0, _SHORTEST_PAUSE
        while not is_done():
            self._raise_failure()
            if time.monotonic() - looked >= self._beats:
                looked = time.monotonic()
                before, heard = heard, self._listen(heard)
                if heard != before:
                    on_move()
            time.sleep(pause)
            pause = min(1.5 * pause, _LONGEST_PAUSE)

    @property
    def other_end(self) -> bool | None:
        """None until the other side has ended well; then what it tells (is_finished)."""
        name = f"end/{self.side.other}"
        return self.read(name).is_finished if self.has(name) else None

    @contextlib.contextmanager
    def named_failures(self) -> Iterator[None]:
        """A message that fails because its other end does is raised as the failure of that end."""
        try:
            yield
        except RuntimeError:
            last = time.monotonic() + 1.5 * self._silence
            self.wait(lambda: time.monotonic() > last)
            raise

    def _raise_failure(self) -> None:
        if not self.has(name := f"end/{self.side.other}"):
            return
        end: _End = self.read(name)
        if end.failure is not None:
            text = f"the {self.side.other} have ended with this run: {end.failure}"
            raise UserError(text) if end.is_users else RuntimeError(text)

    def _listen(self, heard: Mapping[int, tuple[bytes, float]]) -> dict[int, tuple[bytes, float]]:
        """Of each rank of the other side its last beat, and when it was first seen."""
        now, beats = time.monotonic(), self._store.multi_get([f"beat/{rank}" for rank in heard])
        found = {
            rank: (beat, seen if beat == last else now)
            for (rank, (last, seen)), beat in zip(heard.items(), beats, strict=True)
        }
        silent = [rank for rank, (_, seen) in found.items() if now - seen > self._silence]
        if silent:
            raise RuntimeError(
                f"of the {self.side.other} {', '.join(map(self._place, silent))} gave no sign of life for "
                f"{self._silence:.0f} seconds: the process is gone, or its machine; the last checkpoint is "
                "sound"
            )
        return found

    def _place(self, rank: int) -> str:
        return f"rank {rank} on {self._store.get(f'host/{rank}').decode()}"

    def _beat(self) -> None:
        with contextlib.suppress(dist.DistError):  # the store is gone, and the job with it
            while not self._closed.wait(self._beats):
                self._store.add(f"beat/{self.rank}", 1)

    # Wires of rollout/reshard.py, between all ranks of the job.

    def gather(self, mine: T) -> list[T]:
        """What each rank of the job has, by its number."""
        ours: list[T] = [mine] * self.side.world_size
        dist.all_gather_object(ours, mine)
        name = f"gathered/{self._num_gathers}"
        self._num_gathers += 1
        theirs: list[list[T]] = [[]]
        if self.side.rank == 0:
            self.put(f"{name}/{self.side.name}", ours)
            self.wait(lambda: self.has(f"{name}/{self.side.other}"))
            theirs = [self.read(f"{name}/{self.side.other}")]
        dist.broadcast_object_list(theirs, src=0)
        return [*theirs[0], *ours] if self.side.is_generator else [*ours, *theirs[0]]

    def start(
        self, *, receives: Sequence[tuple[int, Tensor]], sends: Sequence[tuple[int, Tensor]]
    ) -> list[dist.Work]:
        """Begin messages from and to ranks of the job."""
        return [
            *(self._tensors.recv([buffer], peer, 0) for peer, buffer in receives),
            *(self._tensors.send([buffer], peer, 0) for peer, buffer in sends),
        ]


def _tensor_group(side: Side, parallel: ParallelContext) -> Any:  # torch types neither class as a group
    """Of all ranks, which the default groups of the sides do not know: NCCL on GPUs, gloo on the CPU."""
    store = dist.PrefixStore("tensors", side.store)
    if parallel.device.type != "cuda":
        return dist.ProcessGroupGloo(store, side.job_rank, side.job_size, timeout=parallel.timeout)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = parallel.timeout
    return dist.ProcessGroupNCCL(store, side.job_rank, side.job_size, options)
