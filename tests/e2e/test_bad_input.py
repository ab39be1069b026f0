"""Mistakes of a user: exit code 2, one message that says what to do, and nothing written or lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.curves import contents
from tests.e2e.product import Ended, sftrl_each, start_product
from tests.e2e.project import Project, read_rows, write_rows


@dataclass(frozen=True)
class Mistake:
    """Overrides that are wrong, and the parts that the message must have: expected, got, next action."""

    overrides: tuple[str, ...]
    message: tuple[str, ...]


MISTAKES = {
    "a misspelt key": Mistake(
        ("optim.learning_rat=1",),
        ("unknown key 'optim.learning_rat'", "override 'optim.learning_rat=1'", "the keys of 'optim' are"),
    ),
    "a misspelt key that is near a right one": Mistake(
        ("parallel.sequence_paralel=true",),
        ("unknown key 'parallel.sequence_paralel'", "did you mean 'parallel.sequence_parallel'?"),
    ),
    "a misspelt section": Mistake(
        ("checkpoints.every=3",), ("unknown key 'checkpoints'", "did you mean 'checkpoint'?")
    ),
    "an unknown loss": Mistake(("loss={name: gitf}",), ("gitf", "did you mean", "gift")),
    "an unknown option of the loss": Mistake(("loss.betta=3",), ("betta", "did you mean", "beta")),
    "a number of processes that does not fit": Mistake(
        ("parallel.pp=2",),
        ("1 process(es) are not a multiple of parallel.tp * pp * cp = 1 * 2 * 1 = 2", "start 2 (dp = 1)"),
    ),
    "layers that do not divide": Mistake(
        ("parallel={pp: 2, vp: 2}",),
        ("2 layers do not divide by parallel.pp * vp = 2 * 2 = 4", "among the divisors of 2"),
    ),
    "heads that do not divide": Mistake(
        ("parallel.tp=3",),
        ("4 attention heads do not divide by parallel.tp = 3", "2 query groups", "among the divisors of 4"),
    ),
    "no reference for gift": Mistake(
        ("reference=null",), ("loss 'gift' needs a reference model", "add `reference: {kind: frozen}`")
    ),
    "a reference for a loss without one": Mistake(
        ("loss={name: sft}",), ("loss 'sft' uses no reference model", "remove the section `reference`")
    ),
    "a vocabulary smaller than the tokenizer's": Mistake(
        ("model.architecture.vocab_size=99",), ("expected at least 100", "got 99", "raise vocab_size")
    ),
    "sequences longer than the model": Mistake(
        ("data.max_length=65",), ("data.max_length = 65", "max_position_embeddings = 64", "shorten sequences")
    ),
    "a file that is not there": Mistake(
        ("data.train=[nowhere.jsonl]",), ("nowhere.jsonl does not exist", "check data.train")
    ),
    "a misspelt field of Megatron's": Mistake(
        ("parallel.megatron.buket_size=1000",),
        ("parallel.megatron.buket_size: Megatron has no such field", "did you mean bucket_size?"),
    ),
    "a field of Megatron's that has a key": Mistake(
        ("parallel.megatron={overlap_grad_reduce: true}",), ("set parallel.overlap_grad_reduce",)
    ),
    "eight bits without Transformer Engine": Mistake(
        ("train.fp8={}", "model.dtype=bf16"),
        ("train.fp8: expected Transformer Engine's layers", "got torch's on the CPU", "remove it"),
    ),
    "a setting without effect": Mistake(
        ("optim.momentum=0.9",), ("optim.momentum has no effect: optim.name is adamw", "remove it")
    ),
}

Spoil = Callable[[list[str]], None]


def set_line(number: int, text: str) -> Spoil:
    """Replace a line, counted from 1."""

    def spoil(lines: list[str]) -> None:
        lines[number - 1] = text

    return spoil


LONG = json.dumps({"prompt": "x" * 40, "response": "7"})
BAD_ROWS: dict[str, tuple[Spoil, tuple[str, ...], tuple[str, ...]]] = {
    "not JSON": (set_line(7, '{"prompt": "1'), (), (":7: not JSON", "one JSON object on each line")),
    "no response": (set_line(3, '{"prompt": "1+1="}'), (), (":3: ", "response")),
    "an empty response": (set_line(3, '{"prompt": "1+1=", "response": ""}'), (), (":3: ", "response")),
    "too long": (set_line(36, LONG), (), (":36: ", "at most data.max_length = 32 tokens, got 44", "raise")),
    "a response fully truncated": (
        set_line(20, LONG),
        ("data.truncation=right",),
        (":20: ", "fully truncated", "starts at token 42", "raise data.max_length"),
    ),
}


def assert_one_message(done: Ended, parts: tuple[str, ...]) -> None:
    stderr = done.expect(2).stderr
    # megatron-core's warnings about missing CUDA packages may come first.
    _, *messages = f"\n{stderr}".split("\nerror: ")
    assert len(messages) == 1, stderr
    assert "Traceback" not in stderr
    assert [part for part in parts if part not in messages[0]] == [], stderr


@pytest.mark.parametrize("name", MISTAKES)
def test_a_wrong_setting_ends_the_run_before_anything_is_built(
    name: str, project: Project, tmp_path: Path
) -> None:
    mistake = MISTAKES[name]
    run_dir = tmp_path / "run"
    (done,) = sftrl_each([["sft", str(project.yaml), f"run_dir={run_dir}", *mistake.overrides]])
    assert_one_message(done, mistake.message)
    assert not run_dir.exists()


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_by_file_and_line_and_the_corrected_file_trains(
    name: str, project: Project, tmp_path: Path
) -> None:
    spoil, overrides, parts = BAD_ROWS[name]
    data, run_dir = tmp_path / "rows.jsonl", tmp_path / "run"
    lines = project.train.read_text().splitlines()
    spoil(lines)
    data.write_text("\n".join(lines) + "\n")
    command = ["sft", str(project.yaml), f"run_dir={run_dir}", f"data.train=[{data}]", "train.steps=2"]
    (done,) = sftrl_each([[*command, *overrides]])
    assert_one_message(done, (f"{data}{parts[0]}", *parts[1:]))
    assert not run_dir.exists()

    # Another max_length is another run: it must not be refused because of the one that never began.
    write_rows(data, read_rows(project.train))
    (done,) = sftrl_each([[*command, "data.max_length=40"]])
    done.expect(0)


def test_an_environment_that_contradicts_the_run_is_refused(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1")
    arguments = ("sft", str(project.yaml), f"run_dir={tmp_path / 'run'}", "train.deterministic=true")
    with start_product(*arguments, log=tmp_path / "log") as started:
        assert started.wait() != 0
        said = started.output()
    assert "error: train.deterministic: expected the environment variable NVTE_ALLOW_NOND" in said
    assert not (tmp_path / "run").exists()


def test_another_runs_directory_is_refused_and_left_as_it_is(project: Project, one_process: Path) -> None:
    before = contents(one_process)
    (done,) = sftrl_each([["sft", str(project.yaml), f"run_dir={one_process}", "loss.beta=5", "seed=8"]])
    assert_one_message(
        done,
        (
            f"run_dir {one_process} belongs to a run with another configuration: choose another run_dir",
            "loss.beta: 4.0 there, 5 now",
            "seed: 7 there, 8 now",
        ),
    )
    assert contents(one_process) == before


def test_a_directory_with_checkpoints_of_nobody_is_refused(project: Project, tmp_path: Path) -> None:
    (tmp_path / "run/checkpoints/step-00000100").mkdir(parents=True)
    (done,) = sftrl_each([["sft", str(project.yaml), f"run_dir={tmp_path / 'run'}"]])
    assert_one_message(done, ("holds metrics or checkpoints but no resolved.yaml", "choose another run_dir"))
    assert list(contents(tmp_path / "run")) == []


def test_under_torchrun_a_bad_row_is_told_once_and_ends_the_job(project: Project, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(project.train.read_text() + "{\n")
    arguments = ("sft", project.yaml, f"run_dir={tmp_path / 'run'}", f"data.train=[{data}]")
    with start_product(*arguments, log=tmp_path / "log", ranks=2) as started:
        assert started.wait() != 0
        said = started.output()
    assert f"\n{said}".count(f"\nerror: {data}:37: not JSON") == 1
    # torchrun's own report ends with it.
    *_, report = said.split("Root Cause (first observed failure):")
    assert f"traceback : error: {data}:37: not JSON" in report
    # The other rank has heard of it: no traceback of a broken connection. (On an overloaded machine it may
    # repeat the message as its own before torchrun ends it.)
    assert "[rank1]: Traceback" not in said, said
    assert "Connection closed" not in said, said
    assert not (tmp_path / "run").exists()


def test_training_data_that_changed_since_the_checkpoint_is_refused(project: Project, tmp_path: Path) -> None:
    rows = read_rows(project.train)
    data = write_rows(tmp_path / "rows.jsonl", rows)
    command = ["sft", str(project.yaml), f"run_dir={tmp_path / 'run'}", f"data.train=[{data}]"]
    (done,) = sftrl_each([command])
    done.expect(0)
    before = contents(tmp_path / "run/checkpoints")
    write_rows(data, [*rows[1:], rows[0]])  # the same rows in another order are other samples, too
    (done,) = sftrl_each([command])
    assert_one_message(done, ("data.train is not what", "restore the data, or choose another run_dir"))
    assert contents(tmp_path / "run/checkpoints") == before
