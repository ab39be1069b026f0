"""Which files of the package a run's configuration passes: those with a function that is handed a part of it.

    python tools/configuration_way.py sft run.yaml key=value ...
    python tools/configuration_way.py grpo run.yaml key=value ...

The run is really made, in one process, so use a small one. A file counts when a function of it is called with
a section of the configuration, or with a dataclass or trainer that has one as its `config`. The schema's own
files (config/) count, too.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import CodeType, FrameType

import megatron_sftrl
from megatron_sftrl import cli
from megatron_sftrl.config.schema import Section

PACKAGE = Path(megatron_sftrl.__file__).parent


class Way:
    """A profile function of Python that notes the files on the way."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self._foreign: set[CodeType] = set()

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event != "call" or code in self._foreign:
            return
        file = Path(code.co_filename)
        if PACKAGE not in file.parents:
            self._foreign.add(code)
            return
        number = code.co_argcount + code.co_kwonlyargcount
        if any(_carries(frame.f_locals.get(name)) for name in code.co_varnames[:number]):
            self.files.add(str(file.relative_to(PACKAGE)))


def _carries(value: object) -> bool:
    held = getattr(value, "__dict__", {}).get("config") or (
        getattr(value, "config", None) if hasattr(type(value), "__slots__") else None
    )
    return isinstance(value, Section) or isinstance(held, Section)


def main() -> int:
    """Make the run and print its files, then their number."""
    way = Way()
    threading.setprofile(way)
    sys.setprofile(way)
    try:
        code = cli.main(sys.argv[1:])
    finally:
        sys.setprofile(None)
    print("\n".join(sorted(way.files)))
    print(f"{len(way.files)} files")
    return code


if __name__ == "__main__":
    raise SystemExit(main())
