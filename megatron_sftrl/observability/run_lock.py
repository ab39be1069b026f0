"""One run at a time in a run directory: a file that says which process writes there."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from megatron_sftrl.errors import UserError, error_of

LOGGER = logging.getLogger(__name__)

FILE_NAME = "run.lock"
SECONDS_BETWEEN_BEATS = 10.0
SECONDS_TO_DIE = 180.0
"""A lock whose process cannot be looked up, on another host, is dead when it was not touched for so long. A
stalled file system must not look like death, nor may the watch outlast the patience of the other ranks."""
SECONDS_TO_LEAVE = 60.0
"""What a killed process of this job may take to be gone: it gives its GPU's memory back first."""
_SECONDS_BETWEEN_LOOKS = 0.5
_OLDEST_GUARD = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """The process that writes into a run directory.

    Args:
        host, since: its name, and when the lock was taken, for people.
        boot: of the host's kernel; with `namespace` it says whether `pid` can be looked up from here.
        namespace: of process ids: those of two containers on one host have nothing to do with each other.
        started: of the process, in clock ticks since the boot; process ids are used again.
        job: Slurm's job id; empty outside of Slurm.
        restart: how often Slurm had requeued the job.
        token: of this lock alone.
    """

    host: str
    boot: str
    namespace: str
    pid: int
    started: int
    job: str
    restart: int
    since: str
    token: str

    @classmethod
    def this_process(cls) -> Owner:
        return cls.of(os.getpid())

    @classmethod
    def of(cls, pid: int) -> Owner:
        """A process of this host and job."""
        boot, namespace = _machine()
        return cls(
            host=socket.gethostname(),
            boot=boot,
            namespace=namespace,
            pid=pid,
            started=_start_of(pid) or 0,
            job=os.environ.get("SLURM_JOB_ID", ""),
            restart=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
            since=datetime.now().astimezone().isoformat(timespec="seconds"),
            token=secrets.token_hex(8),
        )

    def is_alive(self) -> bool | None:
        """Whether the process is there; None where it cannot be seen from here."""
        if (self.boot, self.namespace) != _machine():
            return None
        return _start_of(self.pid) == self.started

    def describe(self) -> str:
        job = f"Slurm job {self.job}, " if self.job else ""
        return f"host {self.host}, {job}process {self.pid}, since {self.since}"


class RunLock:
    """Holds a run directory for this process; a context manager, entered on rank 0 alone.

    Nothing but creating a directory and renaming a file has to be atomic, as on NFS and Lustre. A lock whose
    owner is dead is taken over: at once where its process can be looked up, or where Slurm has requeued the
    owner's job; else when it was not touched for `SECONDS_TO_DIE`, which a living owner does all the time.
    An owner that has lost its lock that way ends itself.

    Args:
        run_dir: created when missing, and removed at the end if nothing was written into it.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._file = run_dir / FILE_NAME
        self._me = Owner.this_process()
        self._created: list[Path] = []
        self._ended = threading.Event()
        self._beating: threading.Thread | None = None

    def __enter__(self) -> Self:
        """Take the directory.

        Raises:
            UserError: another run holds it, or it cannot be written.
            RuntimeError: the file system fails.
        """
        try:
            self._acquire()
        except OSError as error:
            raise error_of(f"cannot write into run_dir {self._run_dir}: {error}", error) from error
        self._beating = threading.Thread(target=self._beat, name="run-lock", daemon=True)
        self._beating.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        assert self._beating is not None
        self._beating.join()
        with contextlib.suppress(OSError):
            owner = read_owner(self._file)
            if owner is not None and owner.token == self._me.token:
                self._file.unlink()
            for directory in reversed(self._created):
                directory.rmdir()

    def _create(self) -> None:
        path = self._run_dir.absolute()
        self._created += [each for each in (*reversed(path.parents), path) if not each.exists()]
        path.mkdir(parents=True, exist_ok=True)

    def _acquire(self) -> None:
        watch = _Watch()
        while True:
            self._create()  # an owner that wrote nothing else has removed it at its end
            with contextlib.suppress(FileNotFoundError), self._guarded() as is_inside:
                owner = read_owner(self._file) if is_inside else None
                if is_inside and (owner is None or self._may_take(owner, watch)):
                    if owner is not None:
                        LOGGER.warning(
                            "run_dir %s: its owner is gone (%s), this run takes it over",
                            self._run_dir,
                            owner.describe(),
                        )
                    self._write()
                    return
            time.sleep(_SECONDS_BETWEEN_LOOKS)

    def _may_take(self, owner: Owner, watch: _Watch) -> bool:
        """Whether the owner is dead; False to look again, UserError when it is alive."""
        is_alive = owner.is_alive()
        if is_alive is False or (
            owner.job and owner.job == self._me.job and owner.restart < self._me.restart
        ):
            return True
        watch.look(owner.token, self._file)
        if is_alive is None and watch.seconds_still > SECONDS_TO_DIE:
            return True
        # A restart inside a job may overtake the end of a process that was killed.
        is_restart = bool(owner.job and owner.job == self._me.job) or (
            int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
        )
        is_leaving = is_restart and watch.seconds < SECONDS_TO_LEAVE
        if watch.has_moved if is_alive is None else not is_leaving:
            raise UserError(
                f"run_dir {self._run_dir} is in use by another run ({owner.describe()}): wait for it, end "
                f"it, or choose another run_dir. If that process is gone for certain, remove {self._file}"
            )
        return False

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[bool]:
        """Whether this process alone may read and replace the lock meanwhile; for milliseconds."""
        guard = self._file.with_suffix(".guard")
        try:
            guard.mkdir()
        except FileExistsError:
            self._break(guard)
            yield False
            return
        try:
            yield True
        finally:
            guard.rmdir()

    def _break(self, guard: Path) -> None:
        """Remove the guard of a process that was killed behind it; both times are the file system's own."""
        with contextlib.suppress(FileNotFoundError):
            probe = self._run_dir / f".{FILE_NAME}.{self._me.token}"
            probe.touch()
            age = probe.stat().st_mtime - guard.stat().st_mtime
            probe.unlink()
            if age > _OLDEST_GUARD:
                guard.rmdir()

    def _write(self) -> None:
        unfinished = self._run_dir / f".{FILE_NAME}.{self._me.token}"
        unfinished.write_text(json.dumps(asdict(self._me), indent=1) + "\n", encoding="utf-8")
        unfinished.replace(self._file)

    def _beat(self) -> None:
        """Touch the lock, so that others see it alive; end the process when it is another's."""
        while not self._ended.wait(SECONDS_BETWEEN_BEATS):
            with contextlib.suppress(OSError):  # it may pass; the others are patient
                owner = read_owner(self._file)
                if owner is None:
                    self._write()
                elif owner.token == self._me.token:
                    os.utime(self._file)
                else:
                    print(
                        f"run_dir {self._run_dir} was taken over by another run ({owner.describe()}): this "
                        "process ends, so that they do not write into each other's files",
                        file=sys.__stderr__,
                        flush=True,
                    )
                    os._exit(1)


class _Watch:
    """How long a lock has not been touched, by this process's own clock: those of two hosts may differ."""

    def __init__(self) -> None:
        self._began = self._since = self._now = time.monotonic()
        self._seen: tuple[str, int] | None = None
        self.has_moved = False

    @property
    def seconds(self) -> float:
        """From the beginning to the last look."""
        return self._now - self._began

    @property
    def seconds_still(self) -> float:
        """From the look that saw the last change to the last look."""
        return self._now - self._since

    def look(self, token: str, file: Path) -> None:
        """Compare with what was there at the last look."""
        self._now = time.monotonic()
        seen = (token, file.stat().st_mtime_ns)
        if seen != self._seen:
            self.has_moved = self._seen is not None
            self._seen, self._since = seen, self._now


def read_owner(file: Path) -> Owner | None:
    """What the lock says; None where there is none, or none that can be understood."""
    os.listdir(file.parent)  # makes a network file system look again
    try:
        return Owner(**json.loads(file.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _machine() -> tuple[str, str]:
    """Of the running kernel, and of the process ids in it."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return boot, os.readlink("/proc/self/ns/pid")


def _start_of(pid: int) -> int | None:
    """When a process began, in clock ticks since the boot; None when it is gone or has ended."""
    try:
        # The name, in parentheses, may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])
