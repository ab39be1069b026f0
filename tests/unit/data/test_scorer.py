"""Who made behaviour scores travels with them, and a training run in another dtype is warned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_sftrl.config.schema import TokenizerSection
from megatron_sftrl.data.dataset import find_rows
from megatron_sftrl.data.rows import SCORER_COLUMN, read_scorer, scorer, scorer_warnings
from megatron_sftrl.data.tokenizer import load_tokenizer
from tests.unit.data.tokenizers_for_tests import write_byte_level


def test_scores_of_the_dtype_and_code_that_train_are_not_warned_of() -> None:
    text = read_scorer({SCORER_COLUMN: scorer("base", "bf16")})
    assert scorer_warnings([text], dtype="bf16") == []


@pytest.mark.parametrize(
    ("column", "said"),
    [
        (scorer("base", "fp32"), "made in fp32, training computes in bf16"),
        (None, "behavior_scorer is missing"),
        ("someone", "behavior_scorer is missing"),
        ({**scorer("base", "bf16"), "torch": "1.0"}, "made with torch 1.0 (now "),
    ],
)
def test_scores_of_another_dtype_or_code_or_of_unknown_ones_get_one_line(column: object, said: str) -> None:
    (line,) = scorer_warnings([read_scorer({SCORER_COLUMN: column})], dtype="bf16")
    assert said in line


def test_the_scorers_of_a_data_set_are_known_from_its_rows_and_from_its_cache(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(TokenizerSection(path=write_byte_level(tmp_path / "tokenizer")))
    rows = []
    for dtype in ("bf16", "fp32"):
        row: dict[str, object] = {"prompt": "a", "response": "b"}
        (tmp_path / "plain.jsonl").write_text(json.dumps(row) + "\n")
        plain = find_rows([tmp_path / "plain.jsonl"], tokenizer, max_length=16, truncation="error").load()
        assert plain.scorers == ()
        ids = plain[0].loss_token_ids.tolist()
        scores = {"behavior_logprobs": [-1.0] * len(ids), "behavior_token_ids": ids}
        rows.append({**row, **scores, SCORER_COLUMN: scorer("base", dtype)})
    file = tmp_path / "scored.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for _ in range(2):  # tokenized, then read from the cache
        found = find_rows(
            [file], tokenizer, max_length=16, truncation="error", cache_dir=tmp_path / "cache"
        ).load()
        assert [json.loads(text)["dtype"] for text in found.scorers] == ["bf16", "fp32"]
        assert len(scorer_warnings(found.scorers, dtype="bf16")) == 2
