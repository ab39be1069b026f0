"""Mistakes in a GRPO run: exit code 2, one message that says what to do, before anything is built."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.curves import contents
from tests.e2e.grpo_project import GrpoProject
from tests.e2e.product import sftrl_each
from tests.e2e.project import Project, read_rows, write_rows
from tests.e2e.test_bad_input import assert_one_message

_SFT = "sft={data: {train: [x.jsonl], max_length: 8}, global_size: 4, mu: {peak: 0.1, valley: 0.1}"

MISTAKES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "an unknown preset": (("preset=dappo",), ("unknown preset 'dappo' (did you mean 'dapo'?)",)),
    "a preset for another loss": (
        ("preset=dapo", "loss={name: sft}"),
        ("remove one of preset and loss.name",),
    ),
    "a loss for demonstrations": (
        ("loss={name: sft}",),
        ("loss 'sft' does not use advantages: `sftrl sft` trains with it",),
    ),
    "a temperature in two places": (
        ("loss.temperature=0.7",),
        ("loss.temperature follows rollout.temperature", "remove this one"),
    ),
    "a KL term without reference": (
        ("loss.kl_coefficient=0.1",),
        ("loss 'grpo' needs a reference model", "add `reference: {kind: frozen}`"),
    ),
    "a reference without KL term": (
        ("reference={kind: frozen}",),
        ("loss 'grpo' uses no reference model: remove the section",),
    ),
    "a misspelt reward": (("rewards=[{name: exact_mach}]",), ("exact_mach", "did you mean", "exact_match")),
    "an unknown option of a reward": (
        ("rewards=[{name: exact_match, ignore_cas: true}]",),
        ("exact_match", "ignore_cas"),
    ),
    "no reward": (("rewards=[]",), ("rewards: expected at least one",)),
    "a step that mini-batches do not divide": (
        ("batch.global_size=6",),
        ("batch.global_size = 6 does not divide", "4 * 4 = 16", "such as 16 for one update per step"),
    ),
    "a mini-batch larger than a step": (
        ("batch.global_size=32",),
        ("batch.global_size = 32 does not divide",),
    ),
    "groups of one": (
        ("rollout.group_size=1", "batch.global_size=4"),
        ("rollout.group_size = 1", "every advantage is 0", "at least 2"),
    ),
    "responses beyond the model's positions": (
        ("rollout.max_new_tokens=49",),
        ("data.max_prompt_length + rollout.max_new_tokens = 65", "max_position_embeddings = 64"),
    ),
    "micro-batches too small for a response": (
        ("batch={global_size: 8, packing: true, max_tokens: 23}",),
        ("batch.max_tokens = 23 is less than data.max_prompt_length + rollout.max_new_tokens = 24",),
    ),
    "epochs that fill no step": (
        ("train={epochs: 1}", "rollout.prompts_per_step=16"),
        ("train.epochs = 1 over 10 rows", "rollout.prompts_per_step = 16"),
    ),
    "a group of demonstrations alone": (
        ("rollout.demonstrations=4",),
        ("rollout.demonstrations = 4 leaves none of the rollout.group_size = 4 responses",),
    ),
    "demonstrations that no row has": (
        ("rollout.demonstrations=1",),
        ("no row of data.train has a response", "data.columns.response", "rollout.demonstrations=0"),
    ),
    "shaping without demonstrations": (
        ("loss.shaping=0.2",),
        ("loss.shaping has no effect: rollout.demonstrations is 0",),
    ),
    "demonstrations for a loss without advantages": (
        ("rollout.demonstrations=1", "loss={name: ts_opsd, tau: 2.0}", "reference={kind: frozen}"),
        ("rollout.demonstrations: loss 'ts_opsd' does not tell demonstrations",),
    ),
    "useful groups for a loss without rewards": (
        ("filters.dynamic_sampling=true", "loss={name: ts_opsd, tau: 2.0}", "reference={kind: frozen}"),
        ("filters.dynamic_sampling has no effect: loss 'ts_opsd' learns from every response",),
    ),
    "self-distillation from nothing": (
        ("loss={name: ts_opsd, tau: 2.0}",),
        ("loss 'ts_opsd' needs a reference model",),
    ),
    "an SFT term on the policy's own responses": (
        (f"{_SFT}, loss: {{name: grpo}}}}",),
        ("sft.loss: loss 'grpo' is about the policy's own responses",),
    ),
    "an SFT term whose share rises": (
        ("sft={data: {train: [x]}, global_size: 4, mu: {peak: 0.1, valley: 0.2}}",),
        ("sft.mu: valley 0.2 is above peak 0.1",),
    ),
    "demonstrations longer than the model": (
        (f"{_SFT.replace('max_length: 8', 'max_length: 65')}}}",),
        ("sft.data.max_length = 65 is more than the model's max_position_embeddings = 64",),
    ),
    "two limits of a gate": (
        ("gates=[{metric: entropy, below: 1, above: 2}]",),
        ("gate on entropy: give exactly one of below, above and falls_by",),
    ),
    "rounds of a search that is off": (
        ("filters.max_rounds=2",),
        ("filters.max_rounds has no effect: filters.dynamic_sampling is off",),
    ),
    "a step ahead with several updates and no correction": (
        ("rollout.ahead=1", "loss={name: grpo, correction: none}"),
        ("rollout.ahead = 1 with 4 updates per step", "set loss.correction = tis or icepop"),
    ),
    "a step ahead with several updates of a loss that cannot correct": (
        ("rollout.ahead=1", "loss={name: ts_opsd, tau: 2.0}", "reference={kind: frozen}"),
        ("rollout.ahead = 1 with 4 updates per step", "loss 'ts_opsd' does not correct"),
    ),
    "a step ahead with a checkpoint in every step": (
        ("rollout.ahead=1", "checkpoint.every=1"),
        ("rollout.ahead has no effect: checkpoint.every = 1",),
    ),
    "two steps ahead": (("rollout.ahead=2",), ("rollout.ahead", "expected a number <= 1, got 2")),
    "an offload without a GPU": (
        ("rollout.offload=true",),
        ("rollout.offload takes gradients", "this run has no GPU: remove it"),
    ),
    "a section for demonstrations": (("data.max_length=8",), ("unknown key 'data.max_length'",)),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_wrong_setting_ends_the_run_before_anything_is_built(
    name: str, grpo: GrpoProject, tmp_path: Path
) -> None:
    overrides, parts = MISTAKES[name]
    (done,) = sftrl_each([grpo.command(tmp_path / "run", *overrides)])
    assert_one_message(done, parts)
    assert not (tmp_path / "run").exists()


def test_a_loss_of_advantages_is_refused_on_demonstrations(project: Project, tmp_path: Path) -> None:
    overrides = (f"run_dir={tmp_path / 'run'}", "loss={name: grpo}", "reference=null")
    (done,) = sftrl_each([["sft", str(project.yaml), *overrides]])
    assert_one_message(done, ("loss 'grpo' needs advantages, which `sftrl grpo` makes of rewards",))
    assert not (tmp_path / "run").exists()


def test_a_reward_that_cannot_tell_right_from_wrong_is_refused(grpo: GrpoProject, tmp_path: Path) -> None:
    (done,) = sftrl_each([grpo.command(tmp_path / "run", grpo.reward("blind"))])
    assert_one_message(
        done, ("reward 'blind' does not tell right from wrong", "gave 0 to the right example '4'", "Correct")
    )
    assert not (tmp_path / "run").exists()


Rows = list[dict]
Spoil = Callable[[Rows], None]


def changed(number: int, **values: object) -> Spoil:
    """Change a row, counted from 1; None takes a column out."""

    def spoil(rows: Rows) -> None:
        rows[number - 1] = {k: v for k, v in {**rows[number - 1], **values}.items() if v is not None}

    return spoil


BAD_ROWS: dict[str, tuple[Spoil, tuple[str, ...]]] = {
    "a prompt that is too long": (
        changed(4, prompt="x" * 40),
        (":4: expected at most data.max_prompt_length = 16 tokens, got 42", "raise it or remove the row"),
    ),
    "no prompt": (changed(7, prompt=None), (":7: expected either prompt or messages",)),
    "an empty prompt": (changed(2, prompt=""), (":2: prompt: expected a non-empty text",)),
    "no answer": (
        changed(9, answer=None),
        (":9: reward 'exact_match' needs 'answer' in every row", "add it to the data"),
    ),
    "nothing at all": (list.clear, ("no prompts in ",)),
}


@pytest.mark.parametrize("where", ["train", "valid"])
@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_by_file_and_line(
    name: str, where: str, grpo: GrpoProject, tmp_path: Path
) -> None:
    spoil, parts = BAD_ROWS[name]
    rows = read_rows(grpo.prompts)
    spoil(rows)
    data = write_rows(tmp_path / "rows.jsonl", rows)
    overrides = (f"data.{where}=[{data}]", "rewards=[{name: exact_match}]")
    (done,) = sftrl_each([grpo.command(tmp_path / "run", *overrides)])
    first, *more = parts
    assert_one_message(done, (f"{data}{first}" if first.startswith(":") else f"{first}{data}", *more))
    assert not (tmp_path / "run").exists()


def test_a_column_that_is_no_json_is_refused_before_it_reaches_a_reward(
    grpo: GrpoProject, tmp_path: Path
) -> None:
    import datetime

    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": "say x", "when": datetime.datetime(2026, 1, 1)}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (done,) = sftrl_each([grpo.command(tmp_path / "run", f"data.train=[{tmp_path / 'rows.parquet'}]")])
    assert_one_message(
        done, (f"{tmp_path / 'rows.parquet'} row 0: expected text, numbers", "convert or remove the column")
    )


@pytest.mark.parametrize("column", ["prompt", "answer"])
def test_prompts_that_changed_since_the_checkpoint_are_refused(
    column: str, grpo: GrpoProject, tmp_path: Path
) -> None:
    rows = read_rows(grpo.prompts)
    data = write_rows(tmp_path / "rows.jsonl", rows)
    command = grpo.command(tmp_path / "run", f"data.train=[{data}]", "train.steps=1")
    sftrl_each([command])[0].expect(0)
    before = contents(tmp_path / "run")
    rows[5][column] = json.dumps(column)
    write_rows(data, rows)
    (done,) = sftrl_each([command])
    assert_one_message(done, ("data.train is not what", "restore the data, or choose another run_dir"))
    assert contents(tmp_path / "run") == before
