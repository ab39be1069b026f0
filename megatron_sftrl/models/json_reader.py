"""Typed look-ups in a JSON object that collect every problem instead of stopping at the first."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from megatron_sftrl.errors import UserError, error_of, first_of, hub_hint


class JsonReader:
    """An object of a file, and what was found wrong with the file so far.

    A default stands for a key that is absent. A null is not absent: it is a value, and here a wrong one.

    Args:
        prefix: said before each key in messages, for an object inside another one.
        problems, notes: lists to add to, new ones by default; notes are what a user should know though
            nothing is wrong.
    """

    def __init__(
        self,
        file: Path,
        values: dict[str, Any],
        *,
        prefix: str = "",
        problems: list[str] | None = None,
        notes: list[str] | None = None,
    ) -> None:
        self.file = file
        self.values = values
        self.prefix = prefix
        self.problems: list[str] = [] if problems is None else problems
        self.notes: list[str] = [] if notes is None else notes

    def part(self, values: dict[str, Any], prefix: str) -> JsonReader:
        """A reader of an object inside this one, that adds to the same problems and notes."""
        return JsonReader(self.file, values, prefix=prefix, problems=self.problems, notes=self.notes)

    def get(self, key: str) -> Any:
        """The value, or None when absent."""
        return self.values.get(key)

    def has(self, key: str) -> bool:
        """The key is there, with null or anything else."""
        return key in self.values

    def say(self, key: str, problem: str) -> None:
        self.problems.append(f"{self.prefix}{key}{problem}")

    def note(self, key: str, remark: str) -> None:
        self.notes.append(f"{self.prefix}{key}{remark}")

    def whole(self, key: str, default: int | None = None) -> int:
        """A count of at least 1; a default of None means that the key must be there."""
        value = self.values.get(key, default)
        if value is None and default is None:
            self.say(key, " is missing")
            return 1
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.say(key, f": expected a whole number >= 1, got {value!r}")
            return 1
        return value

    def number(self, key: str, default: float | None = None, *, at_least: float | None = None) -> float:
        """A finite number above 0, or of at least `at_least`; a default of None: the key must be there."""
        value: Any = self.values.get(key, default)
        if value is None and not self.has(key):
            self.say(key, " is missing")
            return 1.0
        number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
        # A NaN fails every comparison; the second bound is for infinities and endless integers.
        if (number > 0 if at_least is None else number >= at_least) and number <= sys.float_info.max:
            return float(number)
        bound = "> 0" if at_least is None else f">= {at_least:g}"
        self.say(key, f": expected a number {bound}, got {value!r}")
        return 1.0

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of finite numbers above 0, as they are written; the key must be there."""
        values = self.get(key)
        if isinstance(values, list) and all(
            isinstance(each, int | float) and not isinstance(each, bool) and 0 < each <= sys.float_info.max
            for each in values
        ):
            return tuple(values)
        self.say(key, f": expected a list of numbers > 0, got {shown(values)}")
        return ()

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            self.say(key, f": expected true or false, got {value!r}")
        return bool(value)

    def raise_problems(self) -> None:
        """Raise UserError if anything was wrong: everything that was found, one line each."""
        if self.problems:
            listed = first_of(list(dict.fromkeys(self.problems)), 12)  # each once, in order
            raise UserError("\n  ".join([f"{self.file} cannot be used:", *listed]))


def shown(value: object) -> str:
    """A value in a message, a long one cut."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def read_json_object(file: Path) -> JsonReader:
    """A reader of the JSON object in `file`; UserError: no such file, not JSON, or not an object."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no such file: {file}{hub_hint(file)}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise error_of(f"cannot read {file}: {error}", error) from error
    if not isinstance(values, dict):
        raise UserError(f"{file}: expected a JSON object, got a {type(values).__name__}")
    return JsonReader(file, values)
