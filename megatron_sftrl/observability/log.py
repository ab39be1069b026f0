"""What a process says on standard error: lines of the log, and which warnings of libraries."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import TextIO

from megatron_sftrl.errors import UserError

LOGGER = logging.getLogger(__name__)

_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_TIME = "%Y-%m-%d %H:%M:%S"


class _StandardError(logging.StreamHandler):
    """Writes to what sys.stderr is at that moment, each line behind time, rank and level."""

    def __init__(self) -> None:
        super().__init__()
        rank = os.environ.get("RANK", "0")
        self.setFormatter(logging.Formatter(f"%(asctime)s [rank {rank}] %(levelname)s: %(message)s", _TIME))

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def start_logging() -> None:
    """Send the package's log to standard error: rank 0 from INFO on, the other ranks from WARNING on.

    SFTRL_LOG sets the level of every rank; UserError where it names none.
    """
    level = os.environ.get("SFTRL_LOG", "").upper()
    if level and level not in _LEVELS:
        raise UserError(f"SFTRL_LOG: expected one of {', '.join(_LEVELS)}, got {level}")
    logger = logging.getLogger("megatron_sftrl")
    for handler in list(logger.handlers):
        if isinstance(handler, _StandardError):
            logger.removeHandler(handler)
    logger.addHandler(_StandardError())
    logger.setLevel(level or ("INFO" if os.environ.get("RANK", "0") == "0" else "WARNING"))


# What Megatron and torch warn of though no user can change it: by package, and how the text begins.

_ON_THE_CPU = (
    ("megatron.core", r".*(Apex|Transformer Engine).*not installed"),
    ("megatron.core", r".*CUDA_DEVICE_MAX_CONNECTIONS"),
)
_ANYWHERE = (
    ("megatron.core", r"full scope is deprecated"),  # a default of its own TransformerConfig
    ("torch.distributed", r"`torch\.distributed\.\w+` .*deprecated"),  # collectives that megatron-core uses
)


class _KnownWarnings:
    """In the place of warnings.showwarning: logs once, at DEBUG, what is `known`, and shows the rest.

    Only of those packages' own files: what a file of the user's warns of is shown.
    """

    def __init__(self, show: Callable[..., None], known: Sequence[tuple[str, str]]) -> None:
        self.show = show
        self._known = [(f"/{package.replace('.', '/')}/", text) for package, text in known]
        self._told: set[str] = set()

    def __call__(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        text = str(message)
        is_known = any(part in filename and re.match(begin, text) for part, begin in self._known)
        if not is_known or file is not None:
            self.show(message, category, filename, lineno, file, line)
        elif text not in self._told:
            self._told.add(text)
            LOGGER.debug("%s:%d: %s: %s", filename, lineno, category.__name__, text)


def log_known_warnings() -> None:
    """megatron-core warns a dozen times at import that Apex and Transformer Engine are not installed.

    On the CPU neither could be; where a GPU driver is there they are worth knowing, and stay.
    """
    known = _ANYWHERE if os.path.exists("/dev/nvidiactl") else (*_ON_THE_CPU, *_ANYWHERE)
    for package, text in known:
        # Whatever PYTHONWARNINGS says of others: an import must not fail for it.
        warnings.filterwarnings("default", message=text, module=rf"{re.escape(package)}\.")
    before = warnings.showwarning
    show = before.show if isinstance(before, _KnownWarnings) else before
    warnings.showwarning = _KnownWarnings(show, known)
