"""A library that treats the process as its own, as a guest: no other code notices what it changed.

vLLM reseeds every random generator, freezes the garbage collector's heap, writes environment variables that
children would inherit (LD_PRELOAD, LOCAL_WORLD_SIZE), and on the CPU replaces functions and classes of torch:
set_num_threads then does nothing, and streams and events are not those that the trainer needs there.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import TypeVar

import numpy as np
import torch

T = TypeVar("T")

_OWNERS: tuple[ModuleType, ...] = (torch, torch.cuda, torch.accelerator)
_Attributes = dict[tuple[ModuleType, str], object]


class Guest:
    """Keeps what a library changed in the process, a CUDA generator included, between two calls into it.

    Args:
        environment: variables that the library sees; one that is set already keeps its value.
        in_any_case: others that it sees, whatever is set.
    """

    def __init__(
        self, device: torch.device, environment: Mapping[str, str], in_any_case: Mapping[str, str]
    ) -> None:
        self._device = device
        self._environment, self._in_any_case = dict(environment), dict(in_any_case)
        self._replaced: _Attributes = {}

    def run(self, action: Callable[[], T]) -> T:
        """Call the library in the process as it left it, and leave the process as it was."""
        with (
            _kept_settings(),
            self._swapped_attributes(),
            _kept_generators(self._device),
            _kept_environment(),
            self._without_compilation(),
        ):
            for name, value in self._environment.items():
                os.environ.setdefault(name, value)
            os.environ.update(self._in_any_case)
            return action()

    def _without_compilation(self) -> contextlib.AbstractContextManager[None]:
        """Compiling small functions is worth its minutes on a GPU only, unless the user says otherwise."""
        if self._device.type == "cuda" or "TORCHDYNAMO_DISABLE" in os.environ:
            return contextlib.nullcontext()
        return torch._dynamo.config.patch(disable=True)  # type: ignore[return-value]

    @contextlib.contextmanager
    def _swapped_attributes(self) -> Iterator[None]:
        ours = self._attributes()
        _replace(self._replaced)
        try:
            yield
        finally:
            theirs = self._attributes()
            self._replaced = {key: theirs[key] for key in ours if theirs.get(key) is not ours[key]}
            _replace({key: ours[key] for key in self._replaced})

    def _attributes(self) -> _Attributes:
        """Public names of torch; with CUDA no code replaces them, and torch itself fills some in."""
        if self._device.type == "cuda":
            return {}
        return {
            (owner, name): value
            for owner in _OWNERS
            for name, value in vars(owner).items()
            if not name.startswith("_")
        }


def _replace(attributes: _Attributes) -> None:
    for (owner, name), value in attributes.items():
        setattr(owner, name, value)


@contextlib.contextmanager
def _kept_generators(device: torch.device) -> Iterator[None]:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda_state = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda_state is not None:
            torch.cuda.set_rng_state(cuda_state, device)


@contextlib.contextmanager
def _kept_settings() -> Iterator[None]:
    dtype, threads, num_frozen = torch.get_default_dtype(), torch.get_num_threads(), gc.get_freeze_count()
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        if num_frozen == 0:
            # Frozen objects are never collected, the trainer's among them.
            gc.unfreeze()


@contextlib.contextmanager
def _kept_environment() -> Iterator[None]:
    variables = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(variables)
