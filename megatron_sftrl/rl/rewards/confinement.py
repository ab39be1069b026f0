"""Refuses what a verifier has no business with while it runs: processes, the network, changes to files, and
what /proc says about other processes, the trainer's environment, arguments and memory among it.

Some verifiers evaluate text that the model wrote (sympy's parse_expr does, and reasoning-gym calls it), so
that an answer may be a program. Python's audit events name what a program asks of the system; here they
raise. This stops programs that do not expect it; it is no proof against native code. Environment, memory and
open files of other processes are refused by the kernel as well, where it offers Landlock (Linux 5.13,
docs.kernel.org/userspace-api/landlock.html): to native code, and to calls that have no audit event, such as
reading where a link of /proc leads.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

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
    "os.removexattr",
    "os.rename",
    "os.rmdir",
    "os.setxattr",
    "os.spawn",
    "os.symlink",
    "os.system",
    "os.truncate",
    "os.utime",
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

# Events that name a path which is read.
_READS = ("open", "os.chdir", "os.getxattr", "os.listdir", "os.listxattr", "os.scandir")
# What /proc says about the machine, and about no process on it.
_OF_THE_MACHINE = frozenset(
    ("cpuinfo", "filesystems", "loadavg", "meminfo", "stat", "sys", "uptime", "version", "vmstat")
)


class Confinement:
    """The audit hook of a worker, which stays for its life and refuses while it is switched on."""

    def __init__(self) -> None:
        self._is_on = False
        self._proc_mounts = _proc_mounts()
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
        if event in _READS and self._shows_processes(event, arguments[0]):
            raise PermissionError(
                f"a reward may not look at other processes in /proc, nor open directories ({event}); one of "
                "your own that has to is registered with is_confined=False"
            )

    def _shows_processes(self, event: str, named: object) -> bool:
        if isinstance(named, int):
            if event == "open":
                return False  # what is open already
            named = os.readlink(f"/proc/self/fd/{named}")
        if not isinstance(named, str | bytes | os.PathLike):
            named = "."
        path = Path.cwd() / os.fsdecode(named)
        # A path relative to an open folder cannot be told from one relative to the working directory.
        if event == "open" and path.is_dir():
            return True
        if Path(os.path.realpath(path)) in self._proc_mounts:
            return True
        # Each folder on the way, too: a link of /proc may lead to what has no path of its own.
        return any(self._is_of_others(Path(os.path.realpath(place))) for place in (path, *path.parents))

    def _is_of_others(self, path: Path) -> bool:
        for mount in self._proc_mounts:
            if path != mount and path.is_relative_to(mount):
                name, *rest = path.relative_to(mount).parts
                is_own = name == str(os.getpid()) and rest[:1] != ["net"]
                return not (is_own or (mount == Path("/proc") and name in _OF_THE_MACHINE))
        return False


def _proc_mounts() -> tuple[Path, ...]:
    """Where a proc file system is mounted, the usual place included."""
    mounts = [Path("/proc")]
    with suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
            place, _, kind = line.partition(" - ")
            if kind.startswith("proc "):
                mounts.append(Path(place.split()[4]))
    return tuple(dict.fromkeys(mounts))


# linux/landlock.h; the numbers of the system calls are the same on every architecture.
_CREATE_RULESET, _RESTRICT_SELF = 444, 446
# Device files, which no reward makes: a domain must forbid something.
_MAKE_CHAR, _MAKE_BLOCK = 1 << 6, 1 << 11
_SET_NO_NEW_PRIVILEGES = 38
# linux/capability.h: sys_ptrace, sys_admin and perfmon, with which root reads any process's memory.
_CAPABILITY_VERSION = 0x20080522
_LOOKS_INTO_PROCESSES = 1 << 19 | 1 << 21 | 1 << 38


def enter_kernel_domain() -> bool:
    """Have the kernel keep this process out of the others, for the rest of its life and for its children.

    A process in a Landlock domain can trace none outside of it, and the kernel asks for that right before it
    shows another process's environment, memory, open files or folders. Root also gives up what it could look
    into processes with regardless.

    Returns:
        False where the kernel does not offer it.
    """
    library = ctypes.CDLL(None, use_errno=True)
    _drop_capabilities(library)
    handled = (ctypes.c_uint64 * 1)(_MAKE_CHAR | _MAKE_BLOCK)
    ruleset = library.syscall(_CREATE_RULESET, handled, ctypes.sizeof(handled), 0)
    if ruleset < 0:
        return False
    try:
        return (
            library.prctl(_SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0) == 0
            and library.syscall(_RESTRICT_SELF, ruleset, 0) == 0
        )
    finally:
        os.close(ruleset)


def _drop_capabilities(library: ctypes.CDLL) -> None:
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    # Effective, permitted and inheritable, the lower 32 of each and then the upper 32.
    held = (ctypes.c_uint32 * 6)()
    if library.capget(header, held) == 0:
        for index in range(6):
            held[index] &= ~(_LOOKS_INTO_PROCESSES >> 32 * (index // 3)) & 0xFFFFFFFF
        library.capset(header, held)
