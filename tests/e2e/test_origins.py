"""The weights that a run began with stay its weights, whatever their path has come to name meanwhile."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.e2e.product import sftrl, sftrl_each
from tests.e2e.project import Project, metrics_of, without_timing

SHORT, WHOLE = 2, 4
# Constant: a longer run is then the same run, and goes on.
STEADY = ("optim={lr: 0.01, eps: 0.0001}", "data.valid=[]", "train.eval_every=null", "checkpoint.every=2")


def base(project: Project, run_dir: Path, steps: int) -> list[str]:
    """A run that others begin from."""
    plain = ("loss={name: sft}", "reference=null", "checkpoint.keep_last=1")
    return ["sft", str(project.yaml), f"run_dir={run_dir}", *STEADY, *plain, f"train.steps={steps}"]


def gift(project: Project, run_dir: Path, steps: int, *overrides: str) -> list[str]:
    """A run with a frozen reference."""
    return ["sft", str(project.yaml), f"run_dir={run_dir}", *STEADY, *overrides, f"train.steps={steps}"]


@pytest.fixture
def started(project: Project, tmp_path: Path) -> Path:
    """A folder with a base of two steps, a run of four from it, and one that stopped after two."""
    sftrl(*base(project, tmp_path / "base", SHORT))
    start = f"model.init_checkpoint={tmp_path / 'base'}"
    sftrl(*gift(project, tmp_path / "whole", WHOLE, start))
    sftrl(*gift(project, tmp_path / "run", SHORT, start))
    return tmp_path


def test_a_resume_keeps_the_reference_it_began_with_and_refuses_when_that_is_gone_or_another(
    project: Project, started: Path
) -> None:
    start = f"model.init_checkpoint={started / 'base'}"
    sftrl(*base(project, started / "base", SHORT), "checkpoint.keep_last=9")
    sftrl(*base(project, started / "base", WHOLE), "checkpoint.keep_last=9")
    stopped = shutil.copytree(started / "run", started / "stopped")
    (ended,) = sftrl_each([gift(project, started / "run", WHOLE, start)])
    ended.expect(0)
    assert "this run stays with" in ended.stderr
    assert "has come to step-00000004" in ended.stderr
    assert without_timing(metrics_of(started / "run")) == without_timing(metrics_of(started / "whole"))

    old, new = (started / f"base/checkpoints/step-{step:08d}" for step in (SHORT, WHOLE))
    again = [gift(project, stopped, WHOLE, start)]
    shutil.rmtree(old)
    (ended,) = sftrl_each(again)
    ended.expect(2)
    assert f"model.init_checkpoint: this run began with {old}, step 2, which is gone" in ended.stderr
    assert "begin again in another run_dir" in ended.stderr
    shutil.copytree(new, old)
    (ended,) = sftrl_each(again)
    ended.expect(2)
    assert "other weights than this run began with" in ended.stderr


def test_a_start_that_nothing_is_derived_from_may_be_gone_at_a_resume(
    project: Project, tmp_path: Path
) -> None:
    sftrl(*base(project, tmp_path / "base", SHORT))
    plain = (f"model.init_checkpoint={tmp_path / 'base'}", "loss={name: sft}", "reference=null")
    sftrl(*gift(project, tmp_path / "run", SHORT, *plain))
    origins = json.loads((tmp_path / "run/origins.json").read_text())
    assert origins["model.init_checkpoint"]["place"] == "checkpoints/step-00000002"
    shutil.rmtree(tmp_path / "base")
    sftrl(*gift(project, tmp_path / "run", WHOLE, *plain))
    assert json.loads((tmp_path / "run/origins.json").read_text()) == origins
