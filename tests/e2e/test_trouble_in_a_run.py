"""What goes wrong in the middle of a run: a NaN in a loss, a disk that fills up."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.curves import assert_same_curves, contents
from tests.e2e.grpo_project import GrpoProject
from tests.e2e.product import Ended, sftrl_each, start_product
from tests.e2e.project import Project, metrics_of, read_rows, write_rows
from tests.ranks import run_ranks

EXCLAMATION_MARK = 4 + ord("!") - 32  # its id: no row of the project has one


def broken_run(project: Project, folder: Path, bad_lines: tuple[int, ...], *overrides: str) -> list[str]:
    """A run in the order of the file whose loss is NaN on some lines (counted from 1)."""
    rows = read_rows(project.train)
    for line in bad_lines:
        rows[line - 1]["response"] = "7!"
    data = write_rows(folder / "rows.jsonl", rows)
    loss = f"loss={{name: broken_on_token, token: {EXCLAMATION_MARK}, modules: [{project.my_loss}]}}"
    return [
        "sft", str(project.yaml), loss, "reference=null", f"data.train=[{data}]", "data.shuffle=false",
        f"run_dir={folder / 'run'}", *overrides,
    ]  # fmt: skip


def test_one_step_with_a_nan_is_skipped_and_counted_and_the_run_goes_on(
    project: Project, tmp_path: Path
) -> None:
    (done,) = sftrl_each([broken_run(project, tmp_path, (13,), "train={steps: 4, eval_every: 1}")])
    said = done.expect(0).stderr
    assert said.count("NaN or infinite") == 1
    assert (
        "step 2: the loss or the gradient was NaN or infinite, and 1 of its updates moved no weight" in said
    )
    assert f"{tmp_path / 'rows.jsonl'}:13" in said
    metrics = metrics_of(tmp_path / "run")
    assert [row["skipped_steps"] for row in metrics] == [0, 1, 1, 1]  # lines 9 to 16 are the second step
    assert [row["loss"] is None for row in metrics] == [False, True, False, False]
    held_out = [row["valid/nll"] for row in metrics]
    assert held_out[1] == held_out[0], "a skipped step moves no weight"
    assert held_out[3] < held_out[2] < held_out[1]


def test_a_loss_that_stops_its_own_gradient_is_named_once(
    project: Project, grpo: GrpoProject, tmp_path: Path
) -> None:
    mine = [
        f"loss={{name: {name}, modules: [{project.my_loss}]}}"
        for name in ("stopped", "stopped_with_advantages")
    ]
    sft = [
        "sft", str(project.yaml), f"run_dir={tmp_path / 'sft'}", mine[0], "reference=null", "train.steps=2",
    ]  # fmt: skip
    silent = sftrl_each([grpo.command(tmp_path / "learns", "train.steps=1")])[0].expect(0)
    assert "trains nothing" not in silent.stderr
    for command in (sft, grpo.command(tmp_path / "grpo", mine[1], "train.steps=1")):
        said = sftrl_each([command])[0].expect(0).stderr
        assert said.count("trains nothing") == 1
        assert "WARNING: step 1: loss 'stopped" in said


def test_a_streak_of_them_ends_the_run_and_names_the_samples(project: Project, tmp_path: Path) -> None:
    command = broken_run(
        project, tmp_path, (9, 24), "train={steps: 8, max_nonfinite_steps: 2, eval_every: 8}",
        "checkpoint.every=1", "batch.micro_size=1",
    )  # fmt: skip
    with start_product(*command, log=tmp_path / "log", ranks=2) as started:
        assert started.wait() != 0
        said = started.output()
    rows = tmp_path / "rows.jsonl"
    assert f"\n{said}".count("\nerror: ") == 1
    assert (
        f"2 steps in a row had a non-finite gradient, the last of them step 3; its samples: {rows}:24. "
        in said
    )
    assert "lower optim.lr" in said
    assert [row["skipped_steps"] for row in metrics_of(tmp_path / "run")][:2] == [0, 1]
    kept = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert kept == ["step-00000001", "step-00000002"]


@pytest.fixture
def half_done(project: Project, two_processes: Path, tmp_path: Path) -> Path:
    """A run directory at step 4 of 8."""
    run_dir = tmp_path / "half_done"
    shutil.copytree(two_processes, run_dir)
    shutil.rmtree(run_dir / "checkpoints/step-00000008")
    return run_dir


def assert_survived(run_dir: Path, before: dict[str, bytes]) -> None:
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert names == ["step-00000004"]
    assert contents(run_dir / "checkpoints") == before


@pytest.mark.parametrize("async_save", ["false", "true"])
def test_a_file_that_cannot_grow_fails_the_save_and_leaves_the_previous_checkpoint(
    async_save: str, project: Project, half_done: Path, two_processes: Path
) -> None:
    before = contents(half_done / "checkpoints")
    command = ["sft", str(project.yaml), f"run_dir={half_done}", f"checkpoint.async_save={async_save}"]
    largest = max(map(len, before.values()))
    (failed,) = run_ranks(1, with_small_files, command, largest // 2, group=False)
    # torch makes a RuntimeError without a number of it: the run starts again, and if the disk is full it is
    # refused before the next save writes anything, see below.
    assert "the checkpoint of step 8 could not be written" in failed.expect(1).stderr
    assert "earlier checkpoints are untouched" in failed.stderr
    assert_survived(half_done, before)

    (resumed,) = sftrl_each([command])
    resumed.expect(0)
    # The second half on one process, the whole on two: fp32 sums in another order, see test_run.py.
    assert_same_curves(metrics_of(half_done), metrics_of(two_processes), tolerance=1e-5)


def with_small_files(command: list[str], largest: int) -> Ended:
    """In a rank worker: no file may grow beyond `largest` bytes, as on a disk that fills up."""
    from tests.e2e.product import call_main, free_port

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, limits[1]))
    try:
        (ended,) = call_main([command], [free_port()])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return ended


def test_a_full_disk_is_told_and_the_run_resumes_when_there_is_space(
    project: Project, half_done: Path, two_processes: Path, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk") as disk:
        run_dir = disk / "run"
        shutil.copytree(half_done, run_dir)
        before = contents(run_dir / "checkpoints")
        free = shutil.disk_usage(disk).free
        room = 48 * 1024  # for the lines of metrics.jsonl, not for a checkpoint
        (disk / "other").write_bytes(b"x" * (free - room))
        command = ["sft", str(project.yaml), f"run_dir={run_dir}"]
        (failed,) = sftrl_each([command])
        assert "the disk is full: a checkpoint of step 8 needs about" in failed.expect(2).stderr
        assert "free space and resume" in failed.stderr
        assert_survived(run_dir, before)

        (disk / "other").unlink()
        (resumed,) = sftrl_each([command])
        resumed.expect(0)
        assert_same_curves(metrics_of(run_dir), metrics_of(two_processes), tolerance=1e-5)


@contextlib.contextmanager
def small_disk(mount_point: Path) -> Iterator[Path]:
    """A file system of its own, 8 MB."""
    mount_point.mkdir()
    mounted = os.geteuid() == 0 and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(mount_point)], check=False, capture_output=True
    ).returncode == 0  # fmt: skip
    if not mounted:
        pytest.skip("mounting a small disk needs root; the test above covers the failing save")
    try:
        yield mount_point
    finally:
        subprocess.run(["umount", "--lazy", str(mount_point)], check=True)
