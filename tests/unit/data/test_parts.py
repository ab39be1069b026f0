"""Files that several nodes share out become, joined, the very bytes that one process writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_sftrl.config.schema import TokenizerSection
from megatron_sftrl.data.dataset import RowsToTokenize, find_rows
from megatron_sftrl.data.tokenizer import Tokenizer, load_tokenizer
from megatron_sftrl.data.tokenizing import Tokenizing
from tests.unit.data.tokenizers_for_tests import write_byte_level

NUM_FILES = 5


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return load_tokenizer(TokenizerSection(path=write_byte_level(tmp_path / "tokenizer", adds_bos=True)))


def moves_nothing() -> None:
    pass


def write_files(folder: Path, tokenizer: Tokenizer, *, scored: set[int]) -> list[Path]:
    """Files of different sizes, some rows of which are too long; two paths share one of them."""
    folder.mkdir()
    paths = []
    for index in range(NUM_FILES):
        rows: list[dict] = [
            {
                "prompt": f"question {row}",
                "response": f"answer {row} of {index}" + " and so on" * (10 * (row % 3 == 1)),
            }
            for row in range(2 + 3 * index)
        ]
        path = write(folder / f"{index}.jsonl", rows)
        if index in scored:
            plain = find_rows([path], tokenizer, max_length=10_000, truncation="error").load()
            for row, example in zip(rows, (plain[each] for each in range(len(plain))), strict=True):
                ids = example.loss_token_ids.tolist()
                row |= {"behavior_logprobs": [-0.5] * len(ids), "behavior_token_ids": ids}
            write(path, rows)
        paths.append(path)
    return [*paths, paths[0]]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_in(cache: Path, paths: list[Path], tokenizer: Tokenizer) -> RowsToTokenize:
    return find_rows(paths, tokenizer, max_length=60, truncation="drop", cache_dir=cache)


def contents(cache: Path) -> dict[str, bytes]:
    """Of the one directory of a cache, hidden ones included."""
    (directory,) = cache.iterdir()
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@pytest.mark.parametrize("scored", [set(), set(range(NUM_FILES))], ids=["plain", "scored"])
@pytest.mark.parametrize("num_parts", [2, 3, 8])
def test_joined_parts_are_the_bytes_of_one_process(tokenizer, tmp_path, scored, num_parts) -> None:
    paths = write_files(tmp_path / "data", tokenizer, scored=scored)
    whole = rows_in(tmp_path / "alone", paths, tokenizer).load()
    assert 0 < whole.num_dropped < len(whole)
    assert whole.has_behavior_logprobs == bool(scored)
    shared = rows_in(tmp_path / "shared", paths, tokenizer)
    for index in reversed(range(num_parts)):
        shared.write_part(index, num_parts, moves_nothing)
    moves: list[None] = []
    joined = shared.load(num_parts=num_parts, on_move=lambda: moves.append(None))
    assert joined.fingerprint == whole.fingerprint
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")
    assert moves


@pytest.mark.parametrize("scored", [{0, 1}, {3, 4}])
def test_rows_without_scores_are_refused_across_parts_as_within_one(tokenizer, tmp_path, scored) -> None:
    paths = write_files(tmp_path / "data", tokenizer, scored=scored)[:NUM_FILES]
    said = []
    for num_parts in (1, 4):
        rows = rows_in(tmp_path / f"cache {num_parts}", paths, tokenizer)
        for index in range(num_parts):
            rows.write_part(index, num_parts, moves_nothing)
        with pytest.raises(ValueError, match="no behaviour scores but others do") as refused:
            rows.load(num_parts=num_parts)
        said.append(str(refused.value))
    assert said[0] == said[1]


def test_a_part_that_is_finished_is_not_made_again(tokenizer, tmp_path, monkeypatch) -> None:
    paths = write_files(tmp_path / "data", tokenizer, scored=set())
    rows = rows_in(tmp_path / "cache", paths, tokenizer)
    rows.write_part(0, 2, moves_nothing)
    tokenized: list[str] = []
    original = Tokenizing.tokenize

    def noted(self, some, first_row):
        tokenized.extend(row.source for row in some)
        return original(self, some, first_row)

    monkeypatch.setattr(Tokenizing, "tokenize", noted)
    rows.write_part(0, 2, moves_nothing)
    assert tokenized == []
    # The other part has been lost with its node: whoever joins makes it.
    rows.load(num_parts=2)
    assert tokenized
    assert not any(source.startswith(f"{paths[1]}:") for source in tokenized)
