"""Actions that either succeed on every rank or raise the same ValueError on every rank.

Without it, a rank that finds a problem raises and the others wait for it in their next collective.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_sftrl.errors import UserError
from megatron_sftrl.hf.output import new_directory

T = TypeVar("T")


def on_rank_zero(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Run `action` on rank 0 and give its (picklable) result to every rank.

    Args:
        action: called once.
        group: of all ranks, for a thread beside the one that uses the default group.
    Raises:
        UserError: on every rank, with the text of what rank 0 raised.
    """
    outcome: list[object] = [None, None]
    cause: BaseException | None = None
    if dist.get_rank() == 0:
        try:
            outcome = [action(), None]
        except Exception as error:
            cause, outcome = error, [None, _text(error)]
    dist.broadcast_object_list(outcome, src=0, group=group)
    if outcome[1] is not None:
        raise UserError(outcome[1]) from cause
    return outcome[0]  # type: ignore[return-value]


def on_every_rank(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Run `action` on every rank; its result stays local.

    Args:
        action, group: as for on_rank_zero.
    Raises:
        UserError: on every rank, with the text of each rank that raised.
    """
    result, problem, cause = None, None, None
    try:
        result = action()
    # torch's CheckpointException is not an Exception.
    except (Exception, CheckpointException) as error:
        cause, problem = error, _text(error)
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem, group=group)
    said = list(dict.fromkeys(text for text in problems if text is not None))
    if said:
        raise UserError("\n".join(said)) from cause
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
        UserError: on every rank.
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


def _text(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        # {rank: (exception, traceback)}; every rank that failed tells its own reason.
        reasons = [f"rank {rank}: {_text(reason)}" for rank, (reason, _) in sorted(error.failures.items())]
        return "; ".join(reasons)
    if isinstance(error, ValueError):
        return str(error)
    return f"{type(error).__name__}: {error}"
