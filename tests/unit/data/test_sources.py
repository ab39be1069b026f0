"""Paths to files and files to rows: arrays, compression, patterns, folders of shards and splits."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pytest

from megatron_sftrl.data.rows import _JsonArray, read_rows
from megatron_sftrl.data.sources import find_files
from megatron_sftrl.errors import UserError

ROWS = [{"prompt": f"{i} + {i}?", "response": str(2 * i), "text": '[{"é\\'} for i in range(5)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
ARRAY = json.dumps(ROWS, indent=1, ensure_ascii=False).encode()


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        content = gzip.compress(content)
    if path.suffix == ".zst":
        content = pyarrow.compress(content, codec="zstd", asbytes=True)
    path.write_bytes(content)
    return path


def write_parquet(path: Path, rows: list[dict]) -> Path:
    import datasets

    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows).to_parquet(str(path))
    return path


def values(path: Path) -> list:
    return [row.values for row in read_rows(path)]


def names(path: Path) -> list[str]:
    return [file.path.name for file in find_files(path)]


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("a.jsonl", LINES, ":3"),
        ("a.json", LINES, ":3"),
        ("a.json", ARRAY, " row 2"),
        ("a.json", b"\xef\xbb\xbf \n" + ARRAY, " row 2"),
        ("a.json", ARRAY.decode().encode("utf-16"), " row 2"),
    ],
)
def test_json_lines_and_arrays_are_told_by_their_content(name, content, place, compression, tmp_path) -> None:
    path = write(tmp_path / f"{name}{compression}", content)
    rows = list(read_rows(path))
    assert [row.values for row in rows] == ROWS
    assert rows[2].place == f"{path}{place}"


@pytest.mark.parametrize("at_once", [1, 7, 40])
def test_an_array_is_read_in_parts_wherever_they_end(at_once, monkeypatch, tmp_path) -> None:
    rows = [
        {"a": "x" * 300, "\\": '\\"', "b": [1.5e-3, -2, True, None, {}]},
        *ROWS,
        {"e": "\U0001f600 \\u12"},
    ]
    monkeypatch.setattr(_JsonArray, "_AT_ONCE", at_once)
    for indent in (None, 2):
        for is_ascii in (False, True):
            text = json.dumps(rows, indent=indent, ensure_ascii=is_ascii)
            assert values(write(tmp_path / "a.json", text.encode())) == rows
    assert values(write(tmp_path / "a.json", b" [\n] ")) == []


def test_no_more_of_an_array_is_held_than_a_part_and_one_element(monkeypatch) -> None:
    class Stream:
        def __init__(self) -> None:
            self.num_read, self.text = 0, json.dumps([{"a": "x" * 50}] * 1000)

        def read(self, size: int) -> str:
            part = self.text[self.num_read : self.num_read + size]
            self.num_read += len(part)
            return part

    monkeypatch.setattr(_JsonArray, "_AT_ONCE", 256)
    stream = Stream()
    array = _JsonArray(stream)  # pyright: ignore[reportArgumentType]
    for number, (_, text) in enumerate(array, start=1):
        assert stream.num_read <= number * (len(text) + 2) + 512
        assert len(array._text) <= 512


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"a": 1}, 7]', "row 1: expected a JSON object, got int"),
        (b'[["a"], ["b"]]', "row 0: expected a JSON object, got list"),
        (b'[{"a": 1}, {"a": 2', "row 1: not JSON .*delimiter, near '.*2'"),
        (b'[{"a": 1}, {"a": "2', "row 1: not JSON .*Unterminated string"),
        (b'[{"a": 1}', "row 1: not JSON .*expected ',' or ']', got the end of the file"),
        (b'[{"a": 1}, ', "row 1: not JSON"),
        (b'[{"a": 1} {"a": 2}]', "row 1: not JSON .*expected ',' or ']', got {"),
        (b'[{"a": 1}]\n[{"a": 2}]', "row 1: not JSON .*behind the array"),
        (b'[{"a": 1}, {"a": "\xff"}]', "row 0: not JSON .*utf-8"),
        (b'[{"a": 1}, {"a": "\\ud83d"}]', "row 1: a holds half of a surrogate pair"),
        (b"[" + b'{"a": ' * 100_000, "row 0: not JSON"),
    ],
)
def test_an_array_that_is_none_of_objects_is_refused_by_row(content, message, tmp_path) -> None:
    with pytest.raises(UserError, match=rf"a\.json {message}"):
        values(write(tmp_path / "a.json", content))


@pytest.mark.parametrize("suffix", ["jsonl.gz", "jsonl.zst", "json.gz", "json.zst"])
def test_a_compressed_file_that_ends_early_is_refused_by_row(suffix, tmp_path) -> None:
    many = [{"prompt": str(i), "response": str(i**9 % 99991)} for i in range(60_000)]
    content = json.dumps(many) if "json." in suffix else "\n".join(map(json.dumps, many))
    path = write(tmp_path / f"a.{suffix}", content.encode())
    whole = path.read_bytes()
    assert len(values(path)) == len(many)
    for kept in (len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:kept])
        read: list[int] = []
        with pytest.raises(UserError, match=r"ends early") as error:
            read.extend(row.number for row in read_rows(path))
        assert 0 < len(read) < len(many)
        number = read[-1] + 1
        assert str(error.value).startswith(f"{path}{':' if 'jsonl' in suffix else ' row '}{number}: the ")
    path.write_bytes(b"this is not compressed")
    with pytest.raises(UserError, match=r"ends early or is damaged"):
        values(path)


def test_a_bad_line_of_a_compressed_file_is_named_by_its_line(tmp_path) -> None:
    path = write(tmp_path / "a.jsonl.gz", LINES + b'\n{"prompt": "\\ud83d"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl\.gz:7: prompt holds half of a surrogate pair"):
        values(path)


def test_a_pattern_is_its_files_in_order_and_an_empty_one_is_refused(tmp_path) -> None:
    for number in (10, 2, 1):
        write(tmp_path / "data" / "deep" / f"b-{number:02}.jsonl", LINES)
    for pattern in ("data/*/b-*.jsonl", "data/**/*.jsonl", "*/deep/b-[0-9]?.jsonl"):
        assert names(tmp_path / pattern) == ["b-01.jsonl", "b-02.jsonl", "b-10.jsonl"]
    with pytest.raises(UserError, match=r"^data\.valid: nothing matches .*c-\*.*; .*deep holds b-01\.jsonl"):
        find_files(tmp_path / "data/deep/c-*.jsonl", "data.valid")
    write_parquet(tmp_path / "data" / "deep" / "a.parquet", ROWS)
    with pytest.raises(UserError, match=r"two kinds, a\.parquet \(Parquet\) and b-01\.jsonl \(JSON lines\)"):
        find_files(tmp_path / "data/deep/*")


def test_a_path_with_a_colon_or_a_pattern_in_its_name_is_taken_as_it_is_where_it_is_there(tmp_path) -> None:
    for name in ("a[1].jsonl", "b*.jsonl", "c:train.jsonl", "bc.jsonl"):
        write(tmp_path / name, LINES)
        assert names(tmp_path / name) == [name]
    write(tmp_path / "d:train" / "a.jsonl", LINES)
    write(tmp_path / "d" / "test.jsonl", LINES)
    assert names(tmp_path / "d:train") == ["a.jsonl"]


def test_a_folder_of_shards_is_its_files_in_order(tmp_path) -> None:
    for number, name in enumerate(["b.jsonl.gz", "a.jsonl", ".hidden", "README.md", "_SUCCESS", "c.jsonl"]):
        write(tmp_path / "shards" / name, json.dumps({"prompt": str(number)}).encode())
    rows = list(read_rows(tmp_path / "shards"))
    assert [row.values["prompt"] for row in rows] == ["1", "0", "5"]
    assert rows[1].place == f"{tmp_path / 'shards' / 'b.jsonl.gz'}:1"


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (["b.parquet"], r"two kinds, a\.jsonl \(JSON lines\) and b\.parquet \(Parquet\).*/\*\.jsonl"),
        (["b.csv"], r"expected \.jsonl.*got .*b\.csv"),
        (["inner/b.jsonl"], r"the folder inner beside"),
        (["test.jsonl"], r"several splits \['a', 'test'\]; name one, such as .*mixed:a"),
        (["train-00000-of-00001.jsonl"], r"several splits \['a', 'train'\].*mixed:train"),
    ],
)
def test_a_mixed_folder_is_refused_by_name(others, message, tmp_path) -> None:
    write(tmp_path / "mixed" / "a.jsonl", LINES)
    for name in others:
        if name.endswith(".parquet"):
            write_parquet(tmp_path / "mixed" / name, ROWS)
        else:
            write(tmp_path / "mixed" / name, LINES)
    with pytest.raises(UserError, match=message):
        find_files(tmp_path / "mixed")


def test_a_split_is_the_shards_that_are_named_after_it(tmp_path) -> None:
    hub = tmp_path / "hub"
    write(hub / "README.md", b"# A card")
    shards = [
        "train-00000-of-00002",
        "train-00001-of-00002",
        "train_sft-00000-of-00001",
        "test-00000-of-00001",
    ]
    for name in shards:
        write_parquet(hub / "data" / f"{name}.parquet", [{"prompt": name}])
    assert [row["prompt"] for row in values(tmp_path / "hub:train")] == shards[:2]
    assert [row["prompt"] for row in values(tmp_path / "hub:train_sft")] == shards[2:3]
    with pytest.raises(UserError, match=r"no split 'valid': it has test, train, train_sft$"):
        find_files(tmp_path / "hub:valid")
    with pytest.raises(UserError, match=r"several splits \['test', 'train', 'train_sft'\].*hub:train$"):
        find_files(hub)
    (hub / "data" / "train-00000-of-00002.parquet").unlink()
    with pytest.raises(UserError, match=r"not complete: train-00000-of-00002 is not there"):
        find_files(tmp_path / "hub:train")


def test_a_split_of_a_dataset_dict_is_chosen_by_name(tmp_path) -> None:
    import datasets

    parts = {name: datasets.Dataset.from_list([{"prompt": name}]) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "dict"))
    datasets.DatasetDict({"only": parts["train"]}).save_to_disk(str(tmp_path / "one"))
    assert values(tmp_path / "dict:test") == [{"prompt": "test"}]
    assert values(tmp_path / "dict/train") == values(tmp_path / "one") == [{"prompt": "train"}]
    with pytest.raises(UserError, match=r"^data: .*dict has no split 'tests': it has test, train$"):
        find_files(tmp_path / "dict:tests")
    with pytest.raises(UserError, match=r"several splits \['test', 'train'\]; name one"):
        find_files(tmp_path / "dict")
    with pytest.raises(UserError, match=r"holds one dataset and no splits; write it without :train"):
        find_files(tmp_path / "dict/train:train")
