"""A signal that arrives while stages are being started."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_sftrl.apps.compare import launch
from megatron_sftrl.apps.compare.config import read_compare_config
from megatron_sftrl.apps.compare.plan import stages_of
from tests.e2e.compare_runs import runs_of


class Interrupted:
    """A process that has just been made when Ctrl-C comes; it ends when it is told to."""

    made: list[Interrupted]

    def __init__(self, *_: Any, **__: Any) -> None:
        self.pid, self._code = os.getpid(), None
        Interrupted.made.append(self)
        os.kill(os.getpid(), signal.SIGINT)

    def poll(self) -> int | None:
        return self._code

    def send_signal(self, number: int) -> None:
        self._code = -number


def test_a_signal_between_the_start_of_a_stage_and_its_place_in_the_list_stops_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sft, grpo = runs_of(tmp_path)
    base = {"sft": sft, "grpo": grpo, "eval": {"prompts": ["p.jsonl"]}}
    tree = {"out_dir": str(tmp_path / "out"), "seeds": [0, 1], "base": base, "arms": {}}
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(tree))
    config = read_compare_config(tmp_path / "compare.yaml", [])
    for seed in config.seeds:
        (config.out_dir / "sft" / f"seed-{seed}").mkdir(parents=True)
    Interrupted.made = []
    monkeypatch.setattr(launch.subprocess, "Popen", Interrupted)
    assert launch.Local(config, stages_of(config), [[], []]).run() is False
    assert [each.poll() for each in Interrupted.made] == [-signal.SIGTERM]
