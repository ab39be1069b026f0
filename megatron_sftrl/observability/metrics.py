"""One dictionary of numbers per step, handed to every place that keeps or shows them."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from megatron_sftrl.config.schema import TrainingConfig
from megatron_sftrl.errors import UserError, error_of
from megatron_sftrl.observability.run_directory import RunDirectory, write_atomically
from megatron_sftrl.observability.trackers import (
    MlflowSink,
    TensorBoardSink,
    TrackioSink,
    WandbSink,
    check_trackers,
)

LOGGER = logging.getLogger(__name__)


class MetricsSink(Protocol):
    """A place for a step's numbers."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the numbers of one step; steps come in rising order."""
        ...

    def close(self) -> None: ...


class MetricsWriter:
    """Fans a step's numbers out to its sinks, in order (metrics.jsonl first), and closes all of them."""

    def __init__(self, sinks: Sequence[MetricsSink]) -> None:
        self._sinks = tuple(sinks)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for sink in self._sinks:
            sink.write(step, metrics)

    def close(self) -> None:
        """Close every sink, also when one of them fails."""
        with contextlib.ExitStack() as stack:
            for sink in reversed(self._sinks):
                stack.callback(sink.close)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        # A disk that is full when a step is written still is when the files close: the first error says more.
        with contextlib.suppress(OSError) if error else contextlib.nullcontext():
            self.close()


class OptionalSink:
    """A place whose failure is told once and costs what would still have gone there, not the run.

    A tracker that is down for an hour must not end weeks of training; metrics.jsonl has every number. A
    UserError of `open_sink` passes through.
    """

    def __init__(self, name: str, open_sink: Callable[[], MetricsSink]) -> None:
        self._name = name
        self._sink: MetricsSink | None = None
        with self._told():
            self._sink = open_sink()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._sink is not None:
            with self._told():
                self._sink.write(step, metrics)

    def close(self) -> None:
        if self._sink is not None:
            with self._told():
                self._sink.close()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            self._sink = None
            LOGGER.warning(
                "%s failed and is off until the run starts again: %s: %s; metrics.jsonl has all numbers",
                self._name,
                type(error).__name__,
                error,
            )


class JsonlSink:
    """metrics.jsonl: one JSON object a step, on disk as soon as the step is over; null for NaN and infinity.

    Args:
        path: created, or continued.
        resume_step: last step that the resumed checkpoint holds; later lines are removed, at 0 all.
    Raises:
        UserError: a line in the middle of the file that is not a JSON object with a step, or a file that
            cannot be read or written.
    """

    def __init__(self, path: Path, *, resume_step: int) -> None:
        try:
            _keep_steps_up_to(path, resume_step)
            self._file = path.open("a", encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise error_of(f"the metrics cannot be written to {path}: {error}", error) from error

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line and flush it.

        Raises:
            UserError: it cannot be written, and would not be after a restart; a disk is full, say.
            RuntimeError: the file system fails.
        """
        numbers = {name: _plain(value) for name, value in metrics.items()}
        try:
            self._file.write(json.dumps({"step": step, **numbers}, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise error_of(
                f"the metrics of step {step} cannot be written: {error}; start the run again (a full disk: "
                "after freeing space), it goes on from its last checkpoint",
                error,
            ) from error

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, float | None]]:
    """Every complete line of a metrics.jsonl; a last line torn by a crash is left out.

    Raises:
        UserError: any other line that is not a JSON object with a step.
    """
    rows = []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            is_row = isinstance(row, dict) and isinstance(row.get("step"), int)
        except json.JSONDecodeError:
            is_row = False
        if is_row and line.endswith("\n"):
            rows.append(row)
        elif number < len(lines) or line.endswith("\n"):
            raise UserError(f"{path}, line {number}: expected a JSON object with a step, got {line[:60]!r}")
    return rows


def _keep_steps_up_to(path: Path, last_step: int) -> None:
    if not path.exists():
        return
    rows = [row for row in read_metrics(path) if (row["step"] or 0) <= last_step]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


def _plain(value: float) -> float | int | None:
    if isinstance(value, int):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


# The line that tells a person how far a run is: a bar on a terminal, a line now and then elsewhere.


_SHOWN = ("reward/mean", "loss", "grad_norm", "tokens_per_second")
_HELD_OUT = "valid/"


class ProgressSink:
    """Shows step, loss, gradient norm, speed and the time that is left, and every number of an evaluation.

    Without a terminal (a Slurm log, a pipe) it prints a plain line at the first step, at the last one, at
    each step with an evaluation and every `seconds_between_lines`. On a terminal an evaluation stays above
    the bar.

    Args:
        first_step: steps already done before this process, so that they do not count as speed.
        stream: where to write; standard error when not given.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        *,
        total_steps: int,
        first_step: int = 0,
        stream: TextIO | None = None,
        seconds_between_lines: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        target = sys.stderr if stream is None else stream
        self._total = total_steps
        self._first = first_step
        self._stream = target
        self._pause = seconds_between_lines
        self._clock = clock
        self._start = clock()
        self._last_line = float("-inf")
        self._bar = _open_bar(total_steps, first_step, target) if target.isatty() else None

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        now = self._clock()
        left = f"eta {eta(step - self._first, self._total - step, now - self._start)}"
        numbers, held_out, place = _numbers(metrics), _held_out(metrics), f"step {step}/{self._total}"
        if self._bar is not None:
            if held_out:
                line = "  ".join([place, *held_out])
                self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
            self._bar.update(self._bar.task_ids[0], completed=step, numbers="  ".join([*numbers, left]))
        elif held_out or step >= self._total or now - self._last_line >= self._pause:
            self._last_line = now
            print("  ".join([place, *numbers, *held_out, left]), file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the last state of the bar on the screen."""
        if self._bar is not None:
            self._bar.stop()


def eta(steps_done: int, steps_left: int, seconds: float) -> str:
    """Time that is left at the mean speed so far, as h:mm:ss; ? before the first step."""
    if steps_done < 1:
        return "?"
    left = round(seconds / steps_done * max(steps_left, 0))
    return f"{left // 3600}:{left % 3600 // 60:02d}:{left % 60:02d}"


def _open_bar(total: int, completed: int, stream: TextIO) -> Progress:
    bar = Progress(
        TextColumn("step"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
        console=Console(file=stream),
    )
    bar.add_task("step", total=total, completed=completed, numbers="")
    bar.start()
    return bar


def _numbers(metrics: Mapping[str, float]) -> list[str]:
    shown = []
    for name in _SHOWN:
        if name in metrics:
            label = "tokens/s" if name == "tokens_per_second" else name
            value = f"{metrics[name]:,.0f}" if name == "tokens_per_second" else f"{metrics[name]:.4g}"
            shown.append(f"{label} {value}")
    return shown


def _held_out(metrics: Mapping[str, float]) -> list[str]:
    return [f"{name} {value:.4g}" for name, value in metrics.items() if name.startswith(_HELD_OUT)]


def open_metrics(
    directory: RunDirectory, config: TrainingConfig, *, resume_step: int, total_steps: int
) -> MetricsWriter:
    """The writer that config.log asks for: metrics.jsonl always, the others when switched on. Rank 0 only.

    Args:
        resume_step: last step of the resumed checkpoint, 0 for a new run.
    Raises:
        UserError: a package that a sink needs is not installed, a damaged metrics.jsonl.
    """
    log = config.log
    check_trackers(log)
    sinks: list[MetricsSink] = [JsonlSink(directory.metrics, resume_step=resume_step)]
    optional: list[tuple[str, bool, Callable[[], MetricsSink]]] = [
        ("tensorboard", log.tensorboard, lambda: TensorBoardSink(directory, resume_step=resume_step)),
        ("wandb", log.wandb != "off", lambda: WandbSink(directory, config)),
        ("trackio", log.trackio, lambda: TrackioSink(directory, config)),
        ("mlflow", log.mlflow, lambda: MlflowSink(directory, config)),
        ("progress", log.progress, lambda: ProgressSink(total_steps=total_steps, first_step=resume_step)),
    ]
    sinks += [OptionalSink(f"log.{name}", make) for name, is_on, make in optional if is_on]
    return MetricsWriter(sinks)
