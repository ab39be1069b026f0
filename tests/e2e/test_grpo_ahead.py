"""rollout.ahead: the responses of a step are those of one step ago, in a whole run and in its second half."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from tests.e2e.curves import assert_same_curves
from tests.e2e.grpo_project import GrpoProject, samples_of
from tests.e2e.product import run_product, sftrl, sftrl_each, start_product
from tests.e2e.project import metrics_of, write_rows
from tests.e2e.test_grpo_layouts import OTHER_ORDER
from tests.e2e.test_grpo_resume import assert_same
from tests.e2e.test_resume import wait_for_step
from tests.grid import HOW_TO_RUN_ALL, cases, is_full
from tests.ranks import run_ranks

STEPS, SAVED = 5, 3
ONE_UPDATE = (
    "rollout.ahead=1",
    "rollout.passes=1",
    "batch.global_size=16",
    f"train.steps={STEPS}",
    f"checkpoint.every={SAVED}",
)
SAMPLED_AT = (0, 0, 1, 3, 3)
"""Steps behind the weights that sample each step: its own of the first, and of the one after a checkpoint."""


def loop_by_hand(path: Path, overrides: list[str]) -> list[tuple[list[list[int]], float, float]]:
    """Of each step: its responses, loss and gradient norm, by a loop of a few lines."""
    from megatron_sftrl.config.load import load_config
    from megatron_sftrl.config.schema import GrpoConfig
    from megatron_sftrl.data.loader import SampleOrder
    from megatron_sftrl.engine.parallel import run_context
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.losses.registry import build_loss
    from megatron_sftrl.rl.rewards import Scored
    from megatron_sftrl.rollout.in_process import InProcessEngine
    from megatron_sftrl.trainers.checked import batch_layout, checked_run, response_text
    from megatron_sftrl.trainers.experience import (
        ExperienceBatches,
        Response,
        ask_logprobs_and_entropies,
        look_at_tokens,
        with_advantages,
        with_seen,
    )
    from megatron_sftrl.trainers.rollouts import open_prompts
    from megatron_sftrl.types import Prompt, SamplingParams

    checked = checked_run(load_config(path, overrides, schema=GrpoConfig))
    prompts, _ = open_prompts(checked)
    loss, ask = (
        build_loss("grpo", {"correction": "tis"}),
        partial(ask_logprobs_and_entropies, temperature=1.0),
    )
    found = []
    with run_context(checked.config) as parallel:
        policy = PolicyEngine(checked.architecture, checked.config, parallel)
        engine = InProcessEngine(parallel, max_responses=16)
        seed, ends = checked.config.seed, checked.stop_ids
        sampling = SamplingParams(max_new_tokens=8, num_samples=4, stop_ids=ends, seed=seed)
        batches = ExperienceBatches(
            batch=checked.config.batch,
            layout=batch_layout(checked.config, dp_rank=0, dp_size=1),
            max_length=8,
            pad_id=checked.tokenizer.pad_id,
            mask_truncated=False,
        )
        order = SampleOrder(len(prompts.rows), seed=seed, shuffle=True)

        def sampled(step: int) -> list[Response]:
            engine.update(policy, version=0)
            places = range(4 * step, 4 * step + 4)
            rows = [prompts.rows[row] for row in order.rows(4 * step, 4)]
            asked = [Prompt(id=place, tokens=row.tokens) for place, row in zip(places, rows, strict=True)]
            responses = []
            for group, row in zip(engine.generate(asked, sampling), rows, strict=True):
                for rollout in group.rollouts:
                    text = response_text(checked.tokenizer, rollout.response_tokens, sampling)
                    reward = sum(each in "aeiou" for each in text) / max(len(text), 1)
                    scored = Scored(reward=reward, lenient=reward, parts=())
                    responses.append(Response(group=group.prompt.id, row=row, rollout=rollout, scored=scored))
            return with_advantages(responses, "group_normalized")

        of_step = {step: sampled(step) for step in range(STEPS) if SAMPLED_AT[step] == 0}
        for step in range(STEPS):
            learned = of_step[step]
            data = batches.lay_out(learned)
            assert data is not None
            known = with_seen(learned, look_at_tokens(policy, data, ask))
            data = batches.lay_out(known)
            assert data is not None
            report = policy.forward_backward(data.batches, loss)
            norm = policy.optim_step(step, num_steps=STEPS, loss=report.loss).grad_norm
            found.append(([list(each.rollout.response_tokens) for each in learned], report.loss, norm))
            of_step |= {later: sampled(later) for later in range(STEPS) if SAMPLED_AT[later] == step + 1}
    return found


def test_a_step_learns_from_the_weights_of_one_step_ago_as_a_loop_by_hand_does(
    grpo: GrpoProject, tmp_path: Path
) -> None:
    """Evaluations between steps take the engine and the verifiers, and leave what was asked ahead alone."""
    watched = (f"data.valid=[{grpo.prompts}]", "train.eval_every=2")
    sftrl(*grpo.command(tmp_path / "run", *ONE_UPDATE, *watched))
    overrides = [f"run_dir={tmp_path / 'hand'}", *ONE_UPDATE]
    (by_hand,) = run_ranks(1, loop_by_hand, grpo.yaml, overrides, group=False)
    rows, samples = metrics_of(tmp_path / "run"), samples_of(tmp_path / "run")
    for step, (responses, loss, norm) in enumerate(by_hand):
        mine = [row["response_tokens"] for row in samples if row["step"] == step + 1]
        assert mine == responses, f"step {step + 1}"
        assert (rows[step]["loss"], rows[step]["grad_norm"]) == (loss, norm)
    behind = [step - version for step, version in enumerate(SAMPLED_AT)]
    assert [row["rollout/staleness"] for row in rows] == behind
    assert {row["updates"] for row in rows} == {1}
    assert max(abs(row["grpo/correction_weight"] - 1) for row in rows) > 1e-3, "no step was corrected"
    assert [row["mismatch/max"] > 1e-3 for row in rows] == list(map(bool, behind))
    assert [row["step"] for row in rows if "valid/reward/mean" in row] == [2, 4, 5]


HALVES = {
    "two passes": ("rollout.ahead=1",),
    "dynamic sampling": (
        "rollout.ahead=1",
        "rollout.passes=1",
        "filters={dynamic_sampling: true, max_rounds: 4}",
    ),
}


@pytest.mark.parametrize("name", cases(HALVES, rarely=("two passes",)))
def test_a_run_goes_on_from_its_checkpoint_as_if_it_had_not_stopped(
    name: str, grpo: GrpoProject, tmp_path: Path
) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    # Two steps find their groups at once, so that the third draws no more, and nothing useful.
    prompts = [
        {"prompt": f"say {number}", "answer": "a", "is_hopeless": number % 16 >= 8} for number in range(48)
    ]
    data = (f"data.train=[{write_rows(tmp_path / 'rows.jsonl', prompts)}]", "data.shuffle=false")
    common = (grpo.reward("hopeless"), *data, "checkpoint.every=3", *HALVES[name])
    lines = [
        grpo.command(whole, *common, "train.steps=6"),
        grpo.command(halves, *common, "train.steps=3"),
        grpo.command(halves, *common, "train.steps=6"),
    ]
    for done in sftrl_each(lines):
        done.expect(0)
    assert_same(halves, whole, steps=6)
    rows = metrics_of(whole)
    assert [row["rollout/staleness"] > 0 for row in rows] == [False, True, True, False, True, True]
    if name == "dynamic sampling":
        assert rows[2]["rollout/rounds"] > 1
        assert 0 < rows[2]["rollout/staleness"] < 1, (
            "further prompts are answered with the step's own weights"
        )
    else:
        assert max(row["updates"] for row in rows) == 4


@pytest.mark.skipif(not is_full(), reason=HOW_TO_RUN_ALL)
def test_a_killed_run_repeats_its_lost_steps(grpo: GrpoProject, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    long = (grpo.reward("hopeless"), *HALVES["dynamic sampling"], "train.steps=14", "checkpoint.every=4")
    sftrl(*grpo.command(whole, *long), ranks=2)
    with start_product(*grpo.command(killed, *long), log=tmp_path / "log", ranks=2) as started:
        wait_for_step(6, killed, started)
        started.kill()
    reached = metrics_of(killed)[-1]["step"]
    assert 4 < reached < 14, "the kill came at another moment: the test is blind"
    run_product(*grpo.command(killed, *long), log=tmp_path / "log", ranks=2)
    assert_same(killed, whole, steps=14)


LAYOUTS = {"dp2": (), "tp2": ("parallel.tp=2",)}


def test_two_processes_follow_one(grpo: GrpoProject, tmp_path: Path) -> None:
    settings = (*ONE_UPDATE, "train.steps=3", "rollout.save_samples=1000")
    sftrl(*grpo.command(tmp_path / "one", *settings))
    names = [name for name in LAYOUTS if name == "dp2" or is_full()]
    lines = [grpo.command(tmp_path / name, *settings, *LAYOUTS[name]) for name in names]
    for done in sftrl_each(lines, ranks=2):
        done.expect(0)
    for name in names:
        ours, truth = tmp_path / name, tmp_path / "one"
        tokens = [[row["response_tokens"] for row in samples_of(run)] for run in (ours, truth)]
        assert tokens[0] == tokens[1]
        assert_same_curves(metrics_of(ours), metrics_of(truth), tolerance=OTHER_ORDER)


@pytest.mark.skipif(not is_full(), reason=HOW_TO_RUN_ALL)
def test_demonstrations_stand_in_groups_that_were_asked_ahead(grpo: GrpoProject, tmp_path: Path) -> None:
    shown = (
        "rollout.ahead=1",
        "rollout.passes=1",
        "rollout.demonstrations=1",
        "data.columns={response: answer}",
    )
    sftrl(*grpo.command(tmp_path / "run", *shown, "train.steps=3"))
    assert [row["rollout/staleness"] for row in metrics_of(tmp_path / "run")] == [0, 1, 1]
    assert sum(row["is_demonstration"] for row in samples_of(tmp_path / "run")) == 3 * 4
