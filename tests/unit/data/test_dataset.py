"""Sources to datasets: every kind of file, truncation, behaviour scores, the cache, and bad rows by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_sftrl.config.data import Learning
from megatron_sftrl.config.schema import TokenizerSection
from megatron_sftrl.data.dataset import Dataset, find_rows
from megatron_sftrl.data.prompts import read_prompt_set
from megatron_sftrl.data.tokenizer import Tokenizer, load_tokenizer
from tests.unit.data.tokenizers_for_tests import load_by_name, write_byte_level

ROWS = [
    {"prompt": "What is 2+2?", "response": "The answer is 4."},
    {"prompt": "Hello", "response": "Hello there, how are you?"},
    {"prompt": "Name a colour.", "response": "Blue"},
]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return load_tokenizer(TokenizerSection(path=write_byte_level(tmp_path / "tokenizer", adds_bos=True)))


def write_lines(path: Path, rows: list) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def load(tokenizer: Tokenizer, *paths: Path, **options) -> Dataset:
    return find_rows(list(paths), tokenizer, **{"max_length": 64, "truncation": "error", **options}).load()


def contents(dataset: Dataset) -> list[tuple[list[int], list[bool]]]:
    return [(e.tokens.tolist(), e.loss_mask.tolist()) for e in (dataset[i] for i in range(len(dataset)))]


def test_jsonl_parquet_and_saved_datasets_give_the_same_examples(tokenizer, tmp_path) -> None:
    import datasets

    lines = write_lines(tmp_path / "a.jsonl", ROWS)
    datasets.Dataset.from_list(ROWS).to_parquet(str(tmp_path / "a.parquet"))
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    expected = load(tokenizer, lines)
    for path in (tmp_path / "a.parquet", tmp_path / "saved"):
        other = load(tokenizer, path)
        assert contents(other) == contents(expected)
        assert other.fingerprint == expected.fingerprint
        assert other.describe(2) == f"{path} row 2"
    both = load(tokenizer, lines, tmp_path / "saved")
    assert [both[i].row for i in range(6)] == list(range(6))
    assert both.describe(1) == f"{lines}:2"
    assert both.describe(4) == f"{tmp_path / 'saved'} row 1"
    assert len({d.fingerprint for d in (expected, both)}) == 2


def test_parquet_messages_with_filled_in_nulls_are_read(tokenizer, tmp_path) -> None:
    import datasets

    template = write_byte_level(tmp_path / "chat", template="chatml")
    rows = [
        {
            "messages": [
                {"role": "user", "content": "Hello", "name": None},
                {"role": "assistant", "content": "fine"},
            ]
        }
    ]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "m.parquet"))
    dataset = load(load_tokenizer(TokenizerSection(path=template)), tmp_path / "m.parquet")
    assert dataset[0].num_loss_tokens == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "not JSON"),
        ("[1]", "expected a JSON object"),
        (b"\xff\xfe".decode("latin-1"), "not JSON"),
        ({"prompt": "Hello"}, "no response"),
        ({"prompt": "Hello", "response": ""}, "response is empty"),
    ],
)
def test_a_bad_line_is_named_by_file_and_line(line, message, tokenizer, tmp_path) -> None:
    path = write_lines(tmp_path / "bad.jsonl", [ROWS[0], "", line])
    with pytest.raises(ValueError, match=rf"bad\.jsonl:3: .*{message}"):
        load(tokenizer, path)


def test_sources_that_are_none_are_refused(tokenizer, tmp_path) -> None:
    import datasets

    (tmp_path / "empty").mkdir()
    (tmp_path / "a.csv").write_text("prompt,response\n")
    (tmp_path / "a.parquet").write_text("not parquet")
    (tmp_path / "a.jsonl").write_text("\n")
    both = dict.fromkeys(("train", "test"), datasets.Dataset.from_list(ROWS))
    datasets.DatasetDict(both).save_to_disk(str(tmp_path / "splits"))
    for name, message in [
        ("nowhere.jsonl", "does not exist"),
        ("empty", "save_to_disk"),
        ("a.csv", "expected .jsonl"),
        ("a.parquet", "cannot be read as Parquet"),
        ("a.jsonl", "no row to train on"),
        ("splits", "splits:train"),
    ]:
        for key in ("data.train", "data.valid"):
            purpose = message.replace("train on", "evaluate on") if key == "data.valid" else message
            with pytest.raises(ValueError, match=purpose) as error:
                load(tokenizer, tmp_path / name, key=key)
            assert name == "a.parquet" or str(error.value).startswith(f"{key}: ")


def test_an_empty_file_beside_others_is_refused_by_name(tokenizer, tmp_path) -> None:
    full = write_lines(tmp_path / "full.jsonl", ROWS)
    empty = write_lines(tmp_path / "empty.jsonl", [])
    with pytest.raises(ValueError, match=r"^data\.valid: no row to evaluate on in .*empty\.jsonl"):
        load(tokenizer, full, empty, key="data.valid")
    with pytest.raises(ValueError, match=r"^data\.valid: no prompts in .*empty\.jsonl"):
        read_prompt_set([full, empty], tokenizer, max_prompt_length=64, key="data.valid")


@pytest.mark.parametrize(
    ("row", "place"),
    [
        ({"prompt": "broken \ud83d", "response": "x"}, "prompt"),
        ({"prompt": "a", "response": "\udc00"}, "response"),
        ({"messages": [{"role": "user", "content": "a\ud83d"}]}, r"messages\[0\]\.content"),
        ({"prompt": "a", "response": "x", "meta": {"\ud83d": 1}}, "a key in meta"),
    ],
)
def test_half_of_a_surrogate_pair_is_named_by_line_and_column(row, place, tokenizer, tmp_path) -> None:
    path = write_lines(tmp_path / "bad.jsonl", [ROWS[0], row])
    with pytest.raises(ValueError, match=rf"bad\.jsonl:2: {place} holds half of a surrogate pair"):
        load(tokenizer, path)
    with pytest.raises(ValueError, match=rf"bad\.jsonl:2: {place} holds half of a surrogate pair"):
        read_prompt_set([path], tokenizer, max_prompt_length=64)


def test_whole_pairs_are_read_and_halves_in_the_bytes_are_not(tokenizer, tmp_path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": "\\ud83d", "response": "\U0001f600"}])
    assert rb"\ud83d\ude00" in path.read_bytes()
    assert tokenizer.decode(load(tokenizer, path)[0].tokens.tolist()) == "<s>\\ud83d\U0001f600</s>"
    path.write_bytes(b'{"prompt": "a", "response": "\xed\xa0\xbd"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:1: not JSON"):
        load(tokenizer, path)


def test_text_of_a_columnar_file_that_is_not_utf8_is_named_by_row(tokenizer, tmp_path) -> None:
    import datasets
    import pyarrow
    import pyarrow.parquet

    data = pyarrow.array([b"a", b"b", b"\xed\xa0\xbd", b"c"], pyarrow.binary())
    texts = pyarrow.Array.from_buffers(pyarrow.string(), len(data), data.buffers())
    table = pyarrow.table({"prompt": texts, "response": texts})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    datasets.Dataset(table).save_to_disk(str(tmp_path / "saved"))
    for name in ("a.parquet", "saved"):
        with pytest.raises(ValueError, match=rf"{name} row 2: a text of this row is not UTF-8"):
            load(tokenizer, tmp_path / name)


def test_truncation_does_what_it_says_and_is_counted(tokenizer, tmp_path) -> None:
    path = write_lines(tmp_path / "a.jsonl", ROWS)
    full = load(tokenizer, path)
    lengths = full.lengths.tolist()
    limit = max(lengths) - 2
    long_row = lengths.index(max(lengths))
    with pytest.raises(
        ValueError, match=rf"a\.jsonl:{long_row + 1}: .*max_length = {limit} tokens, got {limit + 2}"
    ):
        load(tokenizer, path, max_length=limit)

    dropped = load(tokenizer, path, max_length=limit, truncation="drop")
    assert dropped.num_dropped == sum(length > limit for length in lengths) > 0
    assert contents(dropped) == [c for c in contents(full) if len(c[0]) <= limit]
    assert [dropped[i].row for i in range(len(dropped))] == [i for i in range(3) if lengths[i] <= limit]

    right = load(tokenizer, path, max_length=limit, truncation="right")
    assert right.num_truncated == dropped.num_dropped
    assert right[long_row].tokens.tolist() == full[long_row].tokens[:limit].tolist()
    assert right[long_row].loss_mask.tolist() == full[long_row].loss_mask[:limit].tolist()


def test_left_prompt_keeps_the_first_token_the_response_and_its_end(tokenizer, tmp_path) -> None:
    row = {"prompt": "Hello there, how are you? What is 2+2?", "response": "4."}
    path = write_lines(tmp_path / "a.jsonl", [row])
    full = load(tokenizer, path)[0]
    limit = len(full.tokens) - 3
    cut = load(tokenizer, path, max_length=limit, truncation="left_prompt")[0]
    assert cut.tokens.tolist() == [full.tokens[0], *full.tokens[4:]]
    assert cut.loss_token_ids.tolist() == full.loss_token_ids.tolist()
    assert not cut.loss_mask[0]
    shortest = full.num_loss_tokens + 1
    kept = load(tokenizer, path, max_length=shortest, truncation="left_prompt")[0]
    assert kept.tokens.tolist() == [full.tokens[0], *full.loss_token_ids]
    with pytest.raises(ValueError, match="cutting the prompt is not enough"):
        load(tokenizer, path, max_length=shortest - 1, truncation="left_prompt")


def test_a_fully_truncated_response_is_refused_and_never_trained_on_nothing(tokenizer, tmp_path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": "Hello there, how are you?", "response": "fine"}])
    with pytest.raises(ValueError, match=r"a\.jsonl:1: the response is fully truncated"):
        load(tokenizer, path, max_length=4, truncation="right")
    with pytest.raises(ValueError, match="all 1 are longer"):
        load(tokenizer, path, max_length=4, truncation="drop")


def scored(dataset: Dataset) -> list[dict]:
    rows = []
    for index, row in enumerate(ROWS):
        ids = dataset[index].loss_token_ids.tolist()
        rows.append(
            {**row, "behavior_token_ids": ids, "behavior_logprobs": [-0.5 - i for i in range(len(ids))]}
        )
    return rows


def test_behaviour_scores_travel_with_the_tokens_they_belong_to(tokenizer, tmp_path) -> None:
    plain = load(tokenizer, write_lines(tmp_path / "a.jsonl", ROWS))
    assert not plain.has_behavior_logprobs
    rows = scored(plain)
    dataset = load(tokenizer, write_lines(tmp_path / "b.jsonl", rows))
    assert dataset.has_behavior_logprobs
    for index, row in enumerate(rows):
        np.testing.assert_array_equal(dataset[index].behavior_logprobs, row["behavior_logprobs"])
    assert dataset.fingerprint != plain.fingerprint
    limit = int(plain.lengths.max()) - 2
    cut = load(tokenizer, tmp_path / "b.jsonl", max_length=limit, truncation="right")
    for index, row in enumerate(rows):
        kept = cut[index].num_loss_tokens
        np.testing.assert_array_equal(cut[index].behavior_logprobs, row["behavior_logprobs"][:kept])


def test_a_row_of_several_sequences_has_the_scores_of_all_of_them(tmp_path) -> None:
    tokenizer = load_by_name(tmp_path / "t", kind="byte_level", template="forgets_thoughts")
    turns = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "<think>red</think>fine"},
        {"role": "user", "content": "Name"},
        {"role": "assistant", "content": "Blue"},
    ]
    lines = [{"messages": turns}, {"messages": turns, "weight": 0}, {"messages": turns[:2]}]
    plain = load(tokenizer, write_lines(tmp_path / "a.jsonl", lines))
    assert [plain[index].source.rsplit(":")[-1] for index in range(len(plain))] == ["1", "1", "3"]
    assert plain.num_dropped == 1
    ids = [plain[index].loss_token_ids.tolist() for index in range(3)]
    rows = [
        {
            **lines[0],
            "behavior_token_ids": ids[0] + ids[1],
            "behavior_logprobs": [-0.5] * len(ids[0]) + [-1.5] * len(ids[1]),
        },
        lines[1],
        {**lines[2], "behavior_token_ids": ids[2], "behavior_logprobs": [-2.5] * len(ids[2])},
    ]
    dataset = load(tokenizer, write_lines(tmp_path / "b.jsonl", rows))
    for index, score in enumerate((-0.5, -1.5, -2.5)):
        np.testing.assert_array_equal(dataset[index].behavior_logprobs, [score] * len(ids[index]))
    rows[0]["behavior_token_ids"] = ids[1] + ids[0]
    with pytest.raises(ValueError, match=r"c\.jsonl:1: behaviour scores belong to other tokens"):
        load(tokenizer, write_lines(tmp_path / "c.jsonl", rows))
    last = load(tokenizer, write_lines(tmp_path / "a.jsonl", lines), learning=Learning(turns="last_turn"))
    assert len(last) == 2
    assert last[0].loss_token_ids.tolist() == ids[1]


def test_behaviour_scores_that_do_not_fit_are_refused_by_row_and_position(tokenizer, tmp_path) -> None:
    good = scored(load(tokenizer, write_lines(tmp_path / "a.jsonl", ROWS)))
    ids, scores = good[1]["behavior_token_ids"], good[1]["behavior_logprobs"]
    shifted = [ids[0], ids[1], ids[2] + 1, *ids[3:]]
    for changes, message in [
        ({"behavior_token_ids": shifted}, rf"loss token 2 is {ids[2]} here.*is {ids[2] + 1}.*`sftrl score`"),
        ({"behavior_token_ids": ids[:-1], "behavior_logprobs": scores[:-1]}, "expected one for each"),
        ({"behavior_token_ids": ids[:-1]}, "entries but"),
        ({"behavior_logprobs": [*scores[:-1], float("nan")]}, "finite"),
        ({"behavior_logprobs": [float("-inf"), *scores[1:]]}, "finite"),
        ({"behavior_logprobs": [0.7, *scores[1:]]}, "at most 0"),
        ({"behavior_logprobs": None}, "behavior_logprobs is missing"),
        ({"behavior_token_ids": None}, "behavior_token_ids is missing"),
        ({"behavior_logprobs": "high"}, "list of numbers"),
        ({"behavior_logprobs": None, "behavior_token_ids": None}, "no behaviour scores but others do"),
    ]:
        rows = [good[0], {**good[1], **changes}, good[2]]
        with pytest.raises(ValueError, match=rf"c\.jsonl:2: .*{message}"):
            load(tokenizer, write_lines(tmp_path / "c.jsonl", rows))


def test_a_refused_row_leaves_no_directory_of_the_cache_behind(tokenizer, tmp_path) -> None:
    bad = write_lines(tmp_path / "a.jsonl", [*ROWS, {"prompt": "no response"}])
    run_dir = tmp_path / "run"
    with pytest.raises(ValueError, match="no response"):
        load(tokenizer, bad, cache_dir=run_dir / "tokens")
    assert not run_dir.exists()
    load(tokenizer, write_lines(bad, ROWS), cache_dir=run_dir / "tokens")
    assert [each.name[0] == "." for each in (run_dir / "tokens").iterdir()] == [False]


def test_the_cache_gives_the_same_examples_and_is_left_when_anything_changes(tokenizer, tmp_path) -> None:
    path = write_lines(tmp_path / "a.jsonl", scored(load(tokenizer, write_lines(tmp_path / "a.jsonl", ROWS))))
    cache = tmp_path / "cache"
    fresh = load(tokenizer, path)
    built = load(tokenizer, path, cache_dir=cache)
    mapped = load(tokenizer, path, cache_dir=cache)
    for other in (built, mapped):
        assert contents(other) == contents(fresh)
        assert other.fingerprint == fresh.fingerprint
        np.testing.assert_array_equal(other[0].behavior_logprobs, fresh[0].behavior_logprobs)
        assert other.describe(0) == fresh.describe(0)
    assert [entry.name for entry in cache.iterdir() if entry.name.startswith(".")] == []
    assert len(list(cache.iterdir())) == 1
    load(tokenizer, path, cache_dir=cache, max_length=63)
    write_lines(path, ROWS[:2])
    assert len(load(tokenizer, path, cache_dir=cache)) == 2
    other_tokenizer = load_tokenizer(
        TokenizerSection(path=write_byte_level(tmp_path / "u", template="chatml"))
    )
    assert contents(load(other_tokenizer, path, cache_dir=cache)) != contents(fresh)[:2]
    assert len(list(cache.iterdir())) == 4
