"""`python -m megatron_sftrl ...` is `sftrl ...`, for torchrun."""

from __future__ import annotations

import atexit
import os
import sys

_status: int | None = None


def _end_at_once() -> None:
    """Without a last look at each of Megatron's and torch's objects: a second or two of every process."""
    if _status is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_status)


# The first that is registered comes last: behind the end of threads and what every library does at the end.
atexit.register(_end_at_once)


def start() -> int:
    """Run one command; an exception, which is a failure, ends as it does in any program."""
    global _status
    from megatron_sftrl.cli import main

    _status = main()
    return _status


if __name__ == "__main__":
    raise SystemExit(start())
