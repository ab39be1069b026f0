"""`sftrl doctor reward`: wrong answers that earn what right ones do are found, and sound rewards pass."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_sftrl.apps.doctor.reward_candidates import is_own
from megatron_sftrl.apps.doctor.reward_findings import Hole
from megatron_sftrl.apps.doctor.reward_rows import DoctorRow, rows_of_files, rows_of_tasks
from megatron_sftrl.cli import main
from megatron_sftrl.config.rewards import RewardSection
from megatron_sftrl.rl.rewards import build_rewards
from tests.unit.data.tokenizers_for_tests import write_byte_level

PLANTED = str(Path(__file__).parent / "planted" / "rewards.py")
NAMES = ("Ada", "Bo", "Cyd", "Dee", "Eve", "Fay", "Gus", "Hal")
ROWS = [{"question": f"who is number {i}?", "answer": name, "label": name} for i, name in enumerate(NAMES)]


def rows_file(folder: Path, rows: Sequence[dict] = ROWS) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def doctor(folder: Path, *words: str, expect: int) -> dict[str, Any]:
    """What `sftrl doctor reward` writes to --json."""
    out = folder / "found.json"
    assert main(["doctor", "reward", *words, "--json", str(out)]) == expect
    return json.loads(out.read_text())


def failed(found: dict[str, Any], reward: str) -> dict[str, str]:
    """The problems of each property that does not hold, in one text."""
    findings = found["rewards"][reward]["findings"]
    return {each["property"]: "\n".join(each["problems"]) for each in findings if each["problems"]}


def mean(found: dict[str, Any], reward: str, name: str, form: str) -> float:
    [score] = [
        each["mean"]
        for each in found["rewards"][reward]["candidates"]
        if (each["name"], each["form"]) == (name, form)
    ]
    return score


def of_planted(folder: Path, name: str, *, expect: int) -> dict[str, Any]:
    data = str(rows_file(folder))
    return doctor(folder, "--reward", name, "--module", PLANTED, "--data", data, expect=expect)


def test_a_sound_reward_holds_and_the_form_that_it_reads_is_found(tmp_path: Path) -> None:
    found = of_planted(tmp_path, "sound", expect=0)
    assert mean(found, "sound", "own answer", r"\boxed{X}") == 1
    assert mean(found, "sound", "another row's answer", r"\boxed{X}") == 0
    assert failed(of_planted(tmp_path, "elsewhere", expect=0), "elsewhere") == {}


@pytest.mark.parametrize(
    ("name", "problem", "text"),
    [
        ("starts", "wrong", "the empty text earns full marks in 8 of the 8 rows that have another answer"),
        ("undeclared", "wrong", "the empty text earns full marks in 8 of the 8 rows"),
        ("generous", "wrong", "'0' earns full marks in 8 of the 8 rows that have another answer: '0' in"),
        ("pleased", "wrong", "earns full marks in 8 of the 8 rows"),
        ("never", "right", "the right answer earns nothing in 8 of 8 rows, however it is written; the first"),
        ("counts_calls", "twice", "got 1.00"),
    ],
)
def test_a_hole_in_a_users_own_reward_is_named(name: str, problem: str, text: str, tmp_path: Path) -> None:
    problems = failed(of_planted(tmp_path, name, expect=1), name)
    assert list(problems) == [problem]
    assert text in problems[problem]


def test_a_reward_that_does_not_look_at_the_answer_is_not_held_against_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(rows_file(tmp_path, [{"question": "who?", "answer": "x" * i} for i in range(1, 13)]))
    for seed in range(3):
        words = ["--reward", "longer", "--module", PLANTED, "--data", data, "--seed", str(seed)]
        assert failed(doctor(tmp_path, *words, expect=0), "longer") == {}
        assert "in 12 of 12 rows (the reward does not look at `answer`)" in capsys.readouterr().out


def test_calls_that_fail_are_counted_and_a_candidate_that_always_does_is_given_up(tmp_path: Path) -> None:
    run = run_yaml(tmp_path, rows_file(tmp_path, ROWS * 2), {"name": "breaks", "modules": [PLANTED]})
    found = doctor(tmp_path, str(run), "reward_workers.seconds=0.2", expect=1)
    problems = failed(found, "breaks")
    assert list(problems) == ["calls"]
    assert "calls ended with timeout; the first: " in problems["calls"]
    assert "calls ended with crashed; the first: " in problems["calls"]
    rows = {(one["name"], one["form"]): one["rows"] for one in found["rewards"]["breaks"]["candidates"]}
    assert rows["'0'", "X"] == rows["the question", "X"] == 4
    assert rows["own answer", "X"] == 16


def run_yaml(folder: Path, data: Path, *rewards: dict, **data_keys: Any) -> Path:
    """A run of GRPO; nothing of its model is there."""
    tokenizer = write_byte_level(folder / "tokenizer", template="chatml")
    path = folder / "run.yaml"
    values = {
        "run_dir": str(folder / "run"),
        "model": {"hf_config": "/nowhere/config.json"},
        "tokenizer": {"path": str(tokenizer)},
        "data": {"train": [str(data)], "max_prompt_length": 256, **data_keys},
        "rollout": {"prompts_per_step": 1, "max_new_tokens": 4},
        "rewards": list(rewards),
        "batch": {"global_size": 1},
        "loss": {"name": "grpo"},
        "optim": {"lr": 1e-3},
        "train": {"steps": 1},
    }
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_runs_rewards_are_examined_on_a_sample_of_its_data_as_it_reads_them(tmp_path: Path) -> None:
    rows = [
        {"problem": f"two times {i}?", "final": {"value": rf"twice {i} is $\boxed{{{2 * i}}}$"}}
        for i in range(1, 40)
    ]
    run = run_yaml(
        tmp_path,
        rows_file(tmp_path, rows),
        {"name": "math"},
        {"name": "format"},
        {"name": "length", "max_tokens": 9, "cache": 2},
        columns={"prompt": "problem", "answer": "final.value"},
    )
    found = doctor(
        tmp_path, str(run), "reward_workers.num_workers=1", "--rows", "12", "--seed", "3", expect=0
    )
    assert len(found["rows"]) == 12
    assert found["num_rows"] == 39
    assert found["rows"] != [f"{tmp_path}/rows.jsonl:{line}" for line in range(1, 13)]
    for form in (r"\boxed{X}", "#### X"):
        assert mean(found, "math", "own answer", form) == 1
    assert mean(found, "math", "own answer", "as in the row") == 1
    assert mean(found, "math", "own answer", "X") == 0
    assert mean(found, "length", "the question", "X") < 0 == mean(found, "length", "'0'", "X")
    again = doctor(
        tmp_path, str(run), "reward_workers.num_workers=1", "--rows", "12", "--seed", "3", expect=0
    )
    assert again["rows"] == found["rows"]


def test_a_constant_is_right_in_the_rows_whose_answer_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = ["1/2", "0.5", r"\frac{2}{4}", r"\frac{1}{2}", r"\dfrac{1}{2}", "1", "1.0", "0.50", "True", "0"]
    data = rows_file(tmp_path, [{"question": "how much?", "answer": text} for text in answers])
    assert failed(doctor(tmp_path, "--reward", "math", "--data", str(data), expect=0), "math") == {}
    assert "earns 0.60 on average, the right answer 1.00" in capsys.readouterr().out


def test_tasks_of_reasoning_gym_that_pay_for_wrong_answers_are_named(tmp_path: Path) -> None:
    tasks = ("chain_sum", "coin_flip", "game_of_life_halting", "puzzle24")
    words = [word for task in tasks for word in ("--task", task)]
    found = doctor(tmp_path, *words, "--rows", "6", expect=1)
    problems = failed(found, "reasoning_gym")
    assert list(problems) == ["wrong"]
    coin, life, puzzle = problems["wrong"].splitlines()
    assert coin.startswith("coin_flip: '0' earns full marks in ")
    assert life.startswith("game_of_life_halting: ")
    for name in ("another row's answer", "'0'", "'1'", "the question", "'True'", "the most frequent answer"):
        assert name in life
    assert "the empty text" not in life
    assert puzzle.startswith("puzzle24: ")
    assert "the most frequent answer" in puzzle
    assert "another row's answer" in puzzle
    assert puzzle.endswith("it is right there, too, or nothing looks at the row's question")


def test_a_task_among_others_in_a_file_is_judged_by_itself(tmp_path: Path) -> None:
    rows = [
        {"question": "?", "answer": answer, "metadata": {"source_dataset": task}}
        for task, answers in (("chain_sum", range(11, 51)), ("coin_flip", ("0.25", "0.5")))
        for answer in map(str, answers)
    ]
    data = str(rows_file(tmp_path, rows))
    found = doctor(tmp_path, "--reward", "reasoning_gym", "--data", data, "--rows", "8", expect=1)
    assert failed(found, "reasoning_gym")["wrong"].startswith("coin_flip: '0' earns full marks in 2 of the 2")


def test_tasks_without_an_answer_use_the_one_in_their_metadata_or_say_that_none_is_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = ("graph_color", "propositional_logic", "rubiks_cube", "boxnet", "rush_hour")
    words = [word for task in tasks for word in ("--task", task)]
    found = doctor(tmp_path, *words, "--rows", "4", expect=1)
    out = capsys.readouterr().out
    assert "no right answer is known in 8 of 20 rows (the rows have none): full marks are 1 there" in out
    assert "the right answer 1.00" in out
    problems = failed(found, "reasoning_gym")
    assert set(problems) == {"wrong"}


def test_a_task_whose_seed_does_not_fix_its_rows_is_named(tmp_path: Path) -> None:
    tasks = ("list_functions", "codeio", "acre", "chain_sum")
    functions, programs, acre = rows_of_tasks(tasks, count=40, seed=0).problems
    assert functions.startswith("list_functions: made again with seed 0 in another process, ")
    assert programs.startswith("codeio: made again with seed 0 in another process, ")
    assert acre.startswith("acre: of 80 rows made with seed 0, ")
    assert "another size is other data" in acre
    # Its rows follow the order of Python's sets.
    found = doctor(tmp_path, "--task", "ransom_note", "--rows", "2", expect=1)
    assert failed(found, "reasoning_gym") == {}
    [finding] = found["data"]
    assert finding["problems"][0].startswith("ransom_note: made again with seed 0 in another process, 2 of 2")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected run.yaml, or --reward NAME --data FILE, or --task NAME, got none of them"),
        (
            ["--task", "coin_flips"],
            "--task: expected a task of reasoning_gym, got 'coin_flips' (did you mean",
        ),
        (["--task", "composite"], "reasoning_gym does not make it with its default settings"),
        (["--task", "coin_flip", "--reward", "math"], "expected --reward reasoning_gym or none, got math"),
        (["--task", "coin_flip", "--rows", "0"], "--rows: expected at least 1, got 0"),
        (["--task", "coin_flip", "--option", "scored=1"], "unknown option 'scored'"),
        (
            ["--task", "coin_flip", "--option", "weight=2"],
            "--option weight: expected an option of the reward",
        ),
        (["--reward", "maths", "--data", "rows.jsonl"], "unknown reward 'maths' (did you mean 'math'"),
        (["--data", "rows.jsonl"], "expected --reward NAME or --module FILE beside --data, got neither"),
        (["--data", "rows.jsonl", "--module", PLANTED], "choose with --reward NAME"),
        (["--reward", "math", "--data", "missing.jsonl"], "--data: missing.jsonl does not exist"),
        (["--reward", "reasoning_gym", "--data", "rows.jsonl"], "rows.jsonl:1: reward 'reasoning_gym' needs"),
        (["run.yaml", "--reward", "math"], "expected run.yaml, or --reward with --data or --task, got both"),
        (["--task", "coin_flip", "--json", "no/found.json"], "--json: no such directory no"),
    ],
)
def test_a_users_mistake_is_one_message(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows_file(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", "reward", *words]) == 2
    assert message in capsys.readouterr().err


def test_which_answers_are_the_rows_own_is_not_asked_of_the_reward() -> None:
    row = DoctorRow(source="", prompt="", question="", values={}, answers=("New  York", "1,000", "3/4"))
    for answer in ("new york.", "1000", "1000.0", " 0.75 ", "6/8"):
        assert is_own(answer, row), answer
    for answer in ("", "New", "100", "0.7", "3", "1e3"):
        assert not is_own(answer, row), answer


def test_every_task_of_the_data_is_in_a_sample_that_has_room_for_it(tmp_path: Path) -> None:
    tasks = ["a"] * 50 + ["b"] * 2 + ["c"]
    rows = [{"question": "?", "answer": "1", "metadata": {"source_dataset": task}} for task in tasks]
    sample = rows_of_files([rows_file(tmp_path, rows)], count=6, seed=0, key="--data")
    assert sorted(row.task for row in sample.rows) == ["a", "a", "a", "b", "b", "c"]


def test_an_answer_is_written_in_a_rewards_own_form_only_where_it_takes_it_from_answer() -> None:
    [math, elsewhere] = build_rewards(
        [RewardSection(name="math"), RewardSection(name="elsewhere", modules=[PLANTED])]
    )
    assert math.written({"answer": "7"}, "8") == r"\boxed{8}"
    assert math.written({"answer": "7"}, "") is None
    assert elsewhere.written({"label": "7"}, "8") is None


@pytest.mark.parametrize(
    ("earning", "wrong", "is_large"), [(1, 1, True), (1, 8, False), (2, 8, True), (2, 30, False)]
)
def test_one_row_by_chance_is_no_hole(earning: int, wrong: int, is_large: bool) -> None:
    hole = Hole(name="", form="X", text="", source="", own=None, num_earning=earning, num_wrong=wrong)
    assert hole.is_large == is_large
