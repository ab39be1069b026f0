"""rollout.devices: the last ranks of a job only generate, and its numbers are those of ranks that do both."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.curves import assert_same_curves, unequal_tensors
from tests.e2e.grpo_project import GrpoProject, samples_of
from tests.e2e.product import run_product, sftrl, sftrl_each, start_product
from tests.e2e.project import Metrics, metrics_of, read_rows, without_timing
from tests.e2e.test_grpo_layouts import OTHER_ORDER
from tests.e2e.test_resume import wait_for_step
from tests.grid import HOW_TO_RUN_ALL, cases, is_full

STEPS = 4
AHEAD = ("rollout.ahead=1", "rollout.passes=1", "batch.global_size=16", "checkpoint.every=3")
SETTINGS = {"in turns": (), "ahead": AHEAD}


def trained(run: Path) -> Metrics:
    """A run's numbers without those that only generators elsewhere have."""
    rows = without_timing(metrics_of(run))
    return [{name: row[name] for name in row if not name.startswith("reshard/")} for row in rows]


def assert_one_run(ours: Path, truth: Path, *, steps: int) -> None:
    """To the bit: the same layouts compute it."""
    assert [row["step"] for row in metrics_of(ours)] == list(range(1, steps + 1))
    assert trained(ours) == trained(truth)
    assert (ours / "rollouts.jsonl").read_bytes() == (truth / "rollouts.jsonl").read_bytes()
    final = f"checkpoints/step-{steps:08d}"
    assert unequal_tensors(ours / final, truth / final) == []


@pytest.mark.parametrize("name", SETTINGS)
def test_a_trainer_beside_a_generator_is_a_run_on_one_process(
    name: str, grpo: GrpoProject, tmp_path: Path
) -> None:
    common = (f"train.steps={STEPS}", *SETTINGS[name])
    sftrl(*grpo.command(tmp_path / "one", *common))
    sftrl(*grpo.command(tmp_path / "two", *common, "rollout.devices=1"), ranks=2)
    assert_one_run(tmp_path / "two", tmp_path / "one", steps=STEPS)
    for row in metrics_of(tmp_path / "two"):
        assert row["rollout/wait_seconds"] > 0
        assert 0 < row["rollout/generator_idle"] < 1
        assert row["reshard/received_bytes"] > 0
    # What is written of the run is enough for a command that reads it, on one process.
    out = tmp_path / "answers.jsonl"
    ask = ("--prompts", str(grpo.prompts), "--max-new-tokens", "2", "--out", str(out))
    sftrl("generate", str(tmp_path / "two" / "resolved.yaml"), *ask)
    assert len(read_rows(out)) == len(read_rows(grpo.prompts))


@pytest.mark.skipif(not is_full(), reason=HOW_TO_RUN_ALL)
def test_a_run_may_go_on_with_generators_that_it_began_without(grpo: GrpoProject, tmp_path: Path) -> None:
    one, both = tmp_path / "one", tmp_path / "both"
    common = (*AHEAD, "train.steps=6")
    sftrl(*grpo.command(one, *common))
    sftrl(*grpo.command(both, *AHEAD, "train.steps=3"))
    sftrl(*grpo.command(both, *common, "rollout.devices=1"), ranks=2)
    assert_one_run(both, one, steps=6)


def test_devices_that_leave_no_trainer_are_refused_before_anything_is_built(
    grpo: GrpoProject, tmp_path: Path
) -> None:
    (ended,) = sftrl_each([grpo.command(tmp_path / "run", "rollout.devices=1")])
    assert "rollout.devices = 1 leaves none of the 1 process(es) to train" in ended.expect(2).stderr
    assert not (tmp_path / "run").exists()


WIDE = {
    "tp2 + 1": ((), ("parallel.tp=2", "rollout.devices=1")),
    "dp2 + 1, ahead": (AHEAD, ("rollout.devices=1",)),
    "1 + tp2, ahead": (AHEAD, ("rollout.devices=2", "rollout.tp=2")),
    "1 + 2 generators": ((), ("rollout.devices=2",)),
    "pp2 + 1, further draws, evaluations": (
        (*AHEAD, "filters={dynamic_sampling: true, max_rounds: 4}", "train.eval_every=2"),
        ("parallel.pp=2", "rollout.devices=1"),
    ),
}


@pytest.mark.parametrize("name", cases(WIDE, rarely=[name for name in WIDE if name != "tp2 + 1"]))
def test_other_layouts_on_either_side_follow_one_process(
    name: str, grpo: GrpoProject, tmp_path: Path
) -> None:
    common, layout = WIDE[name]
    common = ("train.steps=3", grpo.reward("hopeless"), f"data.valid=[{grpo.prompts}]", *common)
    sftrl(*grpo.command(tmp_path / "one", *common))
    sftrl(*grpo.command(tmp_path / "wide", *common, *layout), ranks=3)
    tokens = [[row["response_tokens"] for row in samples_of(tmp_path / run)] for run in ("wide", "one")]
    assert tokens[0] == tokens[1]
    assert_same_curves(trained(tmp_path / "wide"), trained(tmp_path / "one"), tolerance=OTHER_ORDER)
    assert {row["reshard/received_bytes"] for row in metrics_of(tmp_path / "wide")} != {0}


@pytest.mark.skipif(not is_full(), reason=HOW_TO_RUN_ALL)
@pytest.mark.parametrize("rank", [pytest.param("0", id="trainer"), pytest.param("1", id="generator")])
def test_the_death_of_either_side_ends_the_job_which_then_repeats_its_lost_steps(
    rank: str, grpo: GrpoProject, tmp_path: Path
) -> None:
    """Responses on their way are lost, and generated again."""
    one, killed = tmp_path / "one", tmp_path / "killed"
    long = (*AHEAD, "train.steps=14", "checkpoint.every=4")
    sftrl(*grpo.command(one, *long))
    command = grpo.command(killed, *long, "rollout.devices=1")
    with start_product(*command, log=tmp_path / "log", ranks=2) as started:
        wait_for_step(6, killed, started)
        (victim,) = [each for each in started.processes() if each.environ().get("RANK") == rank]
        victim.kill()
        assert started.wait(timeout_s=60) == 1
        assert "exitcode  : -9" in started.output()
    assert 4 < metrics_of(killed)[-1]["step"] < 14, "the kill came at another moment: the test is blind"
    run_product(*command, log=tmp_path / "log", ranks=2)
    assert_one_run(killed, one, steps=14)
