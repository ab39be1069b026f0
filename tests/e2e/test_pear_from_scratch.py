"""PEAR as a user comes to it: score the data with a checkpoint, then train on the scores."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.e2e.product import run_product, sftrl, sftrl_each
from tests.e2e.project import (
    NUM_STEPS,
    NUM_TRAIN_ROWS,
    Project,
    metrics_of,
    num_learned,
    read_rows,
    write_rows,
)
from tests.ranks import ROOT

GAMMA = 0.9


@pytest.fixture(scope="module")
def scored(project: Project, two_processes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.jsonl with the scores of the final checkpoint of the tp = 2 run, scored under tp = 2."""
    out = tmp_path_factory.mktemp("scored") / "scored.jsonl"
    run_product(
        project.yaml, "parallel.tp=2", "--checkpoint", two_processes, "--data", project.train, "--out", out,
        log=out.parent / "log", ranks=2, program=[str(ROOT / "tools/score_behavior_logprobs.py")],
    )  # fmt: skip
    return out


def all_rows_at_once(project: Project, checkpoint: Path, *overrides: str) -> list[str]:
    """One step over the whole file, starting from the checkpoint that scored it."""
    return [
        "sft", str(project.yaml), f"model.init_checkpoint={checkpoint}", "data.valid=[]", "train={steps: 1}",
        f"batch.global_size={NUM_TRAIN_ROWS}", "optim={lr: 0.001, eps: 0.0001}", "reference=null", *overrides,
    ]  # fmt: skip


def test_scores_stand_beside_the_row_and_the_tokens_they_belong_to(project: Project, scored: Path) -> None:
    rows = read_rows(scored)
    assert {row["behavior_scorer"]["dtype"] for row in rows} == {"fp32"}
    assert all("(step 8, weights " in row["behavior_scorer"]["model"] for row in rows)
    assert [{"prompt": row["prompt"], "response": row["response"]} for row in rows] == read_rows(
        project.train
    )
    for row in rows:
        # One id per printable character after four special tokens; the end token is 1.
        assert row["behavior_token_ids"] == [4 + ord(letter) - 32 for letter in row["response"]] + [1]
        assert len(row["behavior_logprobs"]) == num_learned(row)
        assert all(value < 0 for value in row["behavior_logprobs"])


SCRIPT = [str(ROOT / "tools/score_behavior_logprobs.py")]
COMMAND = ["-m", "megatron_sftrl", "score"]


@pytest.mark.parametrize(
    ("layout", "program"),
    [
        pytest.param("parallel.pp=2", SCRIPT, id="parallel.pp=2"),
        pytest.param("parallel.cp=2", COMMAND, id="parallel.cp=2"),
    ],
)
def test_another_layout_gives_the_same_scores(
    layout: str, program: list[str], project: Project, two_processes: Path, scored: Path, tmp_path: Path
) -> None:
    out = tmp_path / "scored.jsonl"
    run_product(
        project.yaml, layout, "--checkpoint", two_processes, "--data", project.train, "--out", out,
        log=tmp_path / "log", ranks=2, program=program,
    )  # fmt: skip
    for ours, theirs in zip(read_rows(out), read_rows(scored), strict=True):
        assert ours["behavior_token_ids"] == theirs["behavior_token_ids"]
        # fp32 logits summed in another order
        assert ours["behavior_logprobs"] == pytest.approx(theirs["behavior_logprobs"], abs=2e-5)


def test_scores_are_the_nll_that_training_reports_and_pear_starts_from_weights_of_gamma_alone(
    project: Project, two_processes: Path, scored: Path, tmp_path: Path
) -> None:
    checkpoint = two_processes / f"checkpoints/step-{NUM_STEPS:08d}"
    pear = f"loss={{name: pear, gamma: {GAMMA}}}"
    sft_dir, pear_dir = tmp_path / "sft", tmp_path / "pear"
    commands = [
        all_rows_at_once(project, checkpoint, "loss={name: sft}", f"run_dir={sft_dir}"),
        all_rows_at_once(project, two_processes, pear, f"data.train=[{scored}]", f"run_dir={pear_dir}"),
    ]
    for done in sftrl_each(commands):
        done.expect(0)
    scores = [row["behavior_logprobs"] for row in read_rows(scored)]
    num_tokens = sum(map(len, scores))
    (sft,), (first,) = metrics_of(sft_dir), metrics_of(pear_dir)
    # Scored under tp = 2, trained on one process: fp32 sums in another order, 1e-6 of a nat.
    assert sft["nll"] == pytest.approx(-sum(map(sum, scores)) / num_tokens, abs=1e-5)
    assert sft["loss"] == pytest.approx(sft["nll"], abs=1e-6)
    # At the weights that scored, every delta is 0 up to rounding: G_t = gamma^(N - t) (arXiv:2602.01058).
    expected = sum(
        -score * math.pow(GAMMA, len(row) - 1 - index) for row in scores for index, score in enumerate(row)
    )
    assert first["loss"] == pytest.approx(expected / num_tokens, abs=1e-5)


def test_pear_learns_from_scored_data(project: Project, scored: Path, tmp_path: Path) -> None:
    sftrl(
        "sft", str(project.yaml), "loss={name: pear}", "reference=null", f"data.train=[{scored}]",
        "data.valid=[]", "train={steps: 8}", f"run_dir={tmp_path / 'run'}",
    )  # fmt: skip
    metrics = metrics_of(tmp_path / "run")
    assert metrics[-1]["nll"] < metrics[0]["nll"] - 0.5
    assert any(name.startswith("pear/") for name in metrics[0])


def test_scores_of_other_tokens_are_refused_naming_the_row(
    project: Project, scored: Path, tmp_path: Path
) -> None:
    rows = read_rows(scored)
    rows[4]["behavior_token_ids"][1] += 1
    others = write_rows(tmp_path / "others.jsonl", rows)
    arguments = ["sft", str(project.yaml), "loss={name: pear}", "reference=null", "data.valid=[]",
                 "train={steps: 8}", f"run_dir={tmp_path / 'run'}"]  # fmt: skip
    ids, missing = sftrl_each([[*arguments, f"data.train=[{others}]"], arguments])
    first = read_rows(scored)[4]["behavior_token_ids"][1]
    assert f"{others}:5: behaviour scores belong to other tokens: loss token 1 is {first} here" in (
        ids.expect(2).stderr
    )
    assert (
        "loss 'pear' needs behavior_logprobs, but data.train has none: score it with `sftrl score`"
        in missing.expect(2).stderr
    )
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_hugging_face_directory_is_scored_and_answers_as_the_checkpoint_that_it_was_made_from(
    project: Project, two_processes: Path, scored: Path, tmp_path: Path
) -> None:
    hf, out = tmp_path / "hf", tmp_path / "scored.jsonl"
    sftrl("convert", "to-hf", "--checkpoint", str(two_processes), "--out", str(hf))
    data = ["--data", str(project.train), "--out"]
    sftrl("score", str(project.yaml), "--checkpoint", str(hf), *data, str(out))
    for ours, theirs in zip(read_rows(out), read_rows(scored), strict=True):
        assert ours["behavior_logprobs"] == pytest.approx(theirs["behavior_logprobs"], abs=2e-5)
        assert ours["behavior_scorer"]["model"].startswith(f"{hf} (weights ")
    section = f"model={{hf: {hf}, dtype: fp32}}"
    sftrl("score", str(project.yaml), section, *data, str(tmp_path / "of_the_yaml.jsonl"))
    assert (tmp_path / "of_the_yaml.jsonl").read_text() == out.read_text()
    answers = []
    for number, checkpoint in enumerate((hf, two_processes)):
        answers.append(tmp_path / f"{number}.jsonl")
        sftrl(
            "generate", str(project.yaml), "--checkpoint", str(checkpoint), "--prompts", str(project.valid),
            "--out", str(answers[-1]), "--max-new-tokens", "8",
        )  # fmt: skip
    assert answers[0].read_text() == answers[1].read_text()
    other = "model.architecture.num_query_groups=4"
    none, wider = sftrl_each(
        [
            ["score", str(project.yaml), *data, str(tmp_path / "a.jsonl")],
            ["score", str(project.yaml), other, "--checkpoint", str(hf), *data, str(tmp_path / "b.jsonl")],
        ]
    )
    assert "the YAML has no model.hf; name the weights by --checkpoint" in none.expect(2).stderr
    assert "is not the model that the YAML describes: num_query_groups: expected 4" in wider.expect(2).stderr
