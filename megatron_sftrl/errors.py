"""The class of errors that a user can fix; all others are failures: the job is restarted."""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence
from pathlib import Path

_HUB_NAME = re.compile(r"(?:https?:/+huggingface\.co/|hf:/+)?([A-Za-z0-9][\w.-]*/[\w.-]+)")
_FILES = {".json", ".jsonl", ".parquet", ".model", ".jinja", ".yaml", ".safetensors"}

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# A path that is not what was meant, or that this user may not use. Everything else that a system call can
# say (a stale handle, an I/O error, no memory, no connection) may be gone when the job starts again.
_PATH = frozenset(
    {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EROFS}
    | {errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTEMPTY}
)
_OF_RUST = re.compile(r"\(os error (\d+)\)")  # tokenizers and safetensors keep the number in the text alone


class UserError(ValueError):
    """Something that the user wrote or gave and that a restart would meet again: expected, got, what to do.

    A ValueError, so that pydantic's validators collect it with the rest of a file's problems. The reverse
    does not hold: a library's ValueError says nothing about whose fault it is.
    """


def first_of(problems: Sequence[str], at_most: int = 5) -> list[str]:
    """The first problems of a long list and the number of the others: thousands of lines hide what to do."""
    if len(problems) <= at_most:
        return list(problems)
    return [*problems[: at_most - 1], f"... and {len(problems) - at_most + 1} more"]


def hub_hint(path: Path | str) -> str:
    """What to say after a path that is not there: how to download it, where it reads like a name on a hub."""
    name = _HUB_NAME.fullmatch(str(path))
    if name is None or Path(name[1]).suffix in _FILES or Path(name[1]).parent.exists():
        return ""
    return (
        f"; if {name[1]} is a name on the Hugging Face Hub: nothing is downloaded here, fetch it first "
        f"(hf download {name[1]} --local-dir DIR) and give DIR"
    )


def error_of(text: str, cause: BaseException) -> UserError | RuntimeError:
    """What to raise, with message `text`, where reading or writing something of the user's has failed.

    A UserError where the content, the path or its rights are at fault or the disk is full; a RuntimeError
    where the file system, the network or the memory was, which may pass.
    """
    return RuntimeError(text) if _may_pass(cause) else UserError(text)


def is_full_disk(error: BaseException) -> bool:
    """Whether no space, or no quota, was left: a restart meets it again until someone frees some."""
    return isinstance(error, OSError) and error.errno in _FULL


def _may_pass(error: BaseException | None) -> bool:
    """Libraries wrap what the system said: the whole chain is looked at."""
    if error is None:
        return False
    if isinstance(error, MemoryError | TimeoutError | ConnectionError):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno not in _FULL | _PATH
    if found := _OF_RUST.search(str(error)):
        return int(found[1]) not in _FULL | _PATH
    return _may_pass(error.__cause__ or error.__context__)
