"""Parquet and what datasets.save_to_disk has written: their rows, and columns that are not what was written.

datasets 5 guesses the types of JSON. One number among texts makes a column of type Json, in which the text
"1.50" is read as 1.5, "007" as 7 and "null" as nothing; texts that all read as dates become points in time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from megatron_sftrl.data.sources import SourceFile, SourceRow
from megatron_sftrl.errors import UserError, error_of

_NOT_UTF8 = "a text of this row is not UTF-8; repair or remove the row"


def read_parquet(file: SourceFile) -> Iterator[SourceRow]:
    """Rows of a Parquet file; columns of type Json are decoded, as datasets does."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file.path) as opened:
            schema = opened.schema_arrow
            decoders = {field.name: found for field in schema if (found := _decoder(field.type)) is not None}
            for batch in opened.iter_batches(batch_size=1024):
                for values in _rows_of_batch(batch):
                    for name, decode in decoders.items():
                        values[name] = decode(values[name])
                    yield SourceRow(values=values, file=file, number=number)
                    number += 1
    except UnicodeDecodeError as error:
        raise UserError(f"{file.place}{number}: {_NOT_UTF8} ({error})") from error
    except (pyarrow.ArrowException, OSError) as error:
        raise error_of(f"{file.place}{number}: cannot be read as Parquet: {error}", error) from error


def read_saved_dataset(file: SourceFile) -> Iterator[SourceRow]:
    """Rows of a directory of datasets.save_to_disk."""
    rows = _load_from_disk(file)
    number = 0
    try:
        for values in rows:
            yield SourceRow(values=dict(values), file=file, number=number)
            number += 1
    except UnicodeDecodeError as error:
        raise UserError(f"{file.place}{number}: {_NOT_UTF8} ({error})") from error


def _load_from_disk(file: SourceFile) -> Any:
    import datasets

    try:
        return datasets.load_from_disk(str(file.path))
    except (OSError, ValueError, KeyError) as error:
        raise error_of(
            f"data: {file.path} cannot be read by datasets.load_from_disk: {error}", error
        ) from error


def _rows_of_batch(batch: Any) -> Iterable[dict[str, object]]:
    """Rows of a record batch; where one of them cannot be read, those before it come first."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        return (batch.slice(number, 1).to_pylist()[0] for number in range(batch.num_rows))


def _decoder(kind: Any) -> Callable[[Any], object] | None:
    """What makes values of a column's type that holds Json, at any depth; None where there is none."""
    import pyarrow.types

    if _is_json(kind):
        return _decode_json
    if _is_list(kind):
        inner = _decoder(kind.value_type)
        return inner and (lambda values: None if values is None else [inner(value) for value in values])
    if not pyarrow.types.is_struct(kind):
        return None
    found = {field.name: decode for field in kind if (decode := _decoder(field.type)) is not None}
    return _decode_keys(found) if found else None


def _decode_json(value: str | None) -> object:
    try:
        return None if value is None else json.loads(value)
    except json.JSONDecodeError:
        return value  # 007 stands in such a column as it was written


def _decode_keys(decoders: dict[str, Callable[[Any], object]]) -> Callable[[Any], object]:
    return lambda value: value and {**value, **{key: f(value[key]) for key, f in decoders.items()}}


def check_text_columns(file: SourceFile, columns: Iterable[str], *, turns: Iterable[str] = ()) -> None:
    """Raise UserError where a column's type says that its texts may not be those that were written.

    `columns` are to be text (or a.b inside of one), or lists of turns; of `turns` only the texts inside are
    looked at.
    """
    if file.kind not in ("Parquet", "saved dataset"):
        return
    schema = _schema(file)
    found = [(column, _type_of(schema, column)) for column in columns]
    for column in (*columns, *turns):
        kind = _type_of(schema, column)
        if kind is not None and _is_list(kind):
            found += [(f"{column}.{name}", _field(kind.value_type, name)) for name in ("content", "value")]
    for column, kind in found:
        if kind is not None and (reason := _why_changed(kind, column)):
            raise UserError(f"{file.path}: {column} may not be what was written: {reason}")


def _why_changed(kind: Any, column: str) -> str:
    import pyarrow.types

    while _is_list(kind):
        kind = kind.value_type
    if _is_json(kind):
        return (
            'its type is Json, which load_dataset("json") gives to texts with a number among them: "1.50" is '
            'read as 1.5, "007" as 7 and "null" as nothing. Name the JSON lines themselves in place of this '
            f'file, or load {column} as text, with features=Features({{..., "answer": Value("string")}})'
        )
    if pyarrow.types.is_temporal(kind):
        return (
            f'its type is {kind}, which load_dataset("json") gives to texts that read as dates: "2024-01-02" '
            'is 2024-01-02 00:00:00 then, with Value("string") as well. Name the JSON lines themselves in '
            f"place of this file, or write {column} as text"
        )
    return ""


def _schema(file: SourceFile) -> Any:
    import pyarrow
    import pyarrow.parquet

    if file.kind == "saved dataset":
        return _load_from_disk(file).features.arrow_schema
    try:
        return pyarrow.parquet.read_schema(file.path)
    except (pyarrow.ArrowException, OSError) as error:
        raise error_of(f"{file.path}: cannot be read as Parquet: {error}", error) from error


def _type_of(schema: Any, column: str) -> Any:
    """The type of a column, or of a key in its objects; None where it is not there."""
    if column in schema.names:
        return schema.field(column).type
    name, *inner = column.split(".")
    kind = schema.field(name).type if name in schema.names else None
    for key in inner:
        # What is inside of a Json value has a type of its own in each row.
        kind = None if kind is None else _field(kind, key)
    return kind


def _field(kind: Any, name: str) -> Any:
    import pyarrow.types

    is_there = pyarrow.types.is_struct(kind) and kind.get_field_index(name) >= 0
    return kind.field(name).type if is_there else None


def _is_list(kind: Any) -> bool:
    import pyarrow.types

    return (
        pyarrow.types.is_list(kind)
        or pyarrow.types.is_large_list(kind)
        or pyarrow.types.is_fixed_size_list(kind)
    )


def _is_json(kind: Any) -> bool:
    return getattr(kind, "extension_name", "") == "arrow.json"
