"""The benchmark of tokenizing: both sides give the same tokens, and the table says what was measured."""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from tests.unit.data.tokenizers_for_tests import write_byte_level
from tools.benchmarks import tokenizing


def run_here(name: str, directory: Path, tokenizer: Path, arguments: Namespace) -> dict[str, Any]:
    """A turn in this process, which has imported everything."""
    given = {**vars(arguments), "directory": directory, "tokenizer": tokenizer}
    return tokenizing.CONTENDERS[name](Namespace(**given))


def test_both_sides_run_and_agree(monkeypatch: pytest.MonkeyPatch, capsys, tmp_path) -> None:
    options = ["--rows", "64", "--words", "4", "--turns", "1", "--processes", "1"]
    options += ["--tokenizer", str(write_byte_level(tmp_path)), "--json", str(tmp_path / "found.json")]
    monkeypatch.setattr(sys, "argv", ["tokenizing.py", *options])
    monkeypatch.setattr(tokenizing, "_run", run_here)
    monkeypatch.setattr(os, "sched_setaffinity", lambda process, processors: None)
    tokenizing.main()
    told = capsys.readouterr().out
    assert "64 rows of 4 words, 1 processes" in told
    assert "ours / datasets.map alone" in told
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["turns"]["ours"][0]["first_mb"] > 10
    assert found["ratios"]["datasets.map alone"] > 0


def test_different_tokens_are_no_comparison(capsys) -> None:
    turn = {"seconds": 2.0, "seconds_without_reading": 1.0, "whole_mb": 3.0, "first_mb": 1.0}
    turn["processor_seconds"] = 4.0
    arguments = tokenizing._parse([])
    same = {name: [{**turn, "sample": [1]}] for name in ("ours", "datasets")}
    tokenizing._report(same, arguments)
    assert "ours / datasets, with reading     1.00" in capsys.readouterr().out
    other = {name: [{**turn, "sample": [number]}] for number, name in enumerate(("ours", "datasets"))}
    with pytest.raises(AssertionError, match="different tokens"):
        tokenizing._report(other, arguments)
