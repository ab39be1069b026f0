"""What the benchmark of the losses says: its table, its limits, its file; and one run of a process."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tools.benchmarks import loss_report
from tools.benchmarks import losses as benchmark_losses
from tools.benchmarks.loss_contenders import Sizes
from tools.benchmarks.losses import ContenderError

TINY = ["--tokens", "64", "--vocab-size", "512", "--hidden", "32"]


def turns(*pairs: tuple[float, float]) -> list[dict[str, float]]:
    return [{"seconds": seconds, "peak_bytes": peak} for seconds, peak in pairs]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["losses.py", *TINY, *arguments])
    benchmark_losses.main()


def test_figures_are_medians_of_ratios_within_a_repeat() -> None:
    found = {
        "plain": turns((1.0, 100e6), (10.0, 100e6), (100.0, 200e6)),  # a machine that slows down
        "gift": turns((1.5, 20e6), (13.0, 30e6), (100.0, 20e6)),
        "gift, released": turns((3.0, 400e6), (13.0, 300e6), (400.0, 100e6)),
    }
    facts = loss_report.loss_facts(found, {})
    assert facts["time"] == {"plain": 1.0, "gift": 1.3, "gift, released": 3.0}
    assert facts["memory"] == {"plain": 1.0, "gift": 0.2, "gift, released": 3.0}
    assert facts["seconds"] == {"plain": 10.0, "gift": 13.0, "gift, released": 13.0}
    assert facts["of_released"] == {"gift": {"time": 0.5, "memory": 0.1}}


def test_the_table_has_a_line_for_each_and_names_who_is_above_a_limit_or_missing() -> None:
    found = {
        "plain": turns((2.0, 100e6)),
        "sft, released": turns((9.0, 900e6)),  # has no limit
        "sft": turns((2.4, 19e6)),
        "gift": turns((2.8, 25e6)),  # exactly at both
        "curiosft": turns((3.2, 26e6)),
        "entropy": turns((9.0, 900e6)),  # has no limit
        "pear block": turns((1.0, 30e6)),
    }
    facts = loss_report.loss_facts(found, {"liger": "needs that", "x, y": "needs that", "z": "broke"})
    head, *lines = loss_report.report_lines(facts)
    assert head.split() == ["seconds", "of", "plain", "limit", "peak", "MB", "of", "plain", "limit"]
    rows = dict(zip(found, lines, strict=False))
    assert all(row.startswith(f"{name} ") for name, row in rows.items())
    assert rows["sft"].split()[1:] == ["2.40", "1.20", "1.1", "19", "0.19", "0.2"]
    assert rows["entropy"].split()[1:] == ["9.00", "4.50", "900", "9.00"]
    assert rows["pear block"].split()[2:] == ["1.00", "0.50", "1.5", "30", "0.30", "0.25"]
    assert lines[len(found) :] == [
        "above the limit of time: sft, curiosft; of memory: curiosft, pear block",
        "sft, of the released formula's: time 0.27, memory 0.02",
        "left out: liger; x, y (needs that)",
        "left out: z (broke)",
    ]
    facts = loss_report.loss_facts({name: found[name] for name in ("plain", "gift")}, {})
    assert loss_report.report_lines(facts)[3:] == ["above the limit of time: none; of memory: none"]


def test_the_share_of_the_released_formula_is_printed_with_its_limit() -> None:
    found = {"plain": turns((1, 1)), "gift, released": turns((4, 8)), "gift": turns((1, 1))}
    lines = loss_report.report_lines(loss_report.loss_facts(found, {}))
    assert "gift, of the released formula's: time 0.25 (limit 0.5), memory 0.12 (limit 0.1)" in lines


def test_a_rate_is_told_with_the_shares_of_it() -> None:
    line = loss_report.fraction_line("of a copy's", "GB/s", 1e9, {"copy": 4e12, "sft": 0.875, "gift": 0.5})
    assert line == "of a copy's 4000 GB/s: sft 0.88, gift 0.50"


def test_a_process_fills_the_table_and_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found.json"
    run(monkeypatch, "--repeats", "1", "--only", "plain", "--out", str(out))
    printed = capsys.readouterr().out.splitlines()
    facts = json.loads(out.read_text())
    assert list(tmp_path.iterdir()) == [out]
    assert {key: facts[key] for key in ("tokens", "vocab_size", "hidden", "tp")} == {
        "tokens": 64,
        "vocab_size": 512,
        "hidden": 32,
        "tp": 1,
    }
    assert printed[0] == f"T 64, V 512, H 32, tp 1, {facts['device']}"
    assert printed[1:] == loss_report.report_lines(facts)
    assert list(facts["turns"]) == ["plain"]
    (found,) = facts["turns"]["plain"]
    assert found["seconds"] > 0
    assert found["peak_bytes"] > 0


def test_a_kernel_that_fails_is_left_out_and_a_contender_of_ours_ends_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried = []
    monkeypatch.setattr(
        benchmark_losses, "contenders", lambda **_: (["plain", "liger", "sft"], {"x": "no y"})
    )

    def in_children(name: str, sizes: Sizes) -> dict[str, float]:
        tried.append(name)
        if name == broken:
            raise ContenderError(f"Traceback:\n  here\nx.InterpreterError: no {name}\n[W] bye\n")
        return {"seconds": 1.0, "peak_bytes": 1e6}

    monkeypatch.setattr(benchmark_losses, "_in_children", in_children)
    broken = "liger"
    run(monkeypatch, "--repeats", "2")
    assert tried == ["plain", "liger", "sft", "plain", "sft"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == ["left out: x (no y)", "left out: liger (failed: x.InterpreterError: no liger)"]
    assert not any(line.startswith("liger") for line in lines)
    broken = "sft"
    with pytest.raises(SystemExit, match="sft failed:\nTraceback"):
        run(monkeypatch, "--repeats", "2")


def test_an_unknown_contender_is_refused_and_an_absent_one_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, "--only", "sft+gif+gift, released", "--tp", "2")
    said = capsys.readouterr().err
    assert "gif (unknown), gift, released (one process only); known: plain + " in said
