"""Files of rows: JSON lines, Parquet, and directories written by datasets.save_to_disk, read in order."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_sftrl.errors import UserError, hub_hint

_JSON_LINES = (".jsonl", ".json")


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


def check_source(path: Path) -> None:
    """Refuse a path that cannot be a source of rows.

    Args:
        path: from data.train or data.valid.
    Raises:
        UserError: it is not there or of no known kind.
    """
    if not path.exists():
        raise UserError(f"data: {path} does not exist; check data.train and data.valid{hub_hint(path)}")
    if path.is_dir():
        if (path / "dataset_dict.json").exists():
            splits = sorted(entry.name for entry in path.iterdir() if (entry / "state.json").exists())
            raise UserError(
                f"data: {path} holds several splits {splits}; "
                f"name one, such as {path / (splits or ['train'])[0]}"
            )
        if not (path / "state.json").exists():
            raise UserError(f"data: {path} was not written by datasets.save_to_disk (no state.json in it)")
    elif path.suffix not in (*_JSON_LINES, ".parquet"):
        raise UserError(
            f"data: expected .jsonl, .parquet or a directory of datasets.save_to_disk, got {path}"
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
                values = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise UserError(
                    f"{source}: not JSON ({error}); expected one JSON object on each line"
                ) from error
            if not isinstance(values, dict):
                raise UserError(f"{source}: expected a JSON object, got {type(values).__name__}")
            yield SourceRow(values=values, number=number)


def _read_parquet(path: Path) -> Iterator[SourceRow]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    yield SourceRow(values=values, number=number)
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{describe_row(path, number)}: cannot be read as Parquet: {error}") from error


def _read_saved_dataset(path: Path) -> Iterator[SourceRow]:
    import datasets

    try:
        rows = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"data: {path} cannot be read by datasets.load_from_disk: {error}") from error
    for number, values in enumerate(rows):
        yield SourceRow(values=dict(values), number=number)
