"""Actions that either succeed on every rank or raise the same error on every rank.

Without it, a rank that finds a problem raises and the others wait for it in their next collective. The error
is a UserError where every rank that raised has met one (or a full disk): starting again would meet it again.
Anything else becomes a RuntimeError, a failure after which the job starts again.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_sftrl.engine.parallel import ParallelContext
from megatron_sftrl.errors import UserError, is_full_disk
from megatron_sftrl.models.hf_output import new_directory

T = TypeVar("T")


def on_rank_zero(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Run `action` on rank 0 and give its (picklable) result to every rank.

    Args:
        group: of all ranks, for a thread beside the one that uses the default group.
    Raises:
        UserError, RuntimeError: on every rank, with the text of what rank 0 raised.
    """
    outcome: list[object] = [None, None]
    cause: BaseException | None = None
    if dist.get_rank() == 0:
        try:
            outcome = [action(), None]
        except Exception as error:
            cause, outcome = error, [None, _problem(error)]
    dist.broadcast_object_list(outcome, src=0, group=group)
    if outcome[1] is not None:
        raise _joined([outcome[1]]) from cause  # type: ignore[list-item]
    return outcome[0]  # type: ignore[return-value]


def on_every_rank(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Run `action` on every rank; its result stays local. `group` as for on_rank_zero.

    Raises:
        UserError, RuntimeError: on every rank, with the text of each rank that raised.
    """
    result, problem, cause = None, None, None
    try:
        result = action()
    # torch's CheckpointException is not an Exception.
    except (Exception, CheckpointException) as error:
        cause, problem = error, _problem(error)
    problems: list[_Problem | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem, group=group)
    if said := [each for each in problems if each is not None]:
        raise _joined(said) from cause
    return result  # type: ignore[return-value]


def sum_over_ranks(value: int, group: dist.ProcessGroup | None = None) -> int:
    """The sum of what each rank has; `group` as for on_rank_zero."""
    values = [0] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return sum(values)


@contextlib.contextmanager
def new_directory_together(out: Path, *, num_bytes: int) -> Iterator[Path]:
    """hf_output.new_directory for a job: rank 0 makes and completes it, every rank may write into it.

    `num_bytes` is of all ranks; the temporary directory is given on every rank.

    Raises:
        UserError, RuntimeError: on every rank.
    """
    directory = new_directory(out, num_bytes=num_bytes)
    temporary = on_rank_zero(directory.__enter__)
    try:
        yield temporary
    except BaseException as error:
        # The others may not have failed: nothing here waits for them.
        if dist.get_rank() == 0:
            with contextlib.suppress(type(error)):
                directory.__exit__(type(error), error, error.__traceback__)
        raise
    on_rank_zero(lambda: directory.__exit__(None, None, None))


_Problem = tuple[str, bool]
"""The text of an error, and whether the user can fix it."""


def _joined(problems: Sequence[_Problem]) -> UserError | RuntimeError:
    text = "\n".join(dict.fromkeys(text for text, _ in problems))
    return UserError(text) if all(is_users for _, is_users in problems) else RuntimeError(text)


def _problem(error: BaseException) -> _Problem:
    if isinstance(error, CheckpointException):
        # {rank: (exception, traceback)}; every rank that failed tells its own reason.
        reasons = {rank: _problem(reason) for rank, (reason, _) in sorted(error.failures.items())}
        texts = [f"rank {rank}: {text}" for rank, (text, _) in reasons.items()]
        return "; ".join(texts), all(is_users for _, is_users in reasons.values())
    if isinstance(error, UserError):
        return str(error), True
    return f"{type(error).__name__}: {error}", is_full_disk(error)


# Long phases in which ranks do shares of their own: who is done first sees that the others still move.


_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.001, 0.25
"""Seconds between two looks of a rank that waits: thousands of ranks ask one store."""


class SharedProgress:
    """Movement of any rank, seen by all of them; construction is collective.

    In a collective a rank sees nothing but its timeout. Here it waits at the job's store instead.

    Args:
        on_move: called when this rank moves and, while it waits, when another one does.
        seconds: at least, between two reports of a rank; at most, between two looks of one that waits.
    """

    def __init__(
        self, parallel: ParallelContext, on_move: Callable[[], None], *, seconds: float = 1.0
    ) -> None:
        self._world_size, self._on_move, self._seconds = parallel.world_size, on_move, seconds
        self._told = float("-inf")
        self._number = 0
        # A restarted job may meet the store of the one before: a name of its own.
        name = on_rank_zero(lambda: secrets.token_hex(8))
        self._store = dist.PrefixStore(name, dist.distributed_c10d._get_default_store())

    def moved(self) -> None:
        """A part of this rank's share was finished; cheap enough for every token and micro-batch."""
        now = time.monotonic()
        if now - self._told < self._seconds:
            return
        self._told = now
        self._on_move()
        if self._world_size > 1:
            self._store.add("moves", 1)

    def together(self, action: Callable[[], T]) -> T:
        """Do this rank's share, and wait for everyone; also when it raises, since the others wait, too."""
        try:
            result = action()
        except Exception:
            self.everyone()
            raise
        self.everyone()
        return result

    def everyone(self) -> None:
        """Wait until every rank has come here."""
        self._on_move()
        if self._world_size == 1:
            return
        arrived, number = f"arrived/{self._number}", self._number
        self._number += 1
        if self._store.add(arrived, 1) == self._world_size:
            self._store.set(f"all/{number}", "")
        before, pause = 0, _SHORTEST_PAUSE
        while not self._store.check([f"all/{number}"]):
            moves = self._store.add("moves", 0) + self._store.add(arrived, 0)
            if moves != before:
                before = moves
                self._on_move()
            time.sleep(pause)
            pause = min(1.5 * pause, _LONGEST_PAUSE, self._seconds)
