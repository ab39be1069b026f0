"""Faults that pass are no mistakes: the run ends with code 1, and its restart as if undisturbed."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_sftrl.observability.run_lock import RunLock
from tests.e2e.grpo_project import GrpoProject
from tests.e2e.product import Ended, call_main, sftrl, sftrl_each
from tests.e2e.project import Project, metrics_of, without_timing
from tests.ranks import free_port, run_ranks

Plant = Callable[[], contextlib.AbstractContextManager]
STALE = OSError(errno.ESTALE, "Stale file handle")


def under(plant: Plant, command: list[str], port: int) -> Ended:
    """In a rank worker: the command line while something fails."""
    with plant():
        return call_main([command], [port])[0]


def disturbed(plant: Plant, command: list[str], said: str) -> None:
    (ended,) = run_ranks(1, under, plant, command, free_port(), group=False)
    assert said in ended.expect(1).stderr
    assert "Traceback" in ended.stderr


def checkpoints_cannot_be_listed() -> contextlib.AbstractContextManager:
    scandir = os.scandir

    def failing(path: Any = ".") -> Any:
        if str(path).endswith("checkpoints"):
            raise STALE
        return scandir(path)

    return mock.patch("os.scandir", failing)


def metrics_cannot_be_written() -> contextlib.AbstractContextManager:
    from megatron_sftrl.observability.metrics import JsonlSink

    write = JsonlSink.write

    def failing(self: JsonlSink, step: int, metrics: dict) -> None:
        if step == 6:
            raise STALE
        write(self, step, metrics)

    return mock.patch.object(JsonlSink, "write", failing)


def a_library_refuses_a_step() -> contextlib.AbstractContextManager:
    from megatron_sftrl.engine.policy import PolicyEngine

    return mock.patch.object(PolicyEngine, "optim_step", side_effect=ValueError("CUDA error: unspecified"))


def test_sft_goes_on_with_the_undisturbed_numbers(
    project: Project, one_process: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(one_process, run_dir)
    shutil.rmtree(run_dir / "checkpoints/step-00000008")
    command = ["sft", str(project.yaml), f"run_dir={run_dir}"]
    disturbed(checkpoints_cannot_be_listed, command, "Stale file handle")
    disturbed(a_library_refuses_a_step, command, "ValueError: CUDA error: unspecified")
    disturbed(metrics_cannot_be_written, command, "Stale file handle")
    assert [row["step"] for row in metrics_of(run_dir)] == [1, 2, 3, 4, 5]
    sftrl(*command)
    assert without_timing(metrics_of(run_dir)) == without_timing(metrics_of(one_process))


def the_engine_fails() -> contextlib.AbstractContextManager:
    from megatron_sftrl.rollout.in_process import InProcessEngine

    return mock.patch.object(InProcessEngine, "generate", side_effect=RuntimeError("EngineCore failed"))


def workers_do_not_start() -> contextlib.AbstractContextManager:
    return mock.patch.object(sys, "executable", "/bin/false")


def samples_cannot_be_written() -> contextlib.AbstractContextManager:
    from megatron_sftrl.trainers.rollouts import SampleLog

    return mock.patch.object(SampleLog, "write", side_effect=STALE)


def test_grpo_goes_on_with_the_undisturbed_numbers(grpo: GrpoProject, grpo_run: Path, tmp_path: Path) -> None:
    command = grpo.command(tmp_path / "run")
    disturbed(workers_do_not_start, command, "reward workers do not start")
    disturbed(the_engine_fails, command, "EngineCore failed")
    disturbed(samples_cannot_be_written, command, "Stale file handle")
    sftrl(*command)
    assert without_timing(metrics_of(tmp_path / "run")) == without_timing(metrics_of(grpo_run))


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_a_second_run_in_the_same_directory_is_refused_and_leaves_the_first_alone(
    kind: str, project: Project, grpo: GrpoProject, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    command = ["sft", str(project.yaml), f"run_dir={run_dir}"] if kind == "sft" else grpo.command(run_dir)
    with RunLock(run_dir):
        before = [path.name for path in run_dir.iterdir()]
        (refused,) = sftrl_each([command])
        assert f"process {os.getpid()}, since" in refused.expect(2).stderr
        assert "is in use by another run" in refused.stderr
        assert [path.name for path in run_dir.iterdir()] == before
