"""The progress line, on a terminal and without one."""

from __future__ import annotations

import io

import pytest

from megatron_sftrl.observability.metrics import ProgressSink, eta


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_without_a_terminal_a_line_comes_first_last_and_now_and_then() -> None:
    clock, stream = Clock(), io.StringIO()
    sink = ProgressSink(total_steps=10, stream=stream, seconds_between_lines=10.0, clock=clock)
    for step in range(1, 11):
        clock.now += 4.0
        sink.write(step, {"loss": 1.23456, "grad_norm": 0.5, "tokens_per_second": 12345.6, "other": 1.0})
    sink.close()
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/10", "4/10", "7/10", "10/10"]
    assert lines[0] == "step 1/10  loss 1.235  grad_norm 0.5  tokens/s 12,346  eta 0:00:36"
    assert lines[-1].endswith("eta 0:00:00")


def test_an_evaluation_has_a_line_of_its_step_with_all_of_its_numbers() -> None:
    clock, stream = Clock(), io.StringIO()
    sink = ProgressSink(total_steps=10, stream=stream, seconds_between_lines=10.0, clock=clock)
    for step in range(1, 5):
        clock.now += 1.0
        held_out = {"valid/loss": 1.5, "valid/nll": 1.25} if step == 3 else {}
        sink.write(step, {"loss": 2.0, "seconds/evaluate": 0.0, **held_out})
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/10", "3/10"]
    assert lines[1] == "step 3/10  loss 2  valid/loss 1.5  valid/nll 1.25  eta 0:00:07"


def test_steps_before_a_resume_are_not_counted_as_speed() -> None:
    clock, stream = Clock(), io.StringIO()
    sink = ProgressSink(total_steps=110, first_step=100, stream=stream, clock=clock)
    clock.now = 60.0
    sink.write(101, {})
    assert stream.getvalue() == "step 101/110  eta 0:09:00\n"


class Terminal(io.StringIO):
    """A stream that calls itself a terminal."""

    def isatty(self) -> bool:
        return True


def test_on_a_terminal_the_bar_shows_steps_and_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "160")
    stream = Terminal()
    sink = ProgressSink(total_steps=4, stream=stream)
    sink.write(1, {"loss": 0.75})
    sink.write(4, {"loss": 0.25})
    sink.close()
    assert "4/4" in stream.getvalue()
    assert "loss 0.25" in stream.getvalue()


def test_on_a_terminal_an_evaluation_stays_when_the_bar_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "60")
    stream = Terminal()
    sink = ProgressSink(total_steps=4, stream=stream)
    sink.write(2, {"loss": 0.75, "valid/loss": 1.5, "valid/[mine]": 0.125})
    sink.write(4, {"loss": 0.25})
    sink.close()
    assert stream.getvalue().count("step 2/4  valid/loss 1.5  valid/[mine] 0.125\n") == 1


@pytest.mark.parametrize(
    ("done", "left", "seconds", "expected"),
    [(0, 5, 1.0, "?"), (2, 4, 10.0, "0:00:20"), (1, 3600, 1.0, "1:00:00"), (4, 0, 3.0, "0:00:00")],
)
def test_the_time_left_is_the_mean_pace(done: int, left: int, seconds: float, expected: str) -> None:
    assert eta(done, left, seconds) == expected
