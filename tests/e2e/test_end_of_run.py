"""A finished run says where its result is, and commands that take it: they are run here as they were said."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_sftrl.cli import main
from megatron_sftrl.engine import parallel
from megatron_sftrl.rl.rewards.pool import RewardPool
from megatron_sftrl.rollout.in_process import InProcessEngine
from tests.e2e.grpo_project import MAX_NEW_TOKENS, NUM_PROMPTS, GrpoProject
from tests.e2e.product import TIMEOUT_S, Ended, sftrl, sftrl_each
from tests.e2e.project import NUM_VALID_ROWS, Project, metrics_of, read_rows
from tests.ranks import free_port, run_ranks


def last_lines(ended: Ended) -> dict[str, str]:
    """What the log says from "finished" on, by what stands in front of the colon."""
    said = re.findall(r"^\S+ \S+ \[rank 0\] INFO: ([^:\n]+): (.*)$", ended.expect(0).stderr, re.MULTILINE)
    first = next(place for place, (label, _) in enumerate(said) if label.startswith("finished"))
    return dict(said[first:])


def words(command: str) -> list[str]:
    """Of a command that was said, without the program."""
    program, *arguments = shlex.split(command)
    assert program == "sftrl"
    return arguments


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("end of run")  # a path that a shell has to be told with quotes


@pytest.fixture(scope="module")
def sft_end(project: Project, root: Path) -> dict[str, str]:
    """The end of two steps, said again when the finished run is started a second time."""
    short = ["train.steps=2", "train.eval_every=0", "optim.warmup_steps=0"]
    command = ["sft", str(project.yaml), f"run_dir={root / 'sft'}", *short]
    first, second = map(last_lines, sftrl_each([command, command]))
    assert first == second
    return first


def test_supervised_training_ends_with_its_result_in_at_most_six_lines(
    sft_end: dict[str, str], root: Path
) -> None:
    assert list(sft_end) == [
        "finished 2 steps", "last checkpoint", "last numbers", "export", "try it", "go on with GRPO",
    ]  # fmt: skip
    assert sft_end["last checkpoint"] == f"{root}/sft/checkpoints/step-00000002"
    last = metrics_of(root / "sft")[-1]
    assert sft_end["last numbers"] == f"loss {last['loss']:.4g}, valid/loss {last['valid/loss']:.4g}"


@pytest.mark.parametrize("run_dir", ["one_process", "two_processes"])
def test_nothing_is_printed_behind_it(run_dir: str, request: pytest.FixtureRequest) -> None:
    """With Weights & Biases and TensorBoard on, or under torchrun."""
    said = (request.getfixturevalue(run_dir).parent / "log").read_text()
    assert " INFO: go on with GRPO: " in said.rstrip("\n").splitlines()[-1], said


def said_by(arguments: list[str], port: int) -> str:
    """Standard error of a command, with a line when engine, reward workers and process groups are closed."""
    os.environ["MASTER_PORT"] = str(port)
    said = io.StringIO()
    with contextlib.redirect_stderr(said), pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (InProcessEngine, "close"),
            (RewardPool, "close"),
            (parallel, "destroy_parallel"),
        ):
            patch.setattr(owner, name, telling(getattr(owner, name)))
        assert main(arguments) == 0
    return said.getvalue()


def telling(close: Callable[..., None]) -> Callable[..., None]:
    def told(*arguments: object) -> None:
        close(*arguments)
        print(f"closed: {close.__qualname__}", file=sys.stderr)

    return told


def test_it_is_said_when_engine_workers_and_groups_are_closed(grpo: GrpoProject, root: Path) -> None:
    command = grpo.command(root / "closed", "train.steps=1")
    (said,) = run_ranks(1, said_by, command, free_port(), timeout_s=TIMEOUT_S, group=False)
    before, end = said.split("INFO: finished 1 steps")
    assert {line for line in before.splitlines() if line.startswith("closed: ")} == {
        "closed: InProcessEngine.close",
        "closed: RewardPool.close",
        "closed: destroy_parallel",
    }
    assert "closed" not in end.replace(str(root / "closed"), "")


def test_what_supervised_training_says_can_be_done_with_its_result_works(
    sft_end: dict[str, str], root: Path, grpo: GrpoProject
) -> None:
    sftrl(*words(sft_end["export"]))
    assert (root / "sft/hf-step-00000002/model.safetensors").is_file()
    sftrl(*words(sft_end["try it"]))
    answered = read_rows(root / "sft/responses-step-00000002.jsonl")
    assert [len(row["responses"]) for row in answered] == [1] * NUM_VALID_ROWS
    go_on = [str(grpo.yaml) if word == "GRPO.yaml" else word for word in words(sft_end["go on with GRPO"])]
    short = [f"run_dir={root / 'rl'}", "train.steps=1", "model.architecture.num_layers=2"]
    said = sftrl(*go_on, *short).stderr
    assert f"weights from model.init_checkpoint: {sft_end['last checkpoint']}" in said


def test_grpo_ends_with_its_rewards_and_goes_on_in_a_new_run(grpo: GrpoProject, root: Path) -> None:
    run_dir = root / "grpo"
    more = ["train.steps=1", f"data.valid=[{grpo.prompts}]"]
    end = last_lines(sftrl_each([[*grpo.command(run_dir), *more]])[0])
    last = metrics_of(run_dir)[-1]
    names = ("loss", "reward/mean", "valid/reward/mean")
    assert end["last numbers"] == ", ".join(f"{name} {last[name]:.4g}" for name in names)
    sftrl(*words(end["export"]))
    sftrl(*words(end["try it"]))
    answered = read_rows(run_dir / "responses-step-00000001.jsonl")
    assert len(answered) == NUM_PROMPTS
    assert max(length for row in answered for length in row["num_tokens"]) <= MAX_NEW_TOKENS
    sftrl(*words(end["go on from here in a new run"]))
    assert [row["step"] for row in metrics_of(root / "grpo-2")] == [1]
