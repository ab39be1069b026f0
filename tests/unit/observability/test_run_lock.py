"""Two runs never write into one run directory at once; a dead one does not keep its successor out."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_sftrl.errors import UserError
from megatron_sftrl.observability import run_lock
from megatron_sftrl.observability.run_lock import FILE_NAME, Owner, RunLock


@pytest.fixture(autouse=True)
def outside_of_any_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(run_lock, "_SECONDS_BETWEEN_LOOKS", 0.02)


def leave(run_dir: Path, **changes: object) -> Owner:
    """A lock as another process has left it; this process's own, but for the changes."""
    owner = replace(Owner.this_process(), **changes)  # type: ignore[arg-type]
    run_dir.mkdir(exist_ok=True)
    (run_dir / FILE_NAME).write_text(json.dumps(asdict(owner)))
    return owner


def holder(run_dir: Path) -> int:
    return json.loads((run_dir / FILE_NAME).read_text())["pid"]


def ended_process() -> int:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    return process.pid


def test_a_second_run_is_told_who_is_there_since_when_and_what_to_do(tmp_path: Path) -> None:
    owner = leave(tmp_path / "run", host="node017", job="4711")
    with pytest.raises(UserError) as caught, RunLock(tmp_path / "run"):
        pass
    said = str(caught.value)
    assert f"host node017, Slurm job 4711, process {os.getpid()}, since {owner.since}" in said
    assert (
        f"choose another run_dir. If that process is gone for certain, remove {tmp_path}/run/run.lock" in said
    )
    assert holder(tmp_path / "run") == os.getpid(), "the refused run must leave the lock"


def test_the_lock_is_gone_at_the_end_and_with_it_what_was_made_for_it_alone(tmp_path: Path) -> None:
    with RunLock(tmp_path / "runs" / "first"):
        assert holder(tmp_path / "runs/first") == os.getpid()
    assert list(tmp_path.iterdir()) == []
    with RunLock(tmp_path / "runs" / "second"):
        (tmp_path / "runs/second/resolved.yaml").touch()
    assert [path.name for path in (tmp_path / "runs/second").iterdir()] == ["resolved.yaml"]


@pytest.mark.parametrize(
    "changes",
    [lambda: {"pid": ended_process()}, lambda: {"started": 1}],
    ids=["its process has ended", "its process id belongs to another process by now"],
)
def test_a_dead_owner_on_this_host_is_followed_at_once(
    changes: Callable[[], dict[str, object]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    leave(tmp_path, **changes())
    with RunLock(tmp_path):
        assert holder(tmp_path) == os.getpid()
    assert "its owner is gone" in caplog.text


def test_a_requeued_job_follows_itself_at_once_wherever_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(tmp_path, boot="another host's", job="4711", restart=0)
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with RunLock(tmp_path):
        assert json.loads((tmp_path / FILE_NAME).read_text())["restart"] == 1


def test_an_owner_on_another_host_is_dead_when_its_lock_stands_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "SECONDS_TO_DIE", 0.3)
    leave(tmp_path, boot="another host's", job="4711", token="its own")
    began = time.monotonic()
    with RunLock(tmp_path):
        assert time.monotonic() - began > 0.3, "it has not looked for long enough to know"


def test_an_owner_on_another_host_is_alive_when_its_lock_moves(tmp_path: Path) -> None:
    leave(tmp_path, boot="another host's", token="its own")
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.01):
            os.utime(tmp_path / FILE_NAME)

    beating = threading.Thread(target=beat)
    beating.start()
    try:
        with pytest.raises(UserError, match="is in use by another run"), RunLock(tmp_path):
            pass
    finally:
        ended.set()
        beating.join()


def test_the_owner_touches_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "SECONDS_BETWEEN_BEATS", 0.01)
    with RunLock(tmp_path):
        os.utime(tmp_path / FILE_NAME, (0, 0))
        deadline = time.monotonic() + 60
        while (tmp_path / FILE_NAME).stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (tmp_path / FILE_NAME).stat().st_mtime > 0


def test_a_restart_waits_for_the_end_of_the_process_that_it_replaces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with subprocess.Popen(["sleep", "60"]) as process:
        leave(tmp_path, pid=process.pid, started=run_lock._start_of(process.pid))
        threading.Timer(0.2, process.kill).start()
        with RunLock(tmp_path):
            assert process.wait() != 0
            assert holder(tmp_path) == os.getpid()


def test_an_owner_that_has_lost_its_lock_ends_with_a_failure(tmp_path: Path) -> None:
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from megatron_sftrl.observability import run_lock\n"
        "run_lock.SECONDS_BETWEEN_BEATS = 0.05\n"
        "with run_lock.RunLock(Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "held\n"
        leave(tmp_path, host="node017", token="another")
        assert process.wait(60) == 1
        assert "was taken over by another run (host node017" in process.stderr.read()
    assert holder(tmp_path) == os.getpid()


def test_the_guard_of_a_process_that_was_killed_behind_it_is_broken(tmp_path: Path) -> None:
    (tmp_path / "run.guard").mkdir()
    os.utime(tmp_path / "run.guard", (time.time() - 60, time.time() - 60))
    with RunLock(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == [FILE_NAME]


def hold_for_a_while(run_dir: str, start: object, inside: object, most: object, refused: object) -> None:
    run_lock._SECONDS_BETWEEN_LOOKS = 0.01  # type: ignore[misc]
    start.wait()  # type: ignore[attr-defined]
    try:
        with RunLock(Path(run_dir)):
            with inside.get_lock():  # type: ignore[attr-defined]
                inside.value += 1  # type: ignore[attr-defined]
                most.value = max(most.value, inside.value)  # type: ignore[attr-defined]
            time.sleep(0.3)
            with inside.get_lock():  # type: ignore[attr-defined]
                inside.value -= 1  # type: ignore[attr-defined]
    except UserError:
        with refused.get_lock():  # type: ignore[attr-defined]
            refused.value += 1  # type: ignore[attr-defined]


def test_of_many_that_find_a_dead_owner_at_the_same_moment_one_follows_it(tmp_path: Path) -> None:
    leave(tmp_path, pid=ended_process())
    context = multiprocessing.get_context("fork")
    start, (inside, most, refused) = context.Barrier(6), (context.Value("i", 0) for _ in range(3))
    runs = [
        context.Process(target=hold_for_a_while, args=(str(tmp_path), start, inside, most, refused))
        for _ in range(6)
    ]
    for run in runs:
        run.start()
    for run in runs:
        run.join(60)
    assert [run.exitcode for run in runs] == [0] * 6
    assert most.value == 1
    assert refused.value >= 1
