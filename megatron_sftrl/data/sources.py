"""Files of rows: JSON lines, Parquet, and directories written by datasets.save_to_disk, read in order."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sftrl.errors import UserError, error_of, hub_hint

_JSON_LINES = (".jsonl", ".json")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_NOT_UTF8 = "a text of this row is not UTF-8; repair or remove the row"


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRow:
    """A row and where it stands.

    Args:
        values: column name to value.
        number: line of a JSONL file, from 1; row of any other source, from 0.
    """

    values: Mapping[str, object]
    number: int


def describe_row(path: str | Path, number: int) -> str:
    """Where a row stands, for people: `train.jsonl:17` or `train.parquet row 16`.

    Args:
        path: the source.
        number: as in `SourceRow`.
    Returns:
        The name.
    """
    return f"{path}:{number}" if Path(path).suffix in _JSON_LINES else f"{path} row {number}"


def check_source(path: Path, key: str = "data") -> None:
    """Refuse a path that cannot be a source of rows.

    Args:
        path: the source.
        key: where the path stands in the configuration, for messages.
    Raises:
        UserError: it is not there or of no known kind.
    """
    if not path.exists():
        raise UserError(f"{key}: {path} does not exist; check {key}{hub_hint(path)}")
    if path.is_dir():
        if (path / "dataset_dict.json").exists():
            splits = sorted(entry.name for entry in path.iterdir() if (entry / "state.json").exists())
            raise UserError(
                f"{key}: {path} holds several splits {splits}; "
                f"name one, such as {path / (splits or ['train'])[0]}"
            )
        if not (path / "state.json").exists():
            raise UserError(f"{key}: {path} was not written by datasets.save_to_disk (no state.json in it)")
    elif path.suffix not in (*_JSON_LINES, ".parquet"):
        raise UserError(
            f"{key}: expected .jsonl, .parquet or a directory of datasets.save_to_disk, got {path}"
        )


def read_rows(path: Path) -> Iterator[SourceRow]:
    """Rows of one source in the order of the file, one at a time.

    Args:
        path: a source that `check_source` accepts.
    Yields:
        Each row.
    Raises:
        UserError: the source is of no known kind, or a row cannot be read; the message names file and line.
    """
    check_source(path)
    if path.is_dir():
        yield from _read_saved_dataset(path)
    elif path.suffix == ".parquet":
        yield from _read_parquet(path)
    else:
        yield from _read_json_lines(path)


def _read_json_lines(path: Path) -> Iterator[SourceRow]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            source = describe_row(path, number)
            try:
                # json.loads would let halves of a pair through that stand in the bytes themselves.
                text = line.decode(json.detect_encoding(line))
                values = json.loads(text)
            except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
                raise UserError(
                    f"{source}: not JSON ({error}); expected one JSON object on each line"
                ) from error
            if not isinstance(values, dict):
                raise UserError(f"{source}: expected a JSON object, got {type(values).__name__}")
            if _ESCAPED_SURROGATE.search(text) and (place := _surrogate(values)) is not None:
                raise UserError(
                    f"{source}: {place} holds half of a surrogate pair, which is no character (a text cut in "
                    "the middle of one, say); repair or remove the row"
                )
            yield SourceRow(values=values, number=number)


def _read_parquet(path: Path) -> Iterator[SourceRow]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for values in _rows_of_batch(batch):
                    yield SourceRow(values=values, number=number)
                    number += 1
    except UnicodeDecodeError as error:
        raise UserError(f"{describe_row(path, number)}: {_NOT_UTF8} ({error})") from error
    except (pyarrow.ArrowException, OSError) as error:
        where = describe_row(path, number)
        raise error_of(f"{where}: cannot be read as Parquet: {error}", error) from error


def _read_saved_dataset(path: Path) -> Iterator[SourceRow]:
    import datasets

    try:
        rows: Any = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise error_of(f"data: {path} cannot be read by datasets.load_from_disk: {error}", error) from error
    number = 0
    try:
        for values in rows:
            yield SourceRow(values=dict(values), number=number)
            number += 1
    except UnicodeDecodeError as error:
        raise UserError(f"{describe_row(path, number)}: {_NOT_UTF8} ({error})") from error


def _rows_of_batch(batch: Any) -> Iterable[dict[str, object]]:
    """Rows of a record batch; where one of them cannot be read, those before it come first."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        return (batch.slice(number, 1).to_pylist()[0] for number in range(batch.num_rows))


def _surrogate(value: object, place: str = "") -> str | None:
    """Where the first text stands that cannot be written as UTF-8, such as `messages[0].content`."""
    if isinstance(value, str):
        return place if any("\ud800" <= character <= "\udfff" for character in value) else None
    if isinstance(value, dict):
        for key, inner in value.items():
            if _surrogate(key) is not None:
                return f"a key in {place or 'the row'}"
            if (found := _surrogate(inner, f"{place}.{key}" if place else str(key))) is not None:
                return found
    if isinstance(value, list):
        for number, inner in enumerate(value):
            if (found := _surrogate(inner, f"{place}[{number}]")) is not None:
                return found
    return None
