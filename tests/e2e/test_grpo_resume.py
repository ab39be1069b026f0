"""A GRPO run goes on with the same rollouts as if it had never stopped."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sftrl.engine.checkpoint.directory import read_record
from tests.e2e.curves import unequal_tensors
from tests.e2e.grpo_project import GrpoProject, samples_of
from tests.e2e.product import run_product, sftrl, sftrl_each, start_product
from tests.e2e.project import metrics_of, without_timing
from tests.e2e.test_resume import wait_for_step

# What a gate compares later steps with is from the first half.
PLAIN = ("gates=[{metric: rollout/entropy_top_fifth, falls_by: 0.9, between: [2, 9]}]",)
# Half of the prompts are useless: how many a step draws has to go on, too.
DYNAMIC = ("filters={dynamic_sampling: true, max_rounds: 4}",)
# A reference that follows the policy has to come back from the checkpoint, the moments too.
MOVING = ("loss={name: grpo, kl_coefficient: 0.1}", "reference={kind: moving_average, sync_every: 2}")


def command(grpo: GrpoProject, run_dir: Path, *overrides: str) -> list[str]:
    return grpo.command(run_dir, grpo.reward("hopeless"), "rollout.passes=1", *overrides)


def assert_same(ours: Path, truth: Path, *, steps: int) -> None:
    assert [row["step"] for row in metrics_of(ours)] == list(range(1, steps + 1))
    assert without_timing(metrics_of(ours)) == without_timing(metrics_of(truth))
    assert (ours / "rollouts.jsonl").read_bytes() == (truth / "rollouts.jsonl").read_bytes()
    final = f"checkpoints/step-{steps:08d}"
    assert unequal_tensors(ours / final, truth / final) == []


@pytest.mark.parametrize("how", [PLAIN, DYNAMIC, MOVING], ids=["plain", "dynamic sampling", "reference"])
def test_three_steps_and_three_more_are_six(how: tuple[str, ...], grpo: GrpoProject, tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    for done in sftrl_each(
        [
            command(grpo, whole, "train.steps=6", *how),
            command(grpo, halves, "train.steps=3", *how),
            command(grpo, halves, "train.steps=6", *how),
        ]
    ):
        done.expect(0)
    assert_same(halves, whole, steps=6)
    assert metrics_of(whole)[-1]["updates"] > 0
    if how == PLAIN:
        start = metrics_of(whole)[1]["rollout/entropy_top_fifth"]
        for run in (whole, halves):
            trainer = read_record(run / "checkpoints" / "step-00000006").trainer
            assert trainer.gate_starts == {"rollout/entropy_top_fifth@2": [2, start]}
    if how == DYNAMIC:
        drawn = [row["rollout/prompts"] for row in metrics_of(whole)[:3]]
        assert sum(drawn) != 3 * 4, "each step drew as many as without dynamic sampling: the test is blind"


def test_a_killed_run_repeats_its_lost_steps_and_writes_each_once(grpo: GrpoProject, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    long = ("train.steps=14", "checkpoint.every=4", *DYNAMIC)
    sftrl(*command(grpo, whole, *long), ranks=2)
    with start_product(*command(grpo, killed, *long), log=tmp_path / "log", ranks=2) as started:
        wait_for_step(6, killed, started)
        started.kill()
    reached = metrics_of(killed)[-1]["step"]
    saved = max(int(path.name.removeprefix("step-")) for path in (killed / "checkpoints").glob("step-*"))
    assert 4 <= saved < reached < 14, "the kill came at another moment: the test is blind"
    assert samples_of(killed)[-1]["step"] > saved
    with (killed / "rollouts.jsonl").open("a") as file:
        file.write('{"step": 9, "torn')  # as a kill in the middle of a write leaves it
    run_product(*command(grpo, killed, *long), log=tmp_path / "log", ranks=2)
    assert_same(killed, whole, steps=14)
