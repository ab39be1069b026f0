"""Rows in the columns in which benchmarks are published: what is asked, and what is the answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_sftrl.config.data import PromptColumns
from megatron_sftrl.config.rewards import RewardSection
from megatron_sftrl.config.schema import TokenizerSection
from megatron_sftrl.data.benchmarks import BOXED, BOXED_LETTER, TAGGED
from megatron_sftrl.data.prompts import PromptRow, read_prompt_set
from megatron_sftrl.data.tokenizer import Tokenizer, load_tokenizer
from megatron_sftrl.errors import UserError
from megatron_sftrl.rl.rewards import build_rewards
from tests.unit.data.tokenizers_for_tests import write_byte_level
from tests.unit.rl.rewards.samples import sample

Row = dict[str, Any]

GSM8K = {"question": "Two and two?", "answer": "2 + 2 = <<2+2=4>>4.\n#### 4"}
MATH = {
    "problem": "What is $2+2$?",
    "solution": r"It is $\boxed{4}$.",
    "level": "Level 1",
    "type": "Algebra",
}
AIME = {"ID": "2024-I-1", "Problem": "What is $2+2$?", "Solution": "Add.", "Answer": 4}
AMC = {"id": 0, "problem": "What is $2+2$?", "answer": 4.0, "url": "https://"}
MMLU = {"question": "Which?", "subject": "x", "choices": ["one", "two", "three", "four"], "answer": 2}
MMLU_PRO = {
    "question_id": 70,
    "question": "Which?",
    "options": ["one", "two", "three", "four", "five"],
    "answer": "E",
    "answer_index": 4,
    "cot_content": "",
    "category": "math",
}
ARC = {
    "id": "MCAS_1",
    "question": "Which?",
    "choices": {"text": ["one", "two", "three"], "label": ["1", "2", "3"]},
    "answerKey": "2",
}
GPQA = {
    "Question": "Which?\n",
    "Correct Answer": "four",
    "Incorrect Answer 1": "one",
    "Incorrect Answer 2": "two",
    "Incorrect Answer 3": "three",
    "Record ID": "rec0",
}
GYM = {
    "question": "3 + 4 =",
    "answer": "7",
    "metadata": {"source_dataset": "chain_sum", "source_index": 0},
}
SUM = "What is $2+2$?"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Without a template: a prompt's tokens are those of its text."""
    return load_tokenizer(TokenizerSection(path=write_byte_level(tmp_path_factory.mktemp("t") / "t")))


def read(tokenizer: Tokenizer, folder: Path, *rows: Row, **columns: str) -> list[tuple[str, PromptRow]]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    mapped = PromptColumns(**columns) if columns else None  # type: ignore[arg-type]
    found = read_prompt_set([path], tokenizer, max_prompt_length=400, columns=mapped).rows
    return [(tokenizer.decode(each.tokens), each) for each in found]


@pytest.mark.parametrize(
    ("row", "name", "prompt", "answer"),
    [
        (MATH, None, f"{SUM}\n\n{BOXED}", MATH["solution"]),
        (AIME, None, f"{SUM}\n\n{BOXED}", 4),
        (AMC, None, f"{SUM}\n\n{BOXED}", 4),
        ({**MATH, "answer": "4"}, None, f"{SUM}\n\n{BOXED}", "4"),
        ({"question": SUM, "answer": "4"}, "math", f"{SUM}\n\n{BOXED}", "4"),
        (GSM8K, "gsm8k", f"Two and two?\n\n{BOXED}", GSM8K["answer"]),
        (GSM8K, None, "Two and two?", GSM8K["answer"]),
        (MMLU, None, f"Which?\n\nA. one\nB. two\nC. three\nD. four\n\n{BOXED_LETTER}", "C"),
        (MMLU_PRO, None, f"Which?\n\nA. one\nB. two\nC. three\nD. four\nE. five\n\n{BOXED_LETTER}", "E"),
        (ARC, None, f"Which?\n\nA. one\nB. two\nC. three\n\n{BOXED_LETTER}", "B"),
        (GPQA, None, f"Which?\n\nA. three\nB. two\nC. four\nD. one\n\n{BOXED_LETTER}", "C"),
        (GYM, "reasoning_gym", f"3 + 4 =\n\n{TAGGED}", "7"),
        (GYM, None, "3 + 4 =", "7"),
        ({**GYM, "answer": None}, "reasoning_gym", f"3 + 4 =\n\n{TAGGED}", None),
    ],
)
def test_a_benchmarks_row_asks_its_question_with_options_and_instruction(
    row: Row, name: str | None, prompt: str, answer: object, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    columns = {} if name is None else {"benchmark": name}
    ((text, found),) = read(tokenizer, tmp_path, row, **columns)
    assert text == prompt
    assert found.values["answer"] == answer


@pytest.mark.parametrize(
    ("row", "reward"),
    [(MATH, "math"), (AIME, "math"), (AMC, "math"), (MMLU_PRO, "multiple_choice"), (GPQA, "multiple_choice")],
)
def test_its_reward_takes_the_rows_own_answer_for_right_and_another_for_wrong(
    row: Row, reward: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    ((_, found),) = read(tokenizer, tmp_path, row)
    (judge,) = build_rewards([RewardSection(name=reward)])
    values: Any = found.values
    judge.check_row(values)
    right = judge.solution(values)
    assert right is not None
    assert judge(sample(right, **values)).reward == 1.0
    assert judge(sample(r"\boxed{B}", **values)).reward == 0.0


def test_the_options_of_gpqa_are_shuffled_by_their_row_and_kept_for_the_result(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    rows = [{**GPQA, "Question": f"Which of {number}?"} for number in range(200)]
    first = read(tokenizer, tmp_path, *rows)
    assert first == read(tokenizer, tmp_path, *rows)
    alone = read(tokenizer, tmp_path, rows[7])  # whatever stands around it
    assert alone[0][0] == first[7][0]
    letters = [found.values["answer"] for _, found in first]
    for letter in "ABCD":
        # 200 draws at 1/4: five standard deviations are 31.
        assert 50 - 31 < letters.count(letter) < 50 + 31
    for _, found in first:
        options: Any = found.values["options"]
        assert sorted(options) == ["four", "one", "three", "two"]
        assert options["ABCD".index(str(found.values["answer"]))] == "four"


def test_another_instruction_takes_the_place_of_the_benchmarks_own(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    ((text, _),) = read(tokenizer, tmp_path, MATH, instruction="Be brief.")
    assert text == f"{SUM}\n\nBe brief."
    ((text, _),) = read(tokenizer, tmp_path, GSM8K, benchmark="gsm8k", instruction="")
    assert text == "Two and two?"
    with pytest.raises(UserError, match=r"rows\.jsonl:1: data\.columns\.instruction is for rows of a benchm"):
        read(tokenizer, tmp_path, GSM8K, instruction="Be brief.")
    with pytest.raises(ValueError, match=r"benchmark is for rows .* remove it, or prompt"):
        PromptColumns(prompt="question", benchmark="gsm8k")


def without(row: Row, column: str) -> Row:
    return {key: value for key, value in row.items() if key != column}


@pytest.mark.parametrize(
    ("row", "name", "message"),
    [
        (without(MMLU_PRO, "answer_index"), None, "the row has no answer_index of mmlu_pro; expected"),
        ({**MMLU_PRO, "answer": None}, None, "the row has no answer of mmlu_pro"),
        ({**MMLU_PRO, "answer": "A"}, None, "answer: expected E, the letter of answer_index, got 'A'"),
        (
            {**MMLU_PRO, "answer_index": 5},
            None,
            "answer_index: expected 0 to 4, .* got 5",
        ),
        ({**MMLU_PRO, "options": {"A": "one"}}, None, "options: expected a list of texts, got dict"),
        (without(ARC, "answerKey"), None, "the row has no answer of mmlu"),
        ({**ARC, "answerKey": "B"}, None, "answerKey: expected one of 1, 2, 3, got 'B'"),
        ({**ARC, "choices": ["one"]}, None, "choices: expected text and label, got"),
        (without(GPQA, "Incorrect Answer 3"), None, "the row has no Incorrect Answer 3 of gpqa"),
        ({**GPQA, "Incorrect Answer 2": "four"}, None, "Correct Answer: 'four' is an incorrect answer, too"),
        ({**MATH, "solution": "It is 4."}, None, r"solution: expected a solution with .boxed.*; got neither"),
        (without(MATH, "solution"), None, r"no answer\|Answer\|solution\|Solution of math"),
        ({**GSM8K, "answer": "4"}, "gsm8k", "answer: expected a solution that ends in ####"),
        (without(GSM8K, "answer"), "gsm8k", r"benchmark: a row of gsm8k has answer, got \['question'\]"),
        ({**GYM, "metadata": "{}"}, "reasoning_gym", "metadata: expected an object with source_dataset"),
        (GSM8K, "gpqa", "benchmark: a row of gpqa has Question and Correct Answer and"),
    ],
)
def test_a_row_that_lacks_something_is_refused_by_file_and_line(
    row: Row, name: str | None, message: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    columns = {} if name is None else {"benchmark": name}
    with pytest.raises(UserError, match=rf"rows\.jsonl:1: .*{message}"):
        read(tokenizer, tmp_path, row, **columns)


def test_a_row_of_another_benchmark_than_the_first_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rows\.jsonl:2: the row holds mmlu_pro .* first .* holds arc rows"):
        read(tokenizer, tmp_path, ARC, MMLU_PRO)


def test_a_prompt_of_the_rows_own_comes_before_the_benchmarks_columns(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    ((text, found),) = read(tokenizer, tmp_path, {**MATH, "prompt": "Say 4.", "answer": "4"})
    assert (text, found.values["answer"]) == ("Say 4.", "4")
