"""Many rows: processes give what one process gives, errors name the first row, memory does not grow."""

from __future__ import annotations

import json
import os
import pickle
import random
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, pre_tokenizers

from megatron_sftrl.config.schema import TokenizerSection
from megatron_sftrl.data import dataset as dataset_module
from megatron_sftrl.data import tokenizing
from megatron_sftrl.data.dataset import Dataset, find_rows
from megatron_sftrl.data.formats import FormattedRow, read_formatted, recognise
from megatron_sftrl.data.sources import SourceFile
from megatron_sftrl.data.store import StoreWriter
from megatron_sftrl.data.tokenizer import load_tokenizer
from megatron_sftrl.data.tokenizer_backends import splitter_of
from megatron_sftrl.data.tokenizing import TokenizedRows, Tokenizing, tokenize_rows
from megatron_sftrl.errors import UserError
from tests.unit.data.tokenizers_for_tests import CHAT, SENTENCEPIECE_MODEL, template_path, write_byte_level


@pytest.fixture(params=["Hugging Face", "SentencePiece"])
def tokenizer(request, tmp_path: Path):
    if request.param == "SentencePiece":
        section = TokenizerSection(path=SENTENCEPIECE_MODEL, chat_template=template_path("plain_text"))
    else:
        section = TokenizerSection(path=write_byte_level(tmp_path / "t", template="generation"))
    return load_tokenizer(section)


@pytest.fixture
def two_processes(monkeypatch) -> None:
    """Two processes for everything behind the first 20 rows, in chunks of 20."""
    monkeypatch.setattr(tokenizing, "_CHUNK", 20)
    monkeypatch.setattr(tokenizing, "_ALONE", 0.0)
    monkeypatch.setattr(dataset_module, "processes_of_this_rank", lambda is_alone: 2)


def write(path: Path, rows: Sequence[dict | str]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def some_rows(count: int) -> list[dict | str]:
    generator = random.Random(count)
    words = [
        "Hello",
        "there,",
        "how",
        "are",
        "you?",
        "What",
        "is",
        "2+2?",
        "The",
        "answer",
        "is",
        "4.",
        "Blue",
        "colour",
    ]
    return [
        {
            "prompt": " ".join(generator.choices(words, k=generator.randint(1, 9))),
            "response": " ".join(generator.choices(words, k=generator.randint(1, 30))),
        }
        for _ in range(count)
    ]


def load(paths: Sequence[Path], tokenizer, **options) -> Dataset:
    return find_rows(paths, tokenizer, **{"max_length": 60, "truncation": "drop", **options}).load()


def test_processes_give_the_same_store_as_one(tokenizer, two_processes, monkeypatch, tmp_path) -> None:
    paths = [write(tmp_path / "a.jsonl", some_rows(230)), write(tmp_path / "b.jsonl", some_rows(75))]
    many = load(paths, tokenizer, cache_dir=tmp_path / "cache")
    monkeypatch.setattr(dataset_module, "processes_of_this_rank", lambda is_alone: 1)
    one = load(paths, tokenizer)
    assert 0 < one.num_dropped == many.num_dropped < 305
    assert one.fingerprint == many.fingerprint
    assert [one.describe(i) for i in range(len(one))] == [many.describe(i) for i in range(len(many))]
    assert [one[i].row for i in range(len(one))] == [many[i].row for i in range(len(many))]
    np.testing.assert_array_equal(one.num_loss_tokens, many.num_loss_tokens)
    np.testing.assert_array_equal(one.num_loss_tokens, [one[i].loss_mask.sum() for i in range(len(one))])


@pytest.mark.parametrize("tokenizer", ["Hugging Face"], indirect=True)
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({90: {"prompt": "a", "response": ""}, 130: "{broken"}, r"a\.jsonl:91: the response is empty"),
        ({90: "{broken", 130: {"prompt": "a", "response": ""}}, r"a\.jsonl:91: not JSON"),
        ({130: {"prompt": "a"}}, r"a\.jsonl:131: .*no response"),
        ({95: {"prompt": "a", "response": ""}, 96: "[]"}, r"a\.jsonl:96: the response is empty"),
    ],
)
def test_the_first_bad_row_is_named_whichever_process_meets_it(
    bad, message, tokenizer, two_processes, tmp_path
) -> None:
    rows = [bad.get(number, row) for number, row in enumerate(some_rows(200))]
    with pytest.raises(UserError, match=message):
        load([write(tmp_path / "a.jsonl", rows)], tokenizer, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


class Dying(Tokenizing):
    """A tokenizer whose process is killed, as it is where memory runs out."""

    def tokenize(self, rows: Sequence[FormattedRow], first_row: int) -> TokenizedRows:
        if first_row >= 100:
            os._exit(9)
        return super().tokenize(rows, first_row)


@pytest.mark.parametrize("tokenizer", ["Hugging Face"], indirect=True)
def test_a_process_that_dies_is_told_as_such(tokenizer, two_processes, tmp_path) -> None:
    rows = read_formatted(write(tmp_path / "a.jsonl", some_rows(200)), "demonstrations", key="data.train")
    dying = Dying(tokenizer=tokenizer, max_length=60, truncation="drop")
    with pytest.raises(RuntimeError, match=r"a process that tokenizes rows has died .* behind .*a\.jsonl:"):
        list(tokenize_rows(rows, dying, num_processes=2))


HERE: list[int] = []
"""Of the chunks that this process has tokenized, their first rows."""


class Here(Tokenizing):
    """Notes what it tokenizes, in a list of the process that does it."""

    def tokenize(self, rows: Sequence[FormattedRow], first_row: int) -> TokenizedRows:
        HERE.append(first_row)
        return super().tokenize(rows, first_row)


@pytest.mark.parametrize(("seconds", "num_here"), [(0.0, 1), (60.0, 10)])
def test_little_work_is_done_here(seconds, num_here, two_processes, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(tokenizing, "_ALONE", seconds)
    tokenizer = load_tokenizer(TokenizerSection(path=write_byte_level(tmp_path / "t", template="generation")))
    here = Here(tokenizer=tokenizer, max_length=60, truncation="drop")
    path = write(tmp_path / "a.jsonl", some_rows(200))
    HERE.clear()
    rows = read_formatted(path, "demonstrations", key="data.train")
    assert sum(len(chunk) for chunk, _ in tokenize_rows(rows, here, num_processes=2)) == 200
    assert list(range(0, 20 * num_here, 20)) == HERE


def test_a_format_is_the_same_one_in_another_process() -> None:
    for row in ({"prompt": "a", "response": "b"}, {"instruction": "a", "output": "b"}, {"messages": [1]}):
        found = recognise(row, "demonstrations")
        assert pickle.loads(pickle.dumps(found)) is found


def test_what_a_store_holds_in_memory_does_not_grow_with_its_rows(tmp_path) -> None:
    file = SourceFile(path=Path("a.jsonl"), kind="JSON lines")
    chosen = recognise({"prompt": "a", "response": "b"}, "demonstrations")
    rows = [
        FormattedRow(values={}, file=file, number=n, kind="demonstrations", format=chosen, columns=None)
        for n in range(100)
    ]
    chunk = TokenizedRows(
        tokens=np.arange(100_000, dtype=np.int32),
        loss_mask=np.ones(100_000, np.bool_),
        behavior_logprobs=np.zeros(100_000, np.float32),
        lengths=np.full(100, 1000),
        kept=np.arange(100),
        is_scored=np.zeros(100, np.bool_),
        num_dropped=0,
        num_truncated=0,
        scorers=frozenset(),
    )
    tracemalloc.start()
    try:
        with StoreWriter(tmp_path / "store") as writer:
            for _ in range(100):
                writer.add(rows, chunk, source=0)
            store = writer.finish()
        largest = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "store" / "tokens.npy").stat().st_size > 40_000_000
    assert largest < 16_000_000
    assert store.tokens.shape == (10_000_000,)
    assert store.offsets[-1] == 10_000_000
    assert np.load(tmp_path / "store" / "tokens.npy")[-1] == 99_999


# A text is encoded by the parts between its added tokens.


def fast() -> Tokenizer:
    return Tokenizer.from_file(str(CHAT / "byte_level" / "tokenizer.json"))


def test_ids_by_parts_are_those_of_the_whole_text(tmp_path) -> None:
    theirs, ours = fast(), load_tokenizer(TokenizerSection(path=write_byte_level(tmp_path))).backend
    assert splitter_of(theirs) is not None
    added = [token.content for token in theirs.get_added_tokens_decoder().values()]
    generator = random.Random(3)
    pieces = [*added, " ", "\n", "\n\n", "Hello", " there", "é\u0301", "<|im", "_end|>", "2+2", "\U0001f600"]
    for _ in range(500):
        text = "".join(generator.choices(pieces, k=generator.randint(0, 12)))
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids
        assert ours.decode(ours.encode(text)) == theirs.decode(ours.encode(text), skip_special_tokens=False)


@pytest.mark.parametrize("name", ["single_word", "lstrip", "rstrip", "normalized"])
def test_a_token_that_looks_around_itself_leaves_texts_whole(name) -> None:
    theirs = fast()
    theirs.add_tokens([AddedToken("<far>", **{"normalized": False, name: True})])
    assert splitter_of(theirs) is None


def test_parts_that_depend_on_their_place_leave_texts_whole() -> None:
    theirs = fast()
    theirs.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")  # pyright: ignore
    assert splitter_of(theirs) is None
    inner = [pre_tokenizers.Metaspace(), pre_tokenizers.Digits()]
    theirs.pre_tokenizer = pre_tokenizers.Sequence(inner)  # pyright: ignore
    assert splitter_of(theirs) is None
    theirs = fast()
    theirs.encode_special_tokens = True
    assert splitter_of(theirs) is None
