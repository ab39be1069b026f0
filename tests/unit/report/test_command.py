"""`sftrl report`: runs over each other, whatever state they are in."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from megatron_sftrl.apps.report.command import curves, differences, last_values, read_runs, thinned
from megatron_sftrl.cli import main

CONFIG = "run_dir: {run_dir}\noptim:\n  lr: {lr}\n  name: adamw\n"


def write_run(directory: Path, rows: list[dict], *, lr: float = 0.1, tail: str = "") -> Path:
    directory.mkdir(parents=True)
    (directory / "resolved.yaml").write_text(CONFIG.format(run_dir=directory, lr=lr))
    lines = "".join(json.dumps({"step": step, **row}) + "\n" for step, row in enumerate(rows, start=1))
    (directory / "metrics.jsonl").write_text(lines + tail)
    return directory


ROWS = [
    {"loss": 3.0, "lr": 0.1, "gift/weight": 0.5, "same": 1},
    {"loss": None, "lr": 0.1, "gift/weight": 0.6, "same": 1, "valid/loss": 2.5},
    {"loss": 2.0, "lr": 0.1, "gift/weight": 0.7, "same": 1},
]


def test_runs_are_drawn_over_each_other_with_their_held_out_data(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "one", ROWS), write_run(tmp_path / "two", [{"loss": 4.0}, {"loss": 1.0}])
    found = {curve.title: curve for curve in curves(read_runs([one, two]))}
    assert list(found) == ["loss", "lr", "gift/weight"]
    lines = [(line.label, line.x, line.y, line.color, line.is_dashed) for line in found["loss"].series]
    assert lines == [
        ("one", (1, 3), (3.0, 2.0), 0, False),
        ("one, held out", (2,), (2.5,), 0, True),
        ("two", (1, 2), (4.0, 1.0), 1, False),
    ]
    assert [line.label for line in found["gift/weight"].series] == ["one"]


def test_the_tables_have_the_last_values_and_the_settings_that_differ(tmp_path: Path) -> None:
    runs = read_runs(
        [
            write_run(tmp_path / "one", [*ROWS, {"loss": None, "tokens": 123456.0}]),
            write_run(tmp_path / "two", ROWS, lr=0.2),
        ]
    )
    values = {name: cells for name, *cells in last_values(runs).rows}
    assert values["step"] == ["4", "3"]
    assert values["loss"] == ["not finite", "2"]
    assert values["valid/loss"] == ["2.5", "2.5"]
    assert values["tokens"] == ["123,456", ""]
    assert differences(runs).rows == (("optim.lr", "0.1", "0.2"),)


def test_the_page_of_a_run_that_goes_on_has_its_complete_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "<b>run", ROWS, tail='{"step": 4, "loss": 1.')
    page = tmp_path / "new" / "page.html"
    assert main(["report", str(run), "--out", str(page)]) == 0
    text = page.read_text()
    assert "&lt;b&gt;run" in text
    assert "<b>run" not in text
    assert "step 3; not finite: loss in 1 steps" in text
    assert len(re.findall("data:image/svg", text)) == 3
    assert "Settings that differ" not in text
    assert re.search(r"^loss +2$", capsys.readouterr().out, re.MULTILINE)
    assert [each.name for each in page.parent.iterdir()] == ["page.html"]


def test_a_run_without_a_finished_step_is_told_beside_others_and_refused_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, started = write_run(tmp_path / "one", ROWS), write_run(tmp_path / "started", [])
    (started / "metrics.jsonl").unlink()
    page = tmp_path / "page.html"
    assert main(["report", str(one), str(started), "--out", str(page)]) == 0
    assert "started): no step is finished yet" in page.read_text()
    before = page.read_text()
    assert main(["report", str(started), "--out", str(page)]) == 2
    assert "no step is finished in" in capsys.readouterr().err
    assert page.read_text() == before


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "one", ROWS)
    for words, message in (
        ([str(tmp_path)], "expected a run directory"),
        ([str(run), f"{run}/../one"], "expected each run once"),
        ([str(run), "--out", str(tmp_path)], "--out: expected a file"),
    ):
        assert main(["report", *words]) == 2
        assert message in capsys.readouterr().err
    (run / "metrics.jsonl").write_text('{"loss": 1}\n{"step": 1}\n')
    assert main(["report", str(run)]) == 2
    assert "metrics.jsonl, line 1: expected a JSON object with a step" in capsys.readouterr().err


def test_a_missing_matplotlib_is_told_with_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["report", str(tmp_path)]) == 2
    assert "matplotlib, which is not installed" in (told := capsys.readouterr().err)
    assert "extra report" in told


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name / "run", ROWS) for name in ("a", "b")]
    assert [run.label for run in read_runs(runs)] == [str(run) for run in runs]


def test_a_long_line_keeps_its_peaks_and_its_order() -> None:
    points = [(step, 0.001 * step) for step in range(10_001)]
    points[5003] = (5003, 99.0)
    points[7001] = (7001, -99.0)
    kept = thinned(points)
    assert len(kept) <= 1000
    assert {points[5003], points[7001], points[0]} <= set(kept)
    assert kept == sorted(kept)
    assert thinned(points[:1000]) == points[:1000]
