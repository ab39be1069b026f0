"""Refuses what a verifier has no business with while it runs: processes, the network, changes to files.

Some verifiers evaluate text that the model wrote (sympy's parse_expr does, and reasoning-gym calls it), so
that an answer may be a program. Python's audit events name what a program asks of the system; here they
raise. This stops programs that do not expect it; it is no proof against native code.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# docs.python.org/3/library/audit_events.html; every event that begins so.
REFUSED = (
    "_posixsubprocess.",
    "ctypes.",
    "ftplib.",
    "http.client.",
    "os.chmod",
    "os.chown",
    "os.exec",
    "os.fork",
    "os.kill",
    "os.link",
    "os.mkdir",
    "os.posix_spawn",
    "os.putenv",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.spawn",
    "os.symlink",
    "os.system",
    "os.truncate",
    "pty.",
    "resource.",
    "shutil.",
    "signal.pthread_kill",
    "smtplib.",
    "socket.",
    "sqlite3.connect",
    "subprocess.",
    "urllib.",
)
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Confinement:
    """The audit hook of a worker, which stays for its life and refuses while it is switched on."""

    def __init__(self) -> None:
        self._is_on = False
        sys.addaudithook(self._audit)

    @contextmanager
    def on(self, *, enabled: bool) -> Iterator[None]:
        """Refuse inside the with block, when enabled.

        Raises:
            PermissionError: from whatever asks for what is refused.
        """
        self._is_on = enabled
        try:
            yield
        finally:
            self._is_on = False

    def _audit(self, event: str, arguments: tuple[object, ...]) -> None:
        if not self._is_on:
            return
        is_write = event == "open" and isinstance(arguments[2], int) and bool(arguments[2] & _WRITES)
        if is_write or event.startswith(REFUSED):
            raise PermissionError(
                f"a reward may not start processes, use the network or change files ({event}); one of your "
                "own that has to is registered with is_confined=False"
            )
