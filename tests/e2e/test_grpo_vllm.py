"""`sftrl grpo` with vLLM in the trainer's processes: it learns, agrees with the trainer, and goes on."""

from __future__ import annotations

import importlib.util
import statistics
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.curves import unequal_tensors
from tests.e2e.grpo_project import GrpoProject, assert_no_null, samples_of
from tests.e2e.product import sftrl, sftrl_each, start_product
from tests.e2e.project import Metrics, metrics_of, without_timing
from tests.e2e.test_bad_input import assert_one_message
from tests.e2e.test_resume import wait_for_step
from tests.grid import HOW_TO_RUN_ALL, is_full

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not here: bash tests/oracles.sh installs it"
)

NUM_STEPS = 10
VLLM = (
    # The narrowest head of vLLM's attention on the CPU.
    "model.architecture.head_dim=32",
    "rollout.engine=vllm",
    "rollout.vllm.max_num_seqs=16",
    "optim.lr=0.02",
    f"train.steps={NUM_STEPS}",
)
# The promised bound for engine and trainer in fp32.
SAME_LOGPROBS = 1e-5


def command(grpo: GrpoProject, run_dir: Path, *overrides: str) -> list[str]:
    return grpo.command(run_dir, *VLLM, *overrides)


@pytest.fixture(scope="module")
def runs(grpo: GrpoProject, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run as a whole; one that ended after four steps and was started again."""
    root = tmp_path_factory.mktemp("vllm")
    whole, halves = root / "whole", root / "halves"
    for done in sftrl_each(
        [command(grpo, whole), command(grpo, halves, "train.steps=4"), command(grpo, halves)]
    ):
        done.expect(0)
    return {"whole": whole, "halves": halves}


def test_the_reward_rises_and_every_step_agrees_with_the_trainer(runs: dict[str, Path]) -> None:
    metrics = metrics_of(runs["whole"])
    assert_no_null(metrics)
    rewards = [row["reward/mean"] for row in metrics]
    # A random policy says 5 vowels among 100 characters.
    assert statistics.mean(rewards[:2]) < 0.15
    assert statistics.mean(rewards[-3:]) > 0.25
    assert len(metrics) == NUM_STEPS
    for row in metrics:
        assert row["updates"] == 4
        assert 0 < row["mismatch/max"] <= SAME_LOGPROBS
        assert 0 < row["mismatch/probe"] <= SAME_LOGPROBS
        assert row["reshard/copied_bytes"] > 0
        assert row["seconds/reshard"] > 0


def test_a_run_that_was_resumed_draws_the_same_prompts_and_the_same_responses(runs: dict[str, Path]) -> None:
    """Responses are drawn from streams of their own: equal ones come of equal seeds and equal weights."""
    whole, halves = runs["whole"], runs["halves"]
    assert samples_of(halves) == samples_of(whole)
    assert without_timing(metrics_of(halves)) == without_timing(metrics_of(whole))
    final = f"checkpoints/step-{NUM_STEPS:08d}"
    assert unequal_tensors(halves / final, whole / final) == []


MISTAKES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "engines that the ranks do not fill": (
        ("rollout.vllm.tp=2",),
        ("1 processes cannot form rollout engines of tp 2: choose a tp that divides",),
    ),
    "a head that vLLM would take for another": (
        ("model.architecture.family=qwen2",),
        ("vLLM takes hidden_size / num_attention_heads = 32 / 4", "use rollout.engine: in_process"),
    ),
    "a setting of the other engine": (
        ("rollout.max_concurrent=4",),
        ("rollout.max_concurrent has no effect: rollout.engine is vllm",),
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_vllm_cannot_do_ends_the_run_before_anything_is_built(
    name: str, grpo: GrpoProject, tmp_path: Path
) -> None:
    overrides, parts = MISTAKES[name]
    (done,) = sftrl_each([command(grpo, tmp_path / "run", *overrides)])
    assert_one_message(done, parts)
    assert not (tmp_path / "run").exists()


@dataclass(frozen=True)
class Killed:
    """A run on two ranks, killed and started again if all is asked for: its directory, its metrics then."""

    run_dir: Path
    metrics: Metrics


@pytest.fixture(scope="module")
def killed(grpo: GrpoProject, tmp_path_factory: pytest.TempPathFactory) -> Killed:
    """SIGKILL to all processes at once, while shared memory of an engine over both ranks is in use."""
    root = tmp_path_factory.mktemp("killed")
    run_dir = root / "run"
    both = command(grpo, run_dir, "parallel.tp=2", "rollout.vllm.tp=2", "checkpoint.every=4")
    if not is_full():
        sftrl(*both, ranks=2)
        return Killed(run_dir, [])
    with start_product(*both, log=root / "log", ranks=2) as started:
        wait_for_step(1, run_dir, started)
        maps = {each.path for process in started.processes() for each in process.memory_maps()}
        wait_for_step(5, run_dir, started)
        started.kill()
    shared = {path for path in maps if path.startswith("/dev/shm/")}
    assert shared, "nothing is shared: the test is blind"
    assert [path for path in shared if Path(path).exists()] == [], "shared memory stays behind"
    metrics = metrics_of(run_dir)
    saved = max(int(path.name.removeprefix("step-")) for path in (run_dir / "checkpoints").glob("step-*"))
    assert saved < metrics[-1]["step"] < NUM_STEPS, "the kill came at another moment: the test is blind"
    sftrl(*both, ranks=2)
    return Killed(run_dir, metrics)


@pytest.mark.skipif(not is_full(), reason=HOW_TO_RUN_ALL)
def test_a_killed_run_repeats_its_lost_steps_and_writes_each_once(killed: Killed) -> None:
    metrics = metrics_of(killed.run_dir)
    assert [row["step"] for row in metrics] == list(range(1, NUM_STEPS + 1))
    assert sorted({row["step"] for row in samples_of(killed.run_dir)}) == list(range(1, NUM_STEPS + 1))
    before = without_timing(killed.metrics)
    assert without_timing(metrics[: len(before)]) == before


def test_two_processes_and_an_engine_over_both_follow_one(killed: Killed, runs: dict[str, Path]) -> None:
    fields = ("step", "group", "prompt_tokens", "response_tokens")
    ours, truth = (
        [[row[name] for name in fields] for row in samples_of(run) if row["step"] <= 3]
        for run in (killed.run_dir, runs["whole"])
    )
    assert ours == truth
    for row in metrics_of(killed.run_dir):
        assert 0 < row["mismatch/max"] <= SAME_LOGPROBS
        assert row["reshard/received_bytes"] > 0


@pytest.mark.skipif(not is_full(), reason=HOW_TO_RUN_ALL)
def test_vllm_on_a_device_of_its_own_answers_as_it_does_beside_the_trainer(
    grpo: GrpoProject, tmp_path: Path
) -> None:
    ahead = ("train.steps=4", "rollout.ahead=1", "rollout.passes=1", "batch.global_size=16")
    sftrl(*command(grpo, tmp_path / "beside", *ahead))
    sftrl(*command(grpo, tmp_path / "apart", *ahead, "rollout.devices=1"), ranks=2)
    assert samples_of(tmp_path / "apart") == samples_of(tmp_path / "beside")
    beside, apart = (without_timing(metrics_of(tmp_path / name)) for name in ("beside", "apart"))
    for ours, theirs in zip(apart, beside, strict=True):
        assert ours["rollout/staleness"] == theirs["rollout/staleness"]
        assert (ours["loss"], ours["grad_norm"]) == (theirs["loss"], theirs["grad_norm"])
        assert 0 < ours["mismatch/probe"] <= SAME_LOGPROBS
        assert ours["reshard/received_bytes"] == theirs["reshard/copied_bytes"]
