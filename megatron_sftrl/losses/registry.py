"""Losses by name: registered with a decorator, built from a name and options, checked before any model is.

The default registry is the package's one piece of module state: a decorator in a user's file has nowhere
else to write to. It only ever gains entries, and a second entry under a name is an error.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from pydantic import ValidationError

from megatron_sftrl.losses.api import LossConfig, LossInputs, LossOutput

NEEDS = ("reference", "behavior_logprobs", "old_logprobs", "rollout_logprobs", "advantages")

LossFunction = Callable[[LossInputs, Any], LossOutput]
FunctionT = TypeVar("FunctionT", bound=LossFunction)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A registered loss: the function, its options, what it needs, and the file it came from."""

    name: str
    function: LossFunction
    config: type[LossConfig]
    needs: tuple[str, ...]
    origin: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """A loss with its options fixed: a function from inputs to a [T] loss.

    Args:
        name: as registered.
        config: validated options.
        needs: what the inputs must hold: "reference", or optional fields of the batch.
        function: called as function(inputs, config).
    """

    name: str
    config: LossConfig
    needs: tuple[str, ...]
    function: LossFunction

    def __call__(self, inputs: LossInputs) -> LossOutput:
        """The loss of every token.

        Raises:
            ValueError: the inputs lack something the loss needs, or what it returned is not a [T] loss.
        """
        for need in self.needs:
            holder = inputs if need == "reference" else inputs.batch
            if getattr(holder, need) is None:
                raise ValueError(f"loss {self.name!r} needs {need}, got none: {_how_to_get(need)}")
        output = self.function(inputs, self.config)
        _check_output(self.name, output, inputs)
        return output


class Registry:
    """Names and what they stand for."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._entries)

    def add(self, entry: Entry) -> None:
        """Enter a loss; the same function of the same file again (a reload) replaces itself."""
        old = self._entries.get(entry.name)
        same = old is not None and (old.origin, old.function.__qualname__) == (
            entry.origin,
            entry.function.__qualname__,
        )
        if old is not None and not same:
            raise ValueError(
                f"loss {entry.name!r} is registered twice: in {old.origin} and in {entry.origin}; "
                f"rename one of them"
            )
        self._entries[entry.name] = entry

    def get(self, name: str) -> Entry:
        """The entry; ValueError with the nearest name when there is none."""
        if name not in self._entries:
            raise ValueError(
                f"unknown loss {name!r}{_nearest(name, self.names())}; "
                f"registered: {', '.join(self.names())}. "
                "A loss of your own needs its file in loss.modules"
            )
        return self._entries[name]


DEFAULT_REGISTRY = Registry()


def register_loss(
    name: str,
    *,
    config: type[LossConfig] = LossConfig,
    needs: tuple[str, ...] = (),
    registry: Registry = DEFAULT_REGISTRY,
) -> Callable[[FunctionT], FunctionT]:
    """Decorate `function(inputs: LossInputs, config) -> LossOutput` to make it available under a name.

    Args:
        name: what run.yaml calls it.
        config: options, a subclass of LossConfig.
        needs: "reference", or fields of TokenBatch that may be None.
        registry: where it is entered.
    Raises:
        ValueError: the name is taken by another function, or a need is unknown.
    """
    for need in needs:
        if need not in NEEDS:
            raise ValueError(f"loss {name!r}: unknown need {need!r}{_nearest(need, NEEDS)}; known: {NEEDS}")

    def register(function: FunctionT) -> FunctionT:
        origin = str(Path(inspect.getfile(function)).resolve())
        registry.add(Entry(name=name, function=function, config=config, needs=needs, origin=origin))
        return function

    return register


def build_loss(
    name: str,
    options: Mapping[str, object] | None = None,
    modules: Iterable[str | Path] = (),
    *,
    registry: Registry = DEFAULT_REGISTRY,
) -> Loss:
    """A loss by name, with its options checked.

    Args:
        name: a registered loss.
        options: the loss's own options; defaults where not given.
        modules: Python files (a path ending in .py) or importable names, imported first.
        registry: where the name is looked up.
    Raises:
        ValueError: unknown name, unknown or invalid option, a module that cannot be found, a name taken
            twice.
    """
    for module in modules:
        load_module(module)
    entry = registry.get(name)
    options = dict(options or {})
    known = list(entry.config.model_fields)
    for option in options:
        if option not in known:
            raise ValueError(
                f"loss {name!r}: unknown option {option!r}{_nearest(option, known)}; "
                f"its options: {', '.join(known) or 'none'}"
            )
    try:
        config = entry.config.model_validate(options)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, problem['loc'])) or 'options'}: {problem['msg']}, got {problem['input']!r}"
            for problem in error.errors()
        ]
        raise ValueError(f"loss {name!r}: " + "; ".join(problems)) from None
    needs = entry.needs + tuple(need for need in config.extra_needs() if need not in entry.needs)
    return Loss(name=name, config=config, needs=needs, function=entry.function)


def load_module(module: str | Path) -> ModuleType:
    """Import a file once per process (by its real path), or a module by its name."""
    text = str(module)
    if not text.endswith(".py"):
        try:
            return importlib.import_module(text)
        except ModuleNotFoundError as error:
            if error.name is None or not (text == error.name or text.startswith(error.name + ".")):
                raise  # the module was found; something that it imports was not
            raise ValueError(
                f"loss.modules: expected a file ending in .py or an importable module, got {text!r}; "
                "give the path of the file"
            ) from None
    path = Path(text).expanduser().resolve()
    if not path.is_file():
        raise ValueError(f"loss.modules: no such file {path}; paths are relative to the working directory")
    name = "megatron_sftrl_user_" + "_".join(path.with_suffix("").parts[1:])
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded  # before execution: pydantic resolves annotations through it
    try:
        spec.loader.exec_module(loaded)
    except BaseException:
        del sys.modules[name]
        raise
    return loaded


def _check_output(name: str, output: object, inputs: LossInputs) -> None:
    if not isinstance(output, LossOutput):
        raise ValueError(f"loss {name!r}: expected it to return a LossOutput, got {type(output).__name__}")
    expected = (inputs.batch.num_tokens,)
    for what, value in {"token_loss": output.token_loss, **output.metrics}.items():
        if value.shape != expected or not value.is_floating_point():
            raise ValueError(
                f"loss {name!r}: expected {what} to be floating point [T] = {list(expected)}, got "
                f"{value.dtype} "
                f"{list(value.shape)}; return one value per token, token_weight does the averaging"
            )
        if what != "token_loss" and value.requires_grad:
            raise ValueError(f"loss {name!r}: expected metric {what} to be detached; call .detach()")


def _how_to_get(need: str) -> str:
    if need == "reference":
        return "add a `reference` section to the run (kind: frozen or moving_average)"
    if need == "behavior_logprobs":
        return "score the data with tools/score_behavior_logprobs.py"
    return "it is filled by the rollout stage; this loss does not train on plain demonstrations"


def _nearest(word: str, words: Iterable[str]) -> str:
    found = difflib.get_close_matches(word, list(words), n=1, cutoff=0.4)
    return f" (did you mean {found[0]!r}?)" if found else ""
