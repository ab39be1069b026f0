"""One worker process of the rewards as the trainer sees it: how it starts, is spoken to, and ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# It is started bare, spoken to in JSON lines, and killed with its children.
# It gets no environment but a short list, no file descriptor but its end of a socket, and a directory of its
# own for home, working directory and temporary files. It runs as the same user, so this keeps accidents and
# text that a model wrote away from the trainer; it is no jail for someone who means harm (worker.py says what
# is refused).
# Not a library's pool: pebble 5.2.3, which has timeouts, gives its workers the trainer's environment,
# unpickles what they send, and leaves behind what a sample that ran out of time had started (each tried).

# What an interpreter may need to start: where programs and libraries are, and how text is encoded.
INHERITED = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ")
# Numbers and short texts only; more than this is no reply of ours.
LONGEST_REPLY = 2**20
_CHUNK = 2**16
# Bytes of a worker's log that are worth showing.
_PRINTED = 300
# Seconds that the kernel may take to end a process whose socket is closed already.
_LAST_MOMENT = 2.0


class WorkerProcess:
    """A started worker. Ready once it has answered its setup; then one job at a time.

    `setup`, its first message, has rewards, memory_bytes and seconds; it may take `start_seconds` to load.
    Of the environment it gets what is `inherited`.
    """

    def __init__(
        self, *, setup: Mapping[str, Any], start_seconds: float, inherited: Mapping[str, str]
    ) -> None:
        self.is_ready = False
        self.deadline = time.monotonic() + start_seconds
        self.began = time.monotonic()
        self._directory = tempfile.TemporaryDirectory(prefix="sftrl_reward_", ignore_cleanup_errors=True)
        home = Path(self._directory.name)
        self._log = home / "worker.log"
        self._incoming = bytearray()
        self._channel, theirs = socket.socketpair()
        with theirs, self._log.open("wb") as log, _signals_held_back():
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "megatron_sftrl.rl.rewards.worker"],
                stdin=theirs.fileno(),
                stdout=log,
                stderr=log,
                cwd=home,
                env=_environment(home, inherited),
                close_fds=True,
                start_new_session=True,  # killed with its children; no Ctrl-C reaches it
            )
        self._channel.setblocking(False)
        self._outgoing = json.dumps(setup).encode("ascii") + b"\n"

    def fileno(self) -> int:
        """The socket, to wait for."""
        return self._channel.fileno()

    @property
    def is_sending(self) -> bool:
        """A message is not out yet; a worker that hangs may never take it."""
        return bool(self._outgoing)

    @property
    def is_alive(self) -> bool:
        """The process runs."""
        # Without reaping: until stop() the number of its process group stays its own.
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None

    def begin(self, message: bytes, *, seconds: float) -> None:
        """Give it a job and a time by which it must be done."""
        self.began = time.monotonic()
        self.deadline = self.began + seconds
        self._outgoing = message
        self.send()

    def send(self) -> None:
        """Send as much of the message as the socket takes."""
        # A worker that is gone shows itself at the next receive.
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            sent = self._channel.send(self._outgoing)
            self._outgoing = self._outgoing[sent:]

    def receive(self) -> Mapping[str, Any] | None:
        """The reply, None until complete; EOFError if the worker ended, ValueError if it is no reply."""
        with contextlib.suppress(BlockingIOError):
            try:
                chunk = self._channel.recv(_CHUNK)
            except ConnectionResetError:
                chunk = b""
            if not chunk:
                raise EOFError
            self._incoming += chunk
        line, newline, rest = self._incoming.partition(b"\n")
        if rest or len(line) > LONGEST_REPLY:
            raise ValueError("it sent more than one reply")
        if not newline:
            return None
        self._incoming.clear()
        try:
            reply = json.loads(line)
        except (ValueError, RecursionError):
            raise ValueError("it sent something that is no JSON") from None
        if not isinstance(reply, dict):
            raise ValueError("it sent something that is no reply")
        return reply

    def stop(self) -> tuple[int, str]:
        """Kill it with every process that it started, and remove its directory.

        Its return code, negative for a signal, its own if it had ended; and the end of what it printed.
        """
        # Its end of the socket closes a moment before it is gone: wait for its own return code.
        give_up = time.monotonic() + _LAST_MOMENT
        while self._hung_up() and self.is_alive and time.monotonic() < give_up:
            time.sleep(0.002)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        code = self._process.wait()
        printed = b""
        # A worker may have removed or replaced its log: nothing there is worth the run.
        with contextlib.suppress(OSError), self._log.open("rb") as log:
            log.seek(max(os.fstat(log.fileno()).st_size - _PRINTED, 0))
            printed = log.read(_PRINTED)
        self._channel.close()
        self._directory.cleanup()
        return code, printed.decode("utf-8", "replace").strip()

    def _hung_up(self) -> bool:
        try:
            return not self._channel.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """What is started meanwhile gets SIGTERM and SIGUSR1 once it lets them through itself.

    Slurm sends them to every process of a job. The trainer writes a checkpoint then, after a step in which no
    worker may have died with a response.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def inherited_environment() -> dict[str, str]:
    """What a worker may have of this process's environment, as it is now."""
    return {name: os.environ[name] for name in INHERITED if name in os.environ}


def _environment(home: Path, inherited: Mapping[str, str]) -> dict[str, str]:
    package_root = str(Path(__file__).resolve().parents[3])
    paths = [str(Path(entry or ".").resolve()) for entry in [*sys.path, package_root]]
    return {**inherited} | {
        "HOME": str(home),
        "TMPDIR": str(home),
        # The same modules as here, by the same names; behind the working directory nothing is added (-P).
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
        "PYTHONHASHSEED": "0",  # the same order of sets, so the same rewards, in every process of every run
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
