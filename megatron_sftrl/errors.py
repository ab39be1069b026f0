"""The class of errors that a user can fix; all others are failures: the job is restarted."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

_HUB_NAME = re.compile(r"(?:https?:/+huggingface\.co/|hf:/+)?([A-Za-z0-9][\w.-]*/[\w.-]+)")
_FILES = {".json", ".jsonl", ".parquet", ".model", ".jinja", ".yaml", ".safetensors"}


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
