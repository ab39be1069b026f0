"""One dictionary of numbers per step, handed to every place that keeps or shows them."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from megatron_sftrl.errors import UserError, error_of
from megatron_sftrl.observability.run_directory import write_atomically


class MetricsSink(Protocol):
    """A place for a step's numbers."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the numbers of one step; steps come in rising order."""
        ...

    def close(self) -> None:
        """Finish what is buffered."""
        ...


class MetricsWriter:
    """Fans a step's numbers out to its sinks and closes all of them at the end.

    Args:
        sinks: in the order in which they receive each step; keep metrics.jsonl first.
    """

    def __init__(self, sinks: Sequence[MetricsSink]) -> None:
        self._sinks = tuple(sinks)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand one step's numbers to every sink."""
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

    A tracker that is down for an hour must not end weeks of training; metrics.jsonl has every number.

    Args:
        name: for the message.
        open_sink: makes the place; a UserError of its own passes through.
    """

    def __init__(self, name: str, open_sink: Callable[[], MetricsSink]) -> None:
        self._name = name
        self._sink: MetricsSink | None = None
        with self._told():
            self._sink = open_sink()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand the numbers on, as long as nothing has failed."""
        if self._sink is not None:
            with self._told():
                self._sink.write(step, metrics)

    def close(self) -> None:
        """Close the place, as long as nothing has failed."""
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
            print(
                f"{self._name} failed and is off until the run starts again: "
                f"{type(error).__name__}: {error}; metrics.jsonl has all numbers",
                file=sys.stderr,
                flush=True,
            )


class JsonlSink:
    """metrics.jsonl: one JSON object per step, on disk as soon as the step is over.

    A number that is not finite is written as null, since JSON has no NaN.

    Args:
        path: the file; created, or continued.
        resume_step: last step that the resumed checkpoint holds; later lines are removed. 0 starts anew.
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
        """Close the file."""
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
