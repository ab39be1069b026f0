"""metrics.jsonl keeps exactly the steps that the run has, through crashes and resumes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from megatron_sftrl.observability.metrics import JsonlSink, MetricsWriter, read_metrics


def test_each_step_is_one_line_on_disk_before_the_next_begins(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path, resume_step=0)
    sink.write(1, {"loss": 2.5, "tokens": 7})
    assert path.read_text() == '{"step": 1, "loss": 2.5, "tokens": 7}\n'
    sink.write(2, {"loss": 2.0})
    assert read_metrics(path) == [{"step": 1, "loss": 2.5, "tokens": 7}, {"step": 2, "loss": 2.0}]
    sink.close()


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path, resume_step=0)
    sink.write(1, {"loss": float("nan"), "grad_norm": float("inf")})
    sink.close()
    assert json.loads(path.read_text()) == {"step": 1, "loss": None, "grad_norm": None}


def test_resuming_removes_the_steps_after_the_checkpoint_and_a_torn_last_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {n}, "loss": {n}.5}}\n' for n in (1, 2, 3, 4)) + '{"step": 5, "lo')
    sink = JsonlSink(path, resume_step=2)
    sink.write(3, {"loss": 9.0})
    sink.close()
    assert [(row["step"], row["loss"]) for row in read_metrics(path)] == [(1, 1.5), (2, 2.5), (3, 9.0)]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_the_kept_lines_are_the_same_bytes(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path, resume_step=0)
    sink.write(1, {"loss": 0.1 + 0.2, "lr": 1e-5, "tokens": 3, "bad": float("nan")})
    sink.close()
    before = path.read_bytes()
    JsonlSink(path, resume_step=1).close()
    assert path.read_bytes() == before


def test_a_last_line_that_is_complete_but_for_its_newline_counts_as_torn(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    assert read_metrics(path) == [{"step": 1}]


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\noops\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: expected a JSON object with a step"):
        JsonlSink(path, resume_step=3)


class Recorder:
    """A sink that remembers, and can fail to close."""

    def __init__(self, *, fails: bool = False) -> None:
        self.steps: list[tuple[int, Mapping[str, float]]] = []
        self.is_closed = False
        self.fails = fails

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self.steps.append((step, metrics))

    def close(self) -> None:
        self.is_closed = True
        if self.fails:
            raise OSError("cannot close")


def test_every_sink_receives_every_step_and_is_closed_even_when_one_fails() -> None:
    sinks = [Recorder(), Recorder(fails=True), Recorder()]
    with pytest.raises(OSError, match="cannot close"), MetricsWriter(sinks) as writer:
        writer.write(1, {"loss": 1.0})
    assert [sink.steps for sink in sinks] == [[(1, {"loss": 1.0})]] * 3
    assert all(sink.is_closed for sink in sinks)


def test_what_ends_a_run_is_told_when_a_sink_cannot_close_either() -> None:
    sinks = [Recorder(fails=True), Recorder()]
    with pytest.raises(ValueError, match="the disk is full"), MetricsWriter(sinks):
        raise ValueError("the disk is full")
    assert all(sink.is_closed for sink in sinks)
