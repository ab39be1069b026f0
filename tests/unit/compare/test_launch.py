"""Signals that arrive while stages are being started, and a queue that does not answer."""

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
from megatron_sftrl.errors import UserError
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


def test_a_queue_that_does_not_answer_is_asked_again_and_no_job_is_submitted_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """squeue that fails as often as `failures` says, then finds job 7; 8 is one that it has forgotten."""
    monkeypatch.setattr(launch, "_SECONDS_BETWEEN_ASKING", (0.0, 0.0, 0.0))
    failures = tmp_path / "failures"
    squeue = tmp_path / "bin" / "squeue"
    squeue.parent.mkdir()
    squeue.write_text(
        "#!/bin/bash\n"
        f'if [ -s {failures} ]; then sed -i 1d {failures}; echo "Unable to contact slurm" >&2; exit 1; fi\n'
        'case "$*" in *=8) echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1;; esac\n'
        "echo 7\n"
    )
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{squeue.parent}:{os.environ['PATH']}")
    files = launch.StageFiles(place=tmp_path / "sft")
    assert files.queued_job() is None
    files.job.write_text("7\n")
    for number in range(4):
        failures.write_text("x\n" * number)
        assert files.queued_job() == "7"
    failures.write_text("x\n" * 4)
    with pytest.raises(UserError, match=r"whether job 7 of .* is still there \(Unable to contact slurm\)"):
        files.queued_job()
    files.job.write_text("8\n")
    assert files.queued_job() is None
