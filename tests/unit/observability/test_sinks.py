"""What the log section switches on is there after the run, and is continued by a resumed one."""

from __future__ import annotations

import errno
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_sftrl.errors import UserError
from megatron_sftrl.observability.metrics import (
    JsonlSink,
    MetricsWriter,
    OptionalSink,
    open_metrics,
    read_metrics,
)
from megatron_sftrl.observability.run_directory import open_run_directory
from tests.unit.config.example import example


def run(path: Path, *overrides: str, resume_step: int, steps: range) -> None:
    config = example(f"run_dir='{path}'", *overrides)
    directory = open_run_directory(config, is_writer=True)
    with open_metrics(directory, config, resume_step=resume_step, total_steps=4) as writer:
        for step in steps:
            writer.write(step, {"loss": 1.0 / step})


def test_metrics_jsonl_is_always_written(tmp_path: Path) -> None:
    run(tmp_path, "log.progress=false", resume_step=0, steps=range(1, 3))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["metrics.jsonl", "resolved.yaml"]


def test_progress_goes_to_standard_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, resume_step=0, steps=range(1, 5))
    captured = capfd.readouterr()
    assert "step 4/4" in captured.err
    assert captured.out == ""


def test_tensorboard_hides_the_points_after_the_checkpoint(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    switches = ("log.progress=false", "log.tensorboard=true")
    run(tmp_path, *switches, resume_step=0, steps=range(1, 4))
    run(tmp_path, *switches, resume_step=2, steps=range(3, 5))
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [point.step for point in events.Scalars("loss")] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("key", "package", "command"),
    [
        ("log.tensorboard", "tensorboard", "pip install tensorboard"),
        ("log.trackio", "trackio", r"pip install 'megatron-sftrl\[trackio\]'"),
        ("log.mlflow", "mlflow", r"pip install 'megatron-sftrl\[mlflow\]'"),
        ("log.mlflow", "sqlalchemy", r"pip install 'megatron-sftrl\[mlflow\]'"),
    ],
)
def test_a_missing_package_is_said_before_anything_is_written(
    key: str, package: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else name)
    with pytest.raises(UserError, match=rf"{key} needs the package {package}.*{command}, or {key}=false"):
        run(tmp_path, f"{key}=true", resume_step=0, steps=range(1, 2))
    assert not (tmp_path / "metrics.jsonl").exists()


def test_wandb_offline_stays_in_the_run_directory_under_one_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    switches = ("log.progress=false", "log.wandb=offline")
    run(tmp_path, *switches, resume_step=0, steps=range(1, 3))
    first_id = (tmp_path / "wandb_id").read_text()
    run(tmp_path, *switches, resume_step=1, steps=range(2, 4))
    assert (tmp_path / "wandb_id").read_text() == first_id
    assert list((tmp_path / "wandb").glob(f"offline-run-*-{first_id}/run-{first_id}.wandb"))
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


class Down:
    """A tracker that fails at one of its calls."""

    def __init__(self, at: str) -> None:
        self.at = at
        self.fail("open")

    def fail(self, call: str) -> None:
        if call == self.at:
            raise ConnectionError("the tracker is down")

    def write(self, step: int, metrics: object) -> None:
        self.fail(f"write {step}")

    def close(self) -> None:
        self.fail("close")


@pytest.mark.parametrize("at", ["open", "write 2", "close"])
def test_a_tracker_that_fails_is_told_once_and_the_run_goes_on(
    at: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    sinks = [JsonlSink(path, resume_step=0), OptionalSink("log.wandb", lambda: Down(at))]
    with MetricsWriter(sinks) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": 0.5})
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]
    assert caplog.text.count("log.wandb failed and is off until the run starts again: ConnectionError") == 1


def test_a_tracker_that_cannot_begin_for_want_of_a_setting_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")

    def init(**_: object) -> None:
        raise wandb.UsageError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(UserError, match=r"log\.wandb: online cannot begin: No API key"):
        run(tmp_path, "log.progress=false", "log.wandb=online", resume_step=0, steps=range(1, 2))


@pytest.mark.parametrize(("number", "kind"), [(errno.ESTALE, RuntimeError), (errno.ENOSPC, UserError)])
def test_metrics_that_cannot_be_written_end_the_run_and_a_full_disk_alone_is_the_users(
    number: int, kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl", resume_step=0)

    def flush() -> None:
        raise OSError(number, "as it says")

    monkeypatch.setattr(sink, "_file", SimpleNamespace(write=len, flush=flush))
    with pytest.raises(kind, match="the metrics of step 1 cannot be written") as caught:
        sink.write(1, {"loss": 0.5})
    assert isinstance(caught.value, UserError) == (kind is UserError)
