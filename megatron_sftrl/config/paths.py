"""Paths as people write them: `~` and $VARIABLES stand for what the shell would make of them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from megatron_sftrl.errors import UserError

_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([^}]*)\})")


def expand(text: str) -> str:
    """A path with `~`, `~name`, $NAME and ${NAME} replaced; a dollar sign before anything else is itself.

    Raises:
        UserError: a variable that is not set or is empty, or a user that is not known, by name.
    """

    def value_of(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if not os.environ.get(name):
            state = "is empty" if name in os.environ else "is not set"
            raise UserError(f"the variable ${name} in {text!r} {state}: set it, or write the path out")
        return os.environ[name]

    expanded = os.path.expanduser(_VARIABLE.sub(value_of, text))
    # What expanduser does not know it leaves as it is.
    if expanded.startswith("~") and text.startswith("~"):
        name = text.partition("/")[0]
        raise UserError(
            f"{text!r}: there is no home directory for {name}; for a file of that name write ./{name}"
        )
    return expanded


ExpandedPath = Annotated[Path, AfterValidator(lambda path: Path(expand(str(path))))]
"""A path of a configuration."""
ModuleName = Annotated[str, AfterValidator(lambda text: expand(text) if text.endswith(".py") else text)]
"""A Python file, whose path is expanded, or the name of a module."""
