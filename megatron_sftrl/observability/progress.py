"""The line that tells a person how far a run is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

_SHOWN = ("reward/mean", "loss", "grad_norm", "tokens_per_second")


class ProgressSink:
    """Shows step, loss, gradient norm, speed and the time that is left.

    Without a terminal (a Slurm log, a pipe) it prints a plain line at the first step, at the last one and
    every `seconds_between_lines`.

    Args:
        total_steps: of the whole run.
        first_step: steps already done before this process, so that they do not count as speed.
        stream: where to write; standard error when not given.
        seconds_between_lines: without a terminal.
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
        """Show one step's numbers."""
        now = self._clock()
        left = eta(step - self._first, self._total - step, now - self._start)
        text = "  ".join([*_numbers(metrics), f"eta {left}"])
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, numbers=text)
        elif step >= self._total or now - self._last_line >= self._pause:
            self._last_line = now
            print(f"step {step}/{self._total}  {text}", file=self._stream, flush=True)

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
