"""checkpoint.async_save in the YAML of either trainer decides whether saves go on beside the steps."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest

from megatron_sftrl.engine.checkpoint.background import BackgroundAction
from tests.e2e.grpo_project import GrpoProject
from tests.e2e.product import call_main
from tests.e2e.project import Project
from tests.ranks import free_port, run_ranks

SAVES = 2


def saves_beside_training(command: list[str], port: int) -> int:
    """In a rank worker: how many saves of the command line went to a thread."""
    start = BackgroundAction.start
    with mock.patch.object(BackgroundAction, "start", autospec=True, side_effect=start) as started:
        (ended,) = call_main([command], [port])
    ended.expect(0)
    return started.call_count


@pytest.mark.parametrize(("async_save", "expected"), [("true", SAVES), ("false", 0)])
@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_the_trainer_saves_as_the_configuration_says(
    kind: str, async_save: str, expected: int, project: Project, grpo: GrpoProject, tmp_path: Path
) -> None:
    command = {
        "sft": ["sft", str(project.yaml), f"run_dir={tmp_path / 'run'}", "optim.warmup_steps=0"],
        "grpo": grpo.command(tmp_path / "run", "rollout.passes=1"),
    }[kind]
    command += [f"train.steps={SAVES}", f"checkpoint={{every: 1, async_save: {async_save}}}"]
    found = run_ranks(1, saves_beside_training, command, free_port(), group=False, timeout_s=120)
    assert found == [expected]
    assert len([*(tmp_path / "run/checkpoints").glob("step-*")]) == SAVES
