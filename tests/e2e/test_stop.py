"""Who asks a run to stop gets a checkpoint at the next step boundary, and the rest at the next start."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.curves import unequal_tensors
from tests.e2e.grpo_project import NUM_STEPS as NUM_ROLLOUTS
from tests.e2e.grpo_project import GrpoProject
from tests.e2e.product import Ended, call_main, sftrl, sftrl_each
from tests.e2e.project import NUM_STEPS, Project, metrics_of, without_timing
from tests.ranks import free_port, run_ranks

STOPPED = 75


def stopped(command: list[str], file: Path, *, is_there: bool) -> Ended:
    """The command line in a rank worker, told to look at a file that is there or not."""
    if is_there:
        file.touch()
    return run_ranks(1, main_with_stop_file, command, str(file), free_port(), group=False, timeout_s=300)[0]


def main_with_stop_file(command: list[str], file: str, port: int) -> Ended:
    os.environ["SFTRL_STOP_FILE"] = file
    try:
        return call_main([command], [port])[0]
    finally:
        del os.environ["SFTRL_STOP_FILE"]


def assert_same(ours: Path, truth: Path, steps: int) -> None:
    assert without_timing(metrics_of(ours)) == without_timing(metrics_of(truth))
    final = f"checkpoints/step-{steps:08d}"
    assert unequal_tensors(ours / final, truth / final) == []


@pytest.mark.parametrize("saving", ["checkpoint.async_save=false", "checkpoint={every: 1, async_save: true}"])
def test_sft_stops_with_a_checkpoint_and_code_75_and_goes_on(
    saving: str, project: Project, one_process: Path, tmp_path: Path
) -> None:
    command = ["sft", str(project.yaml), f"run_dir={tmp_path / 'run'}", saving]
    done = stopped(command, tmp_path / "stop", is_there=True).expect(STOPPED)
    assert f"SIGUSR1: stopping after step 1 of {NUM_STEPS} with a checkpoint" in done.stderr
    assert [row["step"] for row in metrics_of(tmp_path / "run")] == [1]
    stopped(command, tmp_path / "other", is_there=False).expect(0)
    assert_same(tmp_path / "run", one_process, NUM_STEPS)


def test_grpo_stops_with_a_checkpoint_and_code_75_and_goes_on(
    grpo: GrpoProject, grpo_run: Path, tmp_path: Path
) -> None:
    command = [*grpo.command(tmp_path / "run"), "checkpoint.async_save=true"]
    stopped(command, tmp_path / "stop", is_there=True).expect(STOPPED)
    assert [row["step"] for row in metrics_of(tmp_path / "run")] == [1]
    sftrl(*command)
    assert_same(tmp_path / "run", grpo_run, NUM_ROLLOUTS)


def test_a_request_at_the_last_step_is_a_finished_run(project: Project, tmp_path: Path) -> None:
    short = ["train.steps=1", "optim.warmup_steps=0"]
    command = ["sft", str(project.yaml), f"run_dir={tmp_path / 'run'}", *short]
    stopped(command, tmp_path / "stop", is_there=True).expect(0)
    assert [row["step"] for row in metrics_of(tmp_path / "run")] == [1]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_any_rank_is_every_rank_s_answer_and_the_handlers_go_back(number: signal.Signals) -> None:
    assert run_ranks(2, answers, int(number), group=False) == [[False, True, True], [False, True, True]]


def answers(number: int) -> list[bool]:
    """On every rank: the answers before and after rank 1 gets the signal."""
    import torch.distributed as dist

    from megatron_sftrl.config.schema import ParallelSection
    from megatron_sftrl.engine.parallel import parallel_context
    from megatron_sftrl.trainers.run import StopRequest

    def note(received: int, frame: object) -> None:
        raise AssertionError("the handler from before is not in force meanwhile")

    before: Callable | int | None = signal.signal(number, note)
    with parallel_context(ParallelSection()) as parallel, StopRequest() as stop:
        found = [stop.agreed(parallel, step=1, num_steps=3)]
        if dist.get_rank() == 1:
            os.kill(os.getpid(), number)
        found += [stop.agreed(parallel, step=step, num_steps=3) for step in (2, 3)]
    assert signal.signal(number, before) is note
    return found


def test_a_gate_ends_supervised_training_with_a_checkpoint_and_warns_until_then(
    project: Project, tmp_path: Path
) -> None:
    gates = "gates=[{metric: nll, below: 99, steps: 2, action: stop}, {metric: lr, below: 1}]"
    unknown = "gates=[{metric: nnl, above: 1}]"
    command = ["sft", str(project.yaml), "data.valid=[]", "train.eval_every=null"]
    ended, refused = sftrl_each(
        [[*command, f"run_dir={tmp_path / name}", gate] for name, gate in (("a", gates), ("b", unknown))]
    )
    assert "error: a gate ended the run, its checkpoint is saved: step 2: nll = " in ended.expect(2).stderr
    assert re.findall(r"gate: step \d+: \w+", ended.stderr) == [
        "gate: step 1: lr",
        "gate: step 2: nll",
        "gate: step 2: lr",
    ]
    assert (tmp_path / "a/checkpoints/step-00000002").is_dir()
    assert "gates: there is no metric 'nnl' (did you mean 'nll'?)" in refused.expect(2).stderr
