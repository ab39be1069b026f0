"""Steps of `sftrl grpo` that have little or nothing to learn from, and those that should end a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.curves import assert_same_curves
from tests.e2e.grpo_project import (
    GROUP_SIZE,
    NUM_STEPS,
    GrpoProject,
    assert_no_null,
    changed_weights,
    groups_of,
    samples_of,
)
from tests.e2e.product import sftrl, sftrl_each
from tests.e2e.project import Metrics, metrics_of, read_rows

END = "<|end|>"
DYNAMIC = "filters={dynamic_sampling: true, max_rounds: 4}"


def run(grpo: GrpoProject, run_dir: Path, *overrides: str) -> Metrics:
    sftrl(*grpo.command(run_dir, *overrides))
    metrics = metrics_of(run_dir)
    assert_no_null(metrics)
    return metrics


def test_equal_rewards_move_no_weight_and_leave_a_row(
    grpo: GrpoProject, grpo_run: Path, tmp_path: Path
) -> None:
    start = grpo_run / f"checkpoints/step-{NUM_STEPS:08d}"
    metrics = run(
        grpo, tmp_path / "run", grpo.reward("constant"), f"model.init_checkpoint={start}", "train.steps=2"
    )
    assert [row["updates"] for row in metrics] == [0, 0]
    assert [row["reward/zero_variance_groups"] for row in metrics] == [1, 1]
    assert [row["rollout/trained_responses"] for row in metrics] == [16, 16]
    assert all(row["advantage"] == 0 for row in samples_of(tmp_path / "run"))
    assert changed_weights(tmp_path / "run/checkpoints/step-00000002", start) == []


def test_groups_with_equal_rewards_are_replaced_by_the_next_prompts(
    grpo: GrpoProject, tmp_path: Path
) -> None:
    metrics = run(grpo, tmp_path / "run", grpo.reward("hopeless"), DYNAMIC)
    assert [row["rollout/trained_responses"] for row in metrics] == [4 * GROUP_SIZE] * NUM_STEPS
    assert max(row["rollout/prompts"] for row in metrics) > 4
    hopeless = {
        f"{grpo.prompts}:{number}": row["is_hopeless"]
        for number, row in enumerate(read_rows(grpo.prompts), 1)
    }
    drawn = 0
    for step, row in enumerate(metrics, start=1):
        groups = groups_of(tmp_path / "run", step)
        # The next prompts of the order, none left out; useful ones beyond a full step come again.
        assert list(groups) == list(range(drawn, drawn + int(row["rollout/prompts"])))
        drawn += len(groups) - int(row["rollout/put_back"])
        useless = [group for group, rows in groups.items() if hopeless[rows[0]["source"]]]
        useful = [group for group in groups if group not in useless]
        assert row["rollout/filled"] == 1
        assert len(useful) >= 4
        assert drawn == (useful[4] if len(useful) > 4 else max(groups) + 1)
        assert row["reward/zero_variance_groups"] == pytest.approx(len(useless) / len(groups))
        for group, rows in groups.items():
            assert all((sample["advantage"] == 0) == (group in useless) for sample in rows)


def test_the_search_for_groups_ends_after_its_rounds(grpo: GrpoProject, tmp_path: Path) -> None:
    (row,) = run(grpo, tmp_path / "run", grpo.reward("constant"), DYNAMIC, "train.steps=1")
    assert row["rollout/prompts"] == 4 * 4
    assert row["rollout/trained_responses"] == row["updates"] == 0


def test_groups_that_differ_in_a_later_reward_alone_are_left_out(grpo: GrpoProject, tmp_path: Path) -> None:
    """DAPO drops what is all right or all wrong, whatever its soft punishment says about the lengths."""
    both = f"rewards=[{{name: constant, modules: [{grpo.rewards}]}}, {{name: vowels, weight: 0.1}}]"
    (row,) = run(grpo, tmp_path / "run", both, DYNAMIC, "train.steps=1")
    assert row["reward/std"] > 0
    assert row["reward/zero_variance_groups"] < 1
    assert row["rollout/trained_responses"] == row["updates"] == 0


def test_a_group_with_one_success_is_learned_from(grpo: GrpoProject, tmp_path: Path) -> None:
    run(grpo, tmp_path / "run", grpo.reward("rare"), DYNAMIC, "train.steps=2")
    metrics = metrics_of(tmp_path / "run")
    lonely = 0
    for step, row in enumerate(metrics, start=1):
        groups = groups_of(tmp_path / "run", step).values()
        rewards = [[sample["reward"] for sample in group] for group in groups]
        mixed = [group for group in rewards if len(set(group)) > 1]
        # Two groups make a mini-batch; 4 are a step.
        assert row["rollout/trained_responses"] == GROUP_SIZE * min(len(mixed) // 2 * 2, 4)
        for group in (group for group in groups if sum(sample["reward"] for sample in group) == 1):
            lonely += 1
            # (1 - 1/4) / std, std of [1, 0, 0, 0] = 0.5
            assert sorted(sample["advantage"] for sample in group) == pytest.approx(
                [-0.5] * 3 + [1.5], rel=1e-5
            )
    assert lonely > 0, "no group had a single success: the test is blind"


def test_the_constant_length_is_that_of_the_longest_response(grpo: GrpoProject, tmp_path: Path) -> None:
    """Where every response has it, the constant is the mean over tokens (Dr. GRPO, arXiv:2503.20783)."""
    short = ("train.steps=1", "rollout.max_new_tokens=2")
    token_mean = run(grpo, tmp_path / "mean", *short)
    constant = run(grpo, tmp_path / "constant", *short, "batch.aggregation=constant_length")
    assert token_mean[0]["rollout/truncated"] == 1, "a response ended: the test is blind"
    assert abs(token_mean[0]["loss"]) > 1e-3
    assert_same_curves(constant, token_mean, tolerance=1e-6)  # weights of the same value, rounded apart


@pytest.mark.parametrize("is_masked", [True, False])
def test_responses_without_end_token_carry_no_loss_where_they_are_masked(
    is_masked: bool, grpo: GrpoProject, tmp_path: Path
) -> None:
    masked = f"filters.mask_truncated={str(is_masked).lower()}"
    (row,) = run(grpo, tmp_path / "run", masked, "train.steps=1", "rollout.max_new_tokens=2")
    assert row["rollout/truncated"] == 1, "a response ended: the test is blind"
    assert row["reward/std"] > 0
    assert (row["updates"] == 0) == is_masked


def test_a_verifier_that_hangs_dies_or_gives_no_number_costs_its_sample_only(
    grpo: GrpoProject, grpo_run: Path, tmp_path: Path
) -> None:
    texts = [row["response"].removesuffix(END) for row in samples_of(grpo_run)[:16]]
    assert len(set(texts[:3])) == 3
    hang, crash, nan = map(json.dumps, texts[:3])
    options = f"hang: {hang}, crash: {crash}, nan: {nan}"
    done = sftrl(
        *grpo.command(
            tmp_path / "run", grpo.reward("trouble", options),
            "reward_workers={num_workers: 1, seconds: 0.5}",
            "train.steps=2",
        )
    )  # fmt: skip
    first, second = metrics_of(tmp_path / "run")
    outcomes = ("timeout", "crashed", "nonfinite", "error")
    assert [first[f"reward/trouble/{outcome}"] for outcome in outcomes] == [1, 1, 1, 0]
    assert (first["reward/mean"], first["reward/unscored"]) == (1.0, 3 / 16)
    samples = samples_of(tmp_path / "run")[:16]
    assert [row["reward"] for row in samples] == [None, None, None, *[1.0] * 13]
    assert [row["outcomes"]["trouble"] for row in samples[:4]] == ["timeout", "crashed", "nonfinite", "ok"]
    # Every answer that could be judged is right: nothing is better than anything else.
    assert {row["advantage"] for row in samples} == {0.0}
    assert first["updates"] == 0
    assert second["step"] == 2
    assert "step 1: sample 0: reward 'trouble': timeout: " in done.stderr
    assert "step 1: sample 1: reward 'trouble': crashed: it ended with code 3" in done.stderr
    assert "step 1: sample 2: reward 'trouble': nonfinite: reward is nan" in done.stderr


def test_a_run_without_anything_to_learn_ends_after_its_idle_steps_resumed_or_not(
    grpo: GrpoProject, tmp_path: Path
) -> None:
    short = ("filters.max_idle_steps=3", "rollout.max_new_tokens=2", "checkpoint.every=1", "train.steps=9")
    command = grpo.command(tmp_path / "run", grpo.reward("constant"), *short)
    whole, resumed = sftrl_each([command, command])
    said = "error: 3 steps in a row had nothing to learn from, the last of them step 3: 4 groups, mean reward"
    assert f"{said} 0.1" in whole.expect(2).stderr
    assert "or raise filters.max_idle_steps" in whole.stderr
    assert "4 steps in a row had nothing to learn from" in resumed.expect(2).stderr


def gates(*texts: str) -> str:
    return f"gates=[{', '.join(texts)}]"


def test_a_gate_warns_once_in_each_step_that_it_is_crossed_in(
    grpo: GrpoProject, grpo_run: Path, tmp_path: Path
) -> None:
    late = "{metric: entropy, above: 0.0, steps: 2}"
    never = "{metric: reward/mean, below: -1}"
    done = sftrl(*grpo.command(tmp_path / "run", gates(late, never)))
    lines = [line.partition("WARNING: gate: ")[2] for line in done.stderr.splitlines() if "gate: " in line]
    assert [line.split(": ")[0] for line in lines] == [f"step {step}" for step in range(2, NUM_STEPS + 1)]
    assert lines[0].endswith(" is above 0.0, 2 step(s) in a row")
    assert metrics_of(tmp_path / "run")[-1]["step"] == NUM_STEPS


def test_a_gate_ends_the_run_with_a_checkpoint_and_another_gate_lets_it_go_on(
    grpo: GrpoProject, grpo_run: Path, tmp_path: Path
) -> None:
    stop = gates("{metric: reward/mean, below: 2, steps: 2, action: stop}")
    (stopped,) = sftrl_each([grpo.command(tmp_path / "run", stop)])
    assert "error: a gate ended the run, its checkpoint is saved: step 2: " in stopped.expect(2).stderr
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000002"]
    run(grpo, tmp_path / "run", gates("{metric: reward/mean, below: -1, action: stop}"))
    final = f"checkpoints/step-{NUM_STEPS:08d}"
    assert changed_weights(tmp_path / "run" / final, grpo_run / final) == []


def test_a_gate_on_nothing_is_refused(grpo: GrpoProject, tmp_path: Path) -> None:
    misspelt, no_data, unknown = sftrl_each(
        [
            grpo.command(tmp_path / "0", gates("{metric: entropi, below: 0}")),
            grpo.command(tmp_path / "1", gates("{metric: valid/reward/mean, below: 0}")),
            grpo.command(
                tmp_path / "2", gates("{metric: valid/entropy, below: 0}"), f"data.valid=[{grpo.prompts}]"
            ),
        ]
    )
    assert "there is no metric 'entropi' (did you mean 'entropy'?)" in misspelt.expect(2).stderr
    assert (
        "there is no metric 'valid/reward/mean'; held-out metrics need data.valid" in no_data.expect(2).stderr
    )
    assert "held-out metrics are valid/reward/mean" in unknown.expect(2).stderr
    assert not (tmp_path / "1").exists()
    assert not (tmp_path / "2").exists()


def test_a_gate_on_a_metric_of_updates_waits_while_there_is_none(grpo: GrpoProject, tmp_path: Path) -> None:
    metrics = run(
        grpo, tmp_path / "run", grpo.reward("constant"), gates("{metric: entropy, above: 0, action: stop}")
    )
    assert [row["updates"] for row in metrics] == [0] * NUM_STEPS
