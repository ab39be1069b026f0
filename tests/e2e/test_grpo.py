"""What a run of `sftrl grpo` does: it learns, takes the published settings, and shows what it generated."""

from __future__ import annotations

import shlex
import statistics
from pathlib import Path

import pytest
import yaml

from megatron_sftrl.config.load import load_config, resolved_yaml
from megatron_sftrl.config.schema import GrpoConfig
from megatron_sftrl.losses.api import is_own_number
from tests.e2e.grpo_project import (
    GROUP_SIZE,
    MAX_NEW_TOKENS,
    NUM_STEPS,
    GrpoProject,
    assert_no_null,
    groups_of,
    samples_of,
)
from tests.e2e.product import sftrl, sftrl_each
from tests.e2e.project import Metrics, Project, metrics_of, without_timing

END = "<|end|>"
FROZEN = "reference={kind: frozen}"
PHASES = ("generate", "reward", "reshard", "old_logprobs", "update")
OF_UPDATES = {
    "loss", "grad_norm", "lr", "entropy", "grpo/ratio", "grpo/clip_low", "grpo/clip_high", "grpo/kl_old_k1",
    "grpo/kl_old_k2", "grpo/kl_old_k3", "grpo/correction_weight", "grpo/rollout_difference", "mismatch/max",
}  # fmt: skip


def run(grpo: GrpoProject, run_dir: Path, *overrides: str) -> Metrics:
    sftrl(*grpo.command(run_dir, *overrides))
    metrics = metrics_of(run_dir)
    assert_no_null(metrics)
    return metrics


def test_the_reward_rises(grpo: GrpoProject, tmp_path: Path) -> None:
    metrics = run(grpo, tmp_path / "run", "train.steps=12", "optim.lr=0.02")
    rewards = [row["reward/mean"] for row in metrics]
    # A random policy says 5 vowels among 100 characters.
    assert statistics.mean(rewards[:2]) < 0.15
    assert statistics.mean(rewards[-3:]) > 0.3
    assert metrics[-1]["reward/mean"] == metrics[-1]["reward/vowels"]


def test_a_reward_that_pays_for_nothing_is_told_with_a_command_that_looks_closer(
    grpo: GrpoProject, tmp_path: Path
) -> None:
    pleased = grpo.reward("trouble", "hang: none such, crash: none such, nan: none such")
    (done,) = sftrl_each([grpo.command(tmp_path / "run", pleased, "train.steps=1")])
    [line] = [line for line in done.expect(0).stderr.splitlines() if "sftrl doctor" in line]
    assert "WARNING: reward 'trouble' gives 1 or more to the empty text, '0' and the prompt in all 8" in line
    (closer,) = sftrl_each([shlex.split(line.partition("; sftrl ")[2])])
    closer.expect(1)


def test_every_response_is_written_with_its_text_its_reward_and_its_advantage(
    grpo: GrpoProject, grpo_run: Path, project: Project
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(project.root / "tokenizer")
    metrics = metrics_of(grpo_run)
    assert len(samples_of(grpo_run)) == NUM_STEPS * 4 * GROUP_SIZE
    for step in range(1, NUM_STEPS + 1):
        groups = groups_of(grpo_run, step)
        assert list(groups) == list(range(4 * (step - 1), 4 * step))
        for rows in groups.values():
            assert len({row["source"] for row in rows}) == 1
            rewards = [row["reward"] for row in rows]
            mean, std = statistics.mean(rewards), statistics.stdev(rewards)
            for row in rows:
                assert row["prompt"] == tokenizer.decode(row["prompt_tokens"])
                assert row["response"] == tokenizer.decode(row["response_tokens"])
                assert row["is_finished"] == row["response"].endswith(END)
                assert row["is_finished"] or len(row["response_tokens"]) == MAX_NEW_TOKENS
                text = row["response"].removesuffix(END)
                expected = sum(letter in "aeiou" for letter in text) / max(len(text), 1)
                assert row["reward"] == row["rewards"]["vowels"] == pytest.approx(expected)
                assert row["advantage"] == pytest.approx((row["reward"] - mean) / (std + 1e-6))
        everything = [row["reward"] for rows in groups.values() for row in rows]
        assert metrics[step - 1]["reward/mean"] == pytest.approx(statistics.mean(everything))


def test_the_numbers_of_a_step_are_those_of_its_responses(grpo_run: Path) -> None:
    for row in metrics_of(grpo_run):
        groups = groups_of(grpo_run, int(row["step"])).values()
        samples = [sample for group in groups for sample in group]
        rewards = [sample["reward"] for sample in samples]
        lengths = [len(sample["response_tokens"]) for sample in samples]
        is_right = [[sample["reward"] >= 0.5 for sample in group] for group in groups]
        expected = {
            "reward/std": statistics.stdev(rewards),
            "reward/lenient_mean": statistics.mean(rewards),  # a reward with one reading
            "reward/zero_variance_groups": statistics.mean(
                len({sample["reward"] for sample in group}) == 1 for group in groups
            ),
            "reward/pass_at_1": statistics.mean(map(statistics.mean, is_right)),
            f"reward/pass_at_{GROUP_SIZE}": statistics.mean(map(any, is_right)),
            "rollout/prompts": 4,
            "rollout/trained_responses": 4 * GROUP_SIZE,
            "rollout/response_tokens": statistics.mean(lengths),
            "rollout/longest_response": max(lengths),
            "rollout/truncated": statistics.mean(not sample["is_finished"] for sample in samples),
            "tokens_per_second": sum(len(sample["prompt_tokens"]) for sample in samples) + sum(lengths),
        }
        expected["tokens_per_second"] /= sum(row[f"seconds/{phase}"] for phase in PHASES)
        # By a clock of its own: the phase may be another step's (rollout.ahead).
        speed = sum(lengths) / row["seconds/generate"]
        assert row["rollout/tokens_per_second"] == pytest.approx(speed, rel=0.05)
        assert {name: row[name] for name in expected} == pytest.approx(expected)
        assert min(row[f"seconds/{phase}"] for phase in PHASES) > 0
        assert row.keys() >= OF_UPDATES
        of_the_loss = {name for name in row if not is_own_number(name)}
        assert all(name in ("entropy", "nll") or name.startswith("grpo/") for name in of_the_loss)
        assert row["mismatch/mean"] <= row["mismatch/p999"] <= row["mismatch/max"]
        assert row["mismatch/multiplicative_error"] == pytest.approx(1 + row["mismatch/mean"], abs=1e-9)


def test_each_epoch_draws_every_prompt_once(grpo: GrpoProject, tmp_path: Path) -> None:
    """10 prompts, 4 a step, two epochs: 5 steps."""
    metrics = run(grpo, tmp_path / "run", "train={epochs: 2}", "rollout.passes=1", "rollout.max_new_tokens=2")
    assert [row["step"] for row in metrics] == [1, 2, 3, 4, 5]
    sources = {row["group"]: row["source"] for row in samples_of(tmp_path / "run")}
    first, second = [sources[group] for group in range(10)], [sources[group] for group in range(10, 20)]
    assert sorted(first) == sorted(second)
    assert len(set(first)) == 10
    assert first != second


PRESETS = {
    "dapo": (
        ("optim.warmup_steps=0",),
        {"filters.dynamic_sampling": True, "loss.clip_high": 0.28, "batch.aggregation": "token_mean"},
    ),
    "dr_grpo": ((), {"advantages.estimator": "dr_grpo", "batch.aggregation": "constant_length"}),
    "gspo": ((), {"loss.ratio": "sequence", "loss.clip_low": 3e-4, "batch.aggregation": "sequence_mean"}),
    "deepseekmath": ((FROZEN,), {"loss.kl_coefficient": 0.04, "batch.aggregation": "sequence_mean"}),
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_written_out_and_runs_and_what_the_user_says_wins(
    name: str, grpo: GrpoProject, tmp_path: Path
) -> None:
    overrides, expected = PRESETS[name]
    run_dir = tmp_path / "run"
    metrics = run(grpo, run_dir, f"preset={name}", *overrides, "train.steps=1")
    assert metrics[0]["updates"] >= 2
    text = (run_dir / "resolved.yaml").read_text()
    resolved = yaml.safe_load(text)
    assert resolved["preset"] is None
    for key, value in expected.items():
        section, setting = key.split(".")
        assert resolved[section][setting] == value
    assert resolved["rollout"]["group_size"] == GROUP_SIZE, "the preset's 8 to 64 won over the user's"
    assert resolved["optim"]["lr"] == 0.01
    assert resolved_yaml(load_config(run_dir / "resolved.yaml", schema=GrpoConfig)) == text
    sftrl("grpo", str(run_dir / "resolved.yaml"))  # nothing is left to do, and it is the same run
    assert len(metrics_of(run_dir)) == 1


OPTIONS = {
    "a tight clip": ("loss={name: grpo, clip_low: 0.001, clip_high: 0.001}", "grpo/clip_high"),
    "cispo": ("loss={name: grpo, objective: cispo}", "grpo/ratio"),
    "sequence ratios": ("loss={name: grpo, ratio: sequence, clip_low: 0.001}", "grpo/clip_low"),
    "dual clip": ("loss={name: grpo, clip_high: 100, dual_clip: 1.001}", "grpo/clip_dual"),
    "an entropy bonus": ("loss={name: grpo, entropy_coefficient: 0.1}", "entropy"),
    "leave one out": ("advantages.estimator=leave_one_out", "reward/std"),
    "another temperature": ("rollout.temperature=0.7", "entropy"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_changes_what_is_trained(
    name: str, grpo: GrpoProject, grpo_run: Path, tmp_path: Path
) -> None:
    override, metric = OPTIONS[name]
    (ours,) = run(grpo, tmp_path / "run", override, "train.steps=1")
    assert ours[metric] > 0
    # Far beyond rounding, which moves a loss by 1e-7.
    assert abs(ours["loss"] - metrics_of(grpo_run)[0]["loss"]) > 1e-4
    # Right after sampling engine and trainer agree at any temperature (issue: 1e-6 for in_process; the 99.9th
    # percentile of fp32 log-probabilities near -5, one rounding of which is 5e-7, stays within 5e-6).
    assert ours["mismatch/max"] < 5e-6


@pytest.mark.parametrize("correction", ["tis", "icepop"])
def test_right_after_sampling_ratio_and_correction_are_1_at_any_temperature_and_cut(
    correction: str, grpo: GrpoProject, grpo_run: Path, tmp_path: Path
) -> None:
    loss = f"loss={{name: grpo, correction: {correction}}}"
    cut = ("rollout.temperature=1.3", "rollout.top_p=0.9", "rollout.top_k=50")
    still = ("train.steps=1", "rollout.passes=1", "optim.lr=1e-12")
    (ours,) = run(grpo, tmp_path / "run", loss, *cut, *still)
    assert ours["updates"] == 2
    samples = samples_of(tmp_path / "run")
    means = []
    for part in (samples[:8], samples[8:]):
        lengths = [len(sample["response_tokens"]) for sample in part]
        weighted = [sample["advantage"] * n for sample, n in zip(part, lengths, strict=True)]
        means.append(-sum(weighted) / sum(lengths))
    assert ours["loss"] == pytest.approx(statistics.mean(means), abs=2e-6)  # a ratio of 1, in fp32
    # The same forward on the same batches, in training and in evaluation mode: rounding of a mean of ones.
    assert ours["grpo/ratio"] == pytest.approx(1.0, abs=1e-6)
    assert max(ours[f"grpo/kl_old_{name}"] for name in ("k2", "k3")) < 1e-12
    # exp of a difference of at most 5e-6, see above; renormalised log-probabilities would give 0.9.
    assert ours["grpo/correction_weight"] == pytest.approx(1.0, abs=5e-6)
    assert ours["grpo/correction_limited"] == 0


def test_a_frozen_reference_stays_and_a_moving_one_follows(grpo: GrpoProject, tmp_path: Path) -> None:
    settings = ("loss={name: grpo, kl_coefficient: 0.01, kl_estimator: k2}", "optim.lr=0.003")
    frozen = run(grpo, tmp_path / "frozen", *settings, FROZEN)
    average = "reference={{kind: moving_average, decay: {}, sync_every: 1}}"
    moving = run(grpo, tmp_path / "moving", *settings, average.format(0))
    still = run(grpo, tmp_path / "still", *settings, average.format(1))
    assert without_timing(still) == without_timing(frozen), "the frozen reference has moved"
    (plain,) = run(grpo, tmp_path / "plain", "optim.lr=0.003", "train.steps=1")
    # Within the first step both references are the policy before it.
    assert without_timing(frozen[:1]) == without_timing(moving[:1])
    assert abs(frozen[0]["loss"] - plain["loss"]) > 1e-6
    # kl_old is the distance from the policy that sampled. The frozen reference is that one in the first step
    # only; one with decay 0 is it in every step. In fp32, means of squares of differences near 0.3.
    ratios = [
        [row["grpo/kl_reference_k2"] / row["grpo/kl_old_k2"] for row in rows] for rows in (frozen, moving)
    ]
    assert ratios[0][0] == pytest.approx(1, rel=1e-4)
    assert min(ratios[0][1:]) > 1.2
    assert ratios[1] == pytest.approx([1] * NUM_STEPS, rel=1e-4)


def test_held_out_prompts_are_answered_greedily_and_change_nothing_else(
    grpo: GrpoProject, grpo_run: Path, tmp_path: Path
) -> None:
    held_out = f"data.valid=[{grpo.prompts}]"
    metrics = run(grpo, tmp_path / "run", held_out, "train.eval_every=2")
    assert ["valid/reward/mean" in row for row in metrics] == [False, True, True]
    assert 0 <= metrics[-1]["valid/reward/pass_at_1"] <= 1
    for ours, theirs in zip(without_timing(metrics), without_timing(metrics_of(grpo_run)), strict=True):
        assert {name: ours[name] for name in ours if not name.startswith("valid/")} == theirs
    # The same weights give the same answers again: nothing is drawn.
    once, twice = tmp_path / "once", tmp_path / "twice"
    final = f"model.init_checkpoint={grpo_run}"
    for done in sftrl_each(
        [
            grpo.command(path, final, held_out, "optim.lr=1e-12", "train.steps=1", f"seed={seed}")
            for path, seed in ((once, 1), (twice, 2))
        ]
    ):
        done.expect(0)
    one, two = metrics_of(once)[0], metrics_of(twice)[0]
    assert one["valid/reward/mean"] == two["valid/reward/mean"]
    assert one["reward/mean"] != two["reward/mean"]
