"""What runs inside a reward worker: `python -m megatron_sftrl.rl.rewards.worker`, started by pool.py.

It reads JSON lines from the socket that it finds as file descriptor 0 and writes one JSON line for each:
first the setup, answered by ready or failed, then jobs. Nothing but that socket ties it to the trainer, and
nothing that it sends can run code there.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import logging
import math
import os
import resource
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from megatron_sftrl.config.rewards import RewardSection
from megatron_sftrl.errors import UserError, error_of
from megatron_sftrl.rl.rewards.registry import (
    LARGEST,
    OUTCOMES,
    Reward,
    RewardInputs,
    RewardOutput,
    build_rewards,
)

# Refuses what a verifier has no business with while it runs: processes, the network, changes to files, and
# what /proc says about other processes, the trainer's environment, arguments and memory among it. Some
# verifiers evaluate text that the model wrote (sympy's parse_expr does, and reasoning-gym calls it), so that
# an answer may be a program. Python's audit events name what a program asks of the system; here they raise.
# This stops programs that do not expect it; it is no proof against native code. Environment, memory and open
# files of other processes are refused by the kernel as well, where it offers Landlock (Linux 5.13,
# docs.kernel.org/userspace-api/landlock.html): to native code, and to calls that have no audit event, such as
# reading where a link of /proc leads.

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
        """Refuse inside the with block, when enabled; whatever asks for it gets PermissionError."""
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

    False where the kernel does not offer it. A process in a Landlock domain can trace none outside of it, and
    the kernel asks for that right before it shows another process's environment, memory, open files or
    folders. Root also gives up what it could look into processes with regardless.
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


# Larger than any log of a verifier; what a sample writes to files must not fill the disk.
LARGEST_FILE = 64 * 2**20
LONGEST_DETAIL = 500


def main() -> None:
    """Serve until the trainer closes its end, or is gone."""
    # A trainer started in the background of a script passes on that SIGINT is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _survive_signals_to_the_job()
    requests, replies = _take_channel()
    setup = json.loads(requests.readline())
    _limit(resource.RLIMIT_AS, setup["memory_bytes"])
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, LARGEST_FILE)
    logging.disable(logging.WARNING)  # sympy's and math-verify's remarks would hide why a worker died
    try:
        rewards = build_rewards([RewardSection(**section) for section in setup["rewards"]])
        if all(reward.entry.is_confined for reward in rewards):
            enter_kernel_domain()
        for name in dict.fromkeys(name for reward in rewards for name in reward.entry.imports):
            importlib.import_module(name)
    except Exception as error:
        is_users = isinstance(error_of("", error), UserError)
        text = str(error)[:LONGEST_DETAIL] if isinstance(error, UserError) else _text(error)
        _send(replies, {"failed": text, "is_users": is_users})
        return
    _send(replies, {"ready": True})
    confinement = Confinement()
    for line in requests:
        job = json.loads(line)
        _allow_processor_time(setup["seconds"])
        reward = rewards[job["reward"]]
        reply = _score(reward, job["inputs"], confinement)
        _send(replies, {"id": job["id"], **reply})
        if reply.get("is_last"):
            return


def _survive_signals_to_the_job() -> None:
    """Do nothing on SIGTERM and SIGUSR1; a process that a verifier forks or starts does as usual."""
    worker = os.getpid()

    def note(number: int, frame: object) -> None:
        if os.getpid() != worker:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, note)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGUSR1})


def _score(reward: Reward, inputs: Mapping[str, Any], confinement: Confinement) -> dict[str, Any]:
    try:
        with confinement.on(enabled=reward.entry.is_confined):
            output = reward(RewardInputs(**inputs))
        return _reply(output)
    except MemoryError:
        # Whatever was being built may be half there; the next sample gets a fresh process.
        return {
            "outcome": "error",
            "detail": "MemoryError: more than the worker's memory_gb",
            "is_last": True,
        }
    except Exception as error:
        return {"outcome": "error", "detail": _text(error)}


_LONGEST_ANSWER = 256


def _reply(output: object) -> dict[str, Any]:
    if not isinstance(output, RewardOutput):
        raise UserError(f"expected the reward to return a RewardOutput, got {type(output).__name__}")
    reward = float(output.reward)
    lenient = reward if output.lenient is None else float(output.lenient)
    if not isinstance(output.metrics, Mapping):
        raise UserError(f"expected metrics to be numbers by name, got {type(output.metrics).__name__}")
    if not isinstance(output.answer, str | None):
        raise UserError(f"expected answer to be text, got {type(output.answer).__name__}")
    metrics = {str(name): float(value) for name, value in output.metrics.items()}
    if taken := sorted({"lenient", *OUTCOMES} & metrics.keys()):
        raise UserError(f"metric {taken[0]!r} is a number that every reward has; give it another name")
    for name, value in {"reward": reward, "lenient": lenient, **metrics}.items():
        if not abs(value) <= LARGEST:
            detail = f"{name} is {value}, expected a finite number of at most {LARGEST:g} in size"
            return {"outcome": "nonfinite", "detail": detail}
    answer = output.answer and output.answer[:_LONGEST_ANSWER]
    return {"outcome": "ok", "reward": reward, "lenient": lenient, "metrics": metrics, "answer": answer}


def _take_channel() -> tuple[BinaryIO, BinaryIO]:
    """Both directions of the socket, moved to where no print and no read of standard input reaches it."""
    channel = os.dup(0)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.close(null)
    return os.fdopen(channel, "rb"), os.fdopen(os.dup(channel), "wb")


def _send(replies: BinaryIO, message: Mapping[str, Any]) -> None:
    replies.write(json.dumps(message).encode("ascii") + b"\n")
    replies.flush()


def _limit(which: int, amount: int) -> None:
    hard = resource.getrlimit(which)[1]
    if hard != resource.RLIM_INFINITY:
        amount = min(amount, hard)
    resource.setrlimit(which, (amount, amount))


def _allow_processor_time(seconds: float) -> None:
    """Move the limit for the next sample; it also ends a worker whose trainer was killed in mid-sample."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    limit = math.ceil(usage.ru_utime + usage.ru_stime) + math.ceil(seconds)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(
        resource.RLIMIT_CPU, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard)
    )


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:LONGEST_DETAIL]


if __name__ == "__main__":
    main()
