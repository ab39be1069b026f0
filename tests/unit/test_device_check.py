"""The check of a borrowed GPU: no part stops the next one, and what was measured is kept."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tools import device_check
from tools.device_check import Number, Part, junit_counts, loss_numbers, run_parts, step_numbers

WRITES = "import sys, json; json.dump({'value': float(sys.argv[2])}, open(sys.argv[1], 'w'))"
HANGS = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"


@pytest.fixture(autouse=True)
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_check, "machine", lambda: {"device": "a card"})


def part(folder: Path, name: str, code: str, *options: str, limit: float | None = None, **more) -> Part:
    (folder / f"{name}_module.py").write_text(code)

    def read(file: Path) -> dict[str, Number]:
        return {"value": Number(value=json.loads(file.read_text())["value"], limit=limit)}

    command = (f"{name}_module", "{out}", *options)
    return Part(name=name, command=command, seconds=more.pop("seconds", 60.0), read=read, **more)


def test_a_part_that_fails_or_hangs_or_misses_its_bound_is_told_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    parts = [
        part(tmp_path, "raises", "raise SystemExit('no such card')"),
        part(tmp_path, "hangs", HANGS, seconds=1.0),
        part(tmp_path, "slow", WRITES, "1.5", limit=1.0),
        part(tmp_path, "silent", ""),
        part(tmp_path, "good", WRITES, "0.5", limit=1.0),
    ]
    start = time.monotonic()
    outcomes = run_parts(parts, tmp_path / "out", seconds=120.0, rehearse=False)
    assert time.monotonic() - start < 50, "a child of a part that was ended was waited for"
    assert [outcome.status for outcome in outcomes] == ["failed", "out of time", "missed", "failed", "passed"]
    assert "no such card" in outcomes[0].said
    kept = json.loads((tmp_path / "out" / "device_check.json").read_text())
    assert kept["machine"] == {"device": "a card"}
    assert [each["part"] for each in kept["parts"]] == ["raises", "hangs", "slow", "silent", "good"]
    table = (tmp_path / "out" / "device_check.txt").read_text()
    assert "1.5 (<= 1) MISSED" in table
    assert "0.5 (<= 1)\n" in table


def test_nothing_begins_when_the_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    outcomes = run_parts([part(tmp_path, "late", WRITES, "1")], tmp_path, seconds=1.0, rehearse=False)
    assert [outcome.status for outcome in outcomes] == ["not begun"]


def test_a_rehearsal_has_small_sizes_and_no_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    code = "import sys, json; json.dump({'value': float(sys.argv[3])}, open(sys.argv[1], 'w'))"
    sized = part(tmp_path, "sized", code, "--size", "9", limit=1.0, rehearsed={"--size": "3"})
    for rehearse, status, value in ((False, "missed", 9.0), (True, "passed", 3.0)):
        (outcome,) = run_parts([sized], tmp_path, seconds=60.0, rehearse=rehearse)
        assert (outcome.status, outcome.numbers["value"].value) == (status, value)


def test_tests_that_were_all_skipped_have_shown_nothing(tmp_path: Path) -> None:
    file = tmp_path / "junit.xml"
    suite = '<testsuites><testsuite tests="5" failures="1" errors="1" skipped="{}"/></testsuites>'
    file.write_text(suite.format(2))
    numbers = junit_counts(file)
    assert {name: number.value for name, number in numbers.items()} == {
        "passed": 1,
        "failed": 2,
        "skipped": 2,
    }
    assert not numbers["failed"].is_kept
    file.write_text('<testsuites><testsuite tests="3" failures="0" errors="0" skipped="3"/></testsuites>')
    assert not junit_counts(file)["passed"].is_kept


def test_the_numbers_of_the_benchmarks_have_their_bounds(tmp_path: Path) -> None:
    file = tmp_path / "losses.json"
    facts = {
        "time": {"plain": 1.0, "sft": 1.1, "gift": 1.3, "liger": 1.2},
        "seconds": {"plain": 2.0, "sft": 2.2, "gift": 2.6, "liger": 2.4},
        "peak_bytes": {"plain": 100, "sft": 30, "gift": 40, "liger": 25},
        "bandwidth": {"copy, bytes per second": 4e12, "sft": 0.7, "gift": 0.9},
    }
    file.write_text(json.dumps(facts))
    numbers = loss_numbers(file)
    missed = {name for name, number in numbers.items() if not number.is_kept}
    assert missed == {"sft, time of plain", "sft, memory of liger", "sft, share of a copy's bandwidth"}
    assert numbers["sft, time of liger"].value == pytest.approx(2.2 / 2.4)
    file.write_text(json.dumps({"losses": {"gift": {"ratio": 1.6, "limit": 1.45, "seconds": 1.0}}}))
    assert not step_numbers(file)["gift"].is_kept
