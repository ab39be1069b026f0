"""Actions that either succeed on every rank or raise the same error on every rank.

Without it, a rank that finds a problem raises and the others wait for it in their next collective. The error
is a UserError where every rank that raised has met one (or a full disk): starting again would meet it again.
Anything else becomes a RuntimeError, a failure after which the job starts again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_sftrl.errors import UserError, is_full_disk
from megatron_sftrl.models.hf_output import new_directory

T = TypeVar("T")


def on_rank_zero(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Run `action` on rank 0 and give its (picklable) result to every rank.

    Args:
        action: called once.
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
    """Run `action` on every rank; its result stays local.

    Args:
        action, group: as for on_rank_zero.
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
    """The sum of what each rank has.

    Args:
        value: of this rank.
        group: as for on_rank_zero.
    """
    values = [0] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return sum(values)


@contextlib.contextmanager
def new_directory_together(out: Path, *, num_bytes: int) -> Iterator[Path]:
    """hf.output.new_directory for a job: rank 0 makes and completes it, every rank may write into it.

    Args:
        out, num_bytes: as there; num_bytes of all ranks.
    Yields:
        The temporary directory, on every rank.
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
