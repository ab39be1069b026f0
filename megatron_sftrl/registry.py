"""Functions that a run names: registered with a decorator, found by name, their options checked.

Losses and rewards are such functions. A registry only ever gains entries, and a second entry under a name
is an error.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError

from megatron_sftrl.config.paths import expand
from megatron_sftrl.errors import UserError, error_of

EntryT = TypeVar("EntryT", bound="Entry")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A registered function of inputs that hold what it needs, and of its options; `origin` is its file."""

    name: str
    function: Callable[..., Any]
    config: type[BaseModel]
    needs: tuple[str, ...]
    origin: str


class FunctionRegistry(Generic[EntryT]):
    """Names of one kind ("loss" or "reward"); `modules_key` is the setting that lists files with more."""

    def __init__(self, *, kind: str, modules_key: str) -> None:
        self.kind = kind
        self.modules_key = modules_key
        self._entries: dict[str, EntryT] = {}

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._entries)

    def add(self, entry: EntryT) -> None:
        """Enter a function; the same one of the same file (a reload) replaces itself, else UserError."""
        old = self._entries.get(entry.name)
        same = old is not None and (old.origin, old.function.__qualname__) == (
            entry.origin,
            entry.function.__qualname__,
        )
        if old is not None and not same:
            raise UserError(
                f"{self.kind} {entry.name!r} is registered twice: in {old.origin} and in {entry.origin}; "
                f"rename one of them"
            )
        self._entries[entry.name] = entry

    def get(self, name: str) -> EntryT:
        """The entry; ValueError with the nearest name when there is none."""
        if name not in self._entries:
            raise UserError(
                f"unknown {self.kind} {name!r}{nearest(name, self.names())}; "
                f"registered: {', '.join(self.names())}. "
                f"A {self.kind} of your own needs its file in {self.modules_key}"
            )
        return self._entries[name]

    def load(self, modules: Iterable[str | Path]) -> None:
        """Import what registers further ones; UserError where one cannot be found or takes a name twice."""
        for module in modules:
            load_module(module, key=self.modules_key)

    def options_of(self, entry: EntryT, options: Mapping[str, object]) -> BaseModel:
        """The options of an entry, validated; ValueError with the nearest name for an unknown one."""
        known = list(entry.config.model_fields)
        for option in options:
            if option not in known:
                raise UserError(
                    f"{self.kind} {entry.name!r}: unknown option {option!r}{nearest(option, known)}; "
                    f"its options: {', '.join(known) or 'none'}"
                )
        try:
            return entry.config.model_validate(dict(options))
        except ValidationError as error:
            problems = [
                f"{'.'.join(map(str, problem['loc'])) or 'options'}: {problem['msg']}, "
                f"got {problem['input']!r}"
                for problem in error.errors()
            ]
            raise UserError(f"{self.kind} {entry.name!r}: " + "; ".join(problems)) from None


def origin_of(function: Callable[..., Any]) -> str:
    """The file that defines a function."""
    return str(Path(inspect.getfile(function)).resolve())


def load_module(module: str | Path, *, key: str = "modules") -> ModuleType:
    """Import a file (a path ending in .py) once per process, by its real path, or a module by its name.

    `key` is the setting that lists it, for messages.

    Raises:
        UserError: it cannot be found, or its own code raises; the message names file and line.
    """
    text = str(module)
    if not text.endswith(".py"):
        try:
            return importlib.import_module(text)
        except ModuleNotFoundError as error:
            if error.name is None or not (text == error.name or text.startswith(error.name + ".")):
                # The module was found; something that it imports was not.
                raise _import_error(error, module=text, key=key) from error
            raise UserError(
                f"{key}: expected a file ending in .py or an importable module, got {text!r}; "
                "give the path of the file"
            ) from None
        except Exception as error:
            raise _import_error(error, module=text, key=key) from error
    path = Path(expand(text)).resolve()
    if not path.is_file():
        raise UserError(f"{key}: no such file {path}; paths are relative to the working directory")
    name = "megatron_sftrl_user_" + "_".join(path.with_suffix("").parts[1:])
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded  # before execution: pydantic resolves annotations through it
    try:
        spec.loader.exec_module(loaded)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, Exception):
            raise _import_error(error, module=str(path), key=key) from error
        raise
    return loaded


def _import_error(error: Exception, *, module: str, key: str) -> UserError | RuntimeError:
    """What the user's own code raised while it was imported, with the place in it; ours as it is."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, SyntaxError):
        file, line = error.filename, error.lineno
    else:
        frames = traceback.extract_tb(error.__traceback__)
        frame = next((frame for frame in reversed(frames) if frame.filename == module), frames[-1])
        file, line = frame.filename, frame.lineno
    what = error.msg if isinstance(error, SyntaxError) else error
    return error_of(
        f"{key}: {module} cannot be imported: {file}, line {line}: {type(error).__name__}: {what}", error
    )


def nearest(word: str, words: Iterable[str]) -> str:
    """The known word that was probably meant, as a remark; empty when none is close."""
    found = difflib.get_close_matches(word, list(words), n=1, cutoff=0.4)
    return f" (did you mean {found[0]!r}?)" if found else ""
