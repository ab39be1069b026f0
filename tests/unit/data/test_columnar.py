"""Columns whose type datasets has guessed: texts that it may have changed are refused, the rest is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_sftrl.config.data import PromptColumns
from megatron_sftrl.config.schema import TokenizerSection
from megatron_sftrl.data.dataset import find_rows
from megatron_sftrl.data.prompts import read_prompt_set
from megatron_sftrl.data.rows import read_rows
from megatron_sftrl.data.tokenizer import Tokenizer, load_tokenizer
from megatron_sftrl.errors import UserError
from tests.unit.data.tokenizers_for_tests import write_byte_level


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return load_tokenizer(TokenizerSection(path=write_byte_level(tmp_path / "tokenizer", template="chatml")))


def guessed(directory: Path, rows: list[dict]) -> tuple[Path, Path, Path]:
    """JSON lines, and what load_dataset("json") makes of them: Parquet and a directory."""
    import datasets

    lines = directory / "rows.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = datasets.load_dataset(
        "json", data_files=str(lines), split="train", cache_dir=str(directory / "cache")
    )
    found.to_parquet(str(directory / "rows.parquet"))
    found.save_to_disk(str(directory / "rows"))
    return lines, directory / "rows.parquet", directory / "rows"


MIXED = ("1.50", "007", "null", 3)
DATES = ("2024-01-02", "2024-03-04")
JSON, TIME = r"its type is Json.*Features\(", r"its type is timestamp.*dates"


@pytest.mark.parametrize(
    ("rows", "column", "message"),
    [
        ([{"prompt": "a", "answer": each} for each in MIXED], "answer", JSON),
        ([{"prompt": "a", "answer": each} for each in DATES], "answer", TIME),
        ([{"question": "a", "answer": each} for each in MIXED], "answer", JSON),
        ([{"prompt": "a", "answer": [each]} for each in DATES], "answer", TIME),
        (
            [
                {"prompt": [{"role": "user", "content": "a"}], "reward_model": {"ground_truth": each}}
                for each in MIXED
            ],
            "reward_model.ground_truth",
            JSON,
        ),
        ([{"prompt": each, "answer": "a"} for each in MIXED], "prompt", JSON),
        (
            [{"messages": [{"role": "user", "content": each}], "answer": "a"} for each in MIXED],
            "messages.content",
            JSON,
        ),
    ],
)
def test_a_text_that_datasets_may_have_changed_is_refused(rows, column, message, tokenizer, tmp_path) -> None:
    lines, *changed = guessed(tmp_path, rows)
    for path in changed:
        assert [row.values for row in read_rows(path)] != rows
        with pytest.raises(UserError, match=rf"rows(\.parquet)?: {column} may not be what .*{message}"):
            read_prompt_set([path], tokenizer, max_prompt_length=64)
    if column not in ("prompt", "messages.content"):  # a number is no prompt
        read = read_prompt_set([lines], tokenizer, max_prompt_length=64).rows
        assert [{**each.values, **row} for each, row in zip(read, rows, strict=True)] == [
            each.values for each in read
        ]


def test_the_answer_that_data_columns_names_is_the_one_that_counts(tokenizer, tmp_path) -> None:
    rows = [{"prompt": "a", "solution": each, "answer": "1.50"} for each in MIXED]
    _, parquet, saved = guessed(tmp_path, rows)
    for path in (parquet, saved):
        with pytest.raises(UserError, match="solution may not be what was written"):
            read_prompt_set([path], tokenizer, max_prompt_length=64, columns=PromptColumns(answer="solution"))
        found = read_prompt_set([path], tokenizer, max_prompt_length=64).rows
        assert [row.values["answer"] for row in found] == ["1.50"] * 4


@pytest.mark.parametrize(
    "answers", [["1.50", "007"], [1, 2], [1, 2.5], ["2024-01-02", "no date"], [["1.50"]]]
)
def test_answers_that_are_what_was_written_are_taken(answers, tokenizer, tmp_path) -> None:
    for path in guessed(tmp_path, [{"prompt": "a", "answer": each} for each in answers]):
        found = read_prompt_set([path], tokenizer, max_prompt_length=64).rows
        assert [row.values["answer"] for row in found] == answers


def test_a_demonstration_that_datasets_may_have_changed_is_refused(tokenizer, tmp_path) -> None:
    rows = [{"prompt": "a", "response": each} for each in ("Blue", '"quoted"', 3)]
    _, parquet, saved = guessed(tmp_path, rows)
    for path in (parquet, saved):
        with pytest.raises(UserError, match="response may not be what was written"):
            find_rows([path], tokenizer, max_length=64, truncation="error").load()


def test_json_that_is_no_text_of_a_row_is_read_the_same_from_every_file(tokenizer, tmp_path) -> None:
    rows = [
        {
            "prompt": "a",
            "response": "b",
            "meta": [{"inner": value, "other": number}],
            "more": {"value": value},
            "whole": value,
        }
        for number, value in enumerate([{"x": 1}, "text", [1, "1.50"], None])
    ]
    lines, parquet, saved = guessed(tmp_path, rows)
    expected = [row.values for row in read_rows(lines)]
    assert expected == rows
    assert [row.values for row in read_rows(parquet)] == [row.values for row in read_rows(saved)] == rows
    for path in (parquet, saved):
        assert len(find_rows([path], tokenizer, max_length=64, truncation="error").load()) == 4
