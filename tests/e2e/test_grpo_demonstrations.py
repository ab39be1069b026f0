"""Demonstrations in a run of `sftrl grpo`: in the groups, and in an SFT term beside the policy gradient."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.grpo_project import GrpoProject, groups_of, samples_of
from tests.e2e.product import sftrl, sftrl_each
from tests.e2e.project import metrics_of, read_rows, write_rows
from tests.e2e.test_grpo_layouts import assert_same_run
from tests.e2e.test_grpo_resume import assert_same
from tests.grid import often

SHOWN = "aeiou"
"""A demonstration: the reward is the share of vowels."""
MU = {"peak": 0.5, "valley": 0.0, "warmup_steps": 1, "decay_steps": 2}
# In the third step mu is a quarter, from the fourth on it is 0.


@pytest.fixture(scope="module")
def mixed(grpo: GrpoProject, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Overrides: every other prompt has a demonstration, and five further rows are learned by chord_phi."""
    root = tmp_path_factory.mktemp("demonstrations")
    rows = read_rows(grpo.prompts)
    shown = [{**row, "said": SHOWN if number % 2 else None} for number, row in enumerate(rows)]
    write_rows(root / "prompts.jsonl", shown)
    write_rows(
        root / "demos.jsonl", [{"prompt": f"count {n}", "response": "uoiea"[: n + 1]} for n in range(5)]
    )
    term = {
        "data": {"train": [str(root / "demos.jsonl")], "max_length": 32},
        "global_size": 3,
        "loss": {"name": "chord_phi"},
        "mu": MU,
    }
    return (
        f"data.train=[{root / 'prompts.jsonl'}]",
        "data.columns={response: said}",
        "rollout.demonstrations=1",
        "rollout.passes=1",
        f"sft={json.dumps(term)}",
    )


LAYOUTS = {
    "dp2, distributed optimizer": ("parallel={distributed_optimizer: true, overlap_grad_reduce: true}",),
    "tp2, sequence parallel, packing, fused": (
        "parallel={tp: 2, sequence_parallel: true}",
        "batch={global_size: 8, packing: true, max_tokens: 48}",
        "loss.fused=on",
    ),
    "pp2, vp2": ("parallel={pp: 2, vp: 2}",),
    "cp2": ("parallel.cp=2",),
}


@pytest.fixture(scope="module")
def one(grpo: GrpoProject, mixed: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("one") / "run"
    sftrl(*grpo.command(run, *mixed, "train.steps=4"))
    return run


def test_two_processes_follow_one(
    grpo: GrpoProject, mixed: tuple[str, ...], one: Path, tmp_path: Path
) -> None:
    runs = {name: tmp_path / str(number) for number, name in enumerate(often(LAYOUTS, rarely=["cp2"]))}
    lines = [grpo.command(run, *mixed, *LAYOUTS[name], "train.steps=4") for name, run in runs.items()]
    for done in sftrl_each(lines, ranks=2):
        done.expect(0)
    for run in runs.values():
        assert_same_run(run, one)


def test_groups_hold_their_rows_demonstration_and_all_others_are_generated(one: Path) -> None:
    demonstrated = set()
    for step in (1, 2, 3, 4):
        for members in groups_of(one, step).values():
            assert len(members) == 4
            shown = [row for row in members if row["is_demonstration"]]
            demonstrated.add(len(shown))
            for row in shown:
                assert row["response"] == f"{SHOWN}<|end|>"
                assert (row["reward"], row["is_finished"]) == (1.0, True)
                assert row["advantage"] > 0, "the others are no better than all vowels"
            assert sum(row["advantage"] for row in members) == pytest.approx(0, abs=1e-6)
    assert demonstrated == {0, 1}
    assert {len(row["prompt_tokens"]) > 0 for row in samples_of(one)} == {True}


def test_metrics_tell_what_was_shown_and_how_much_it_counts(one: Path) -> None:
    rows = metrics_of(one)
    assert [row["sft/mu"] for row in rows] == pytest.approx([0.5, 0.5, 0.25, 0.0])
    for row in rows:
        assert row["reward/demonstrations"] == 1.0
        assert 0 < row["grpo/demonstration_share"] < 0.5
        pi, shaped = row["grpo/demonstration_ratio"], row["grpo/demonstration_shaped"]
        assert 0 < pi < shaped < 1  # x / (x + 0.1) is above x below 0.9
        assert row["reward/mean"] < 1.0, "demonstrations are in the mean of responses"
    assert "sft/loss" not in rows[3]
    for row in rows[:3]:
        assert 0 < row["sft/chord/phi"] <= 0.25
        assert row["sft/loss"] > 0
    assert rows[3]["grpo/demonstration_ratio"] > rows[0]["grpo/demonstration_ratio"]
    assert rows[2]["sft/nll"] < rows[0]["sft/nll"]


def test_a_resumed_run_shows_the_same_demonstrations(
    grpo: GrpoProject, mixed: tuple[str, ...], one: Path, tmp_path: Path
) -> None:
    """Six of five rows in two updates: the third step begins inside of the second epoch."""
    halves = tmp_path / "halves"
    for done in sftrl_each([grpo.command(halves, *mixed, f"train.steps={steps}") for steps in (2, 4)]):
        done.expect(0)
    assert_same(halves, one, steps=4)


def test_self_distillation_heats_the_policy_whatever_the_rewards_are(
    grpo: GrpoProject, tmp_path: Path
) -> None:
    overrides = (
        grpo.reward("constant"), "loss={name: ts_opsd, tau: 2.0}", "reference={kind: frozen}",
        "model.architecture.init_std=0.3", "rollout.passes=1", "filters.max_idle_steps=1",
    )  # fmt: skip
    sftrl(*grpo.command(tmp_path / "run", *overrides))
    rows = metrics_of(tmp_path / "run")
    assert [row["updates"] for row in rows] == [2, 2, 2]
    assert all(row["entropy"] < row["ts_opsd/teacher_entropy"] for row in rows)
    assert rows[-1]["entropy"] > rows[0]["entropy"] + 0.01
    assert rows[-1]["ts_opsd/kl"] < rows[0]["ts_opsd/kl"]
