"""Typed look-ups in a JSON object that collect every problem instead of stopping at the first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class JsonReader:
    """The object of one file, and what was found wrong with it so far.

    Args:
        file: where the object was read, for messages.
        values: the object.
    """

    def __init__(self, file: Path, values: dict[str, Any]) -> None:
        self.file = file
        self.values = values
        self.problems: list[str] = []

    def get(self, key: str) -> Any:
        """The value, or None when absent."""
        return self.values.get(key)

    def whole(self, key: str, default: int | None = None) -> int:
        """A count of at least 1; a default of None means that the key must be there."""
        value = self.get(key)
        value = default if value is None else value
        if value is None:
            self.problems.append(f"{key} is missing")
            return 1
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.problems.append(f"{key}: expected a whole number >= 1, got {value!r}")
            return 1
        return value

    def number(self, key: str, default: float) -> float:
        """A number above 0."""
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            self.problems.append(f"{key}: expected a number > 0, got {value!r}")
            return 1.0
        return float(value)

    def flag(self, key: str) -> bool:
        """true or false; false when absent."""
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            self.problems.append(f"{key}: expected true or false, got {value!r}")
        return bool(value)

    def raise_problems(self) -> None:
        """End the reading if anything was wrong.

        Raises:
            ValueError: everything that was found wrong, one line each.
        """
        if self.problems:
            raise ValueError("\n  ".join([f"{self.file} cannot be used:", *self.problems]))


def read_json_object(file: Path) -> JsonReader:
    """A reader of the JSON object in `file`.

    Raises:
        ValueError: no such file, not JSON, or not an object.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"no such file: {file}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"cannot read {file}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected a JSON object, got a {type(values).__name__}")
    return JsonReader(file, values)
