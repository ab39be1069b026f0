"""What a path of data.train stands for: a file, the shards of a folder or a pattern, or one split of several.

A path that is there is taken as it is written; only then are `*`, `?`, `[...]` and `:split` read.
"""

from __future__ import annotations

import glob
import gzip
import io
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, cast

from megatron_sftrl.errors import UserError, error_of, first_of, hub_hint

Kind = Literal["JSON lines", "JSON array", "Parquet", "saved dataset"]
"""How rows are written; a saved dataset is a directory of datasets.save_to_disk."""

_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_SUFFIXES = (".jsonl", ".json", ".parquet")
_EXPECTED = (
    "expected .jsonl, .json (each also .gz or .zst), .parquet, a folder of files of one of these kinds, or a "
    "directory of datasets.save_to_disk"
)
_SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})")
_HELD_OUT = re.compile(r"(test|valid(ation)?|val|dev|eval(uation)?)(?![a-z])", re.IGNORECASE)
_BESIDE_DATA = re.compile(r"[._].*|(readme|license)\b.*|dataset_infos?\.json|state\.json", re.IGNORECASE)
"""Names in a folder that are not rows: hidden files, marks of Spark, what the Hub puts there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """One file of rows (or one directory of datasets.save_to_disk), known by its name and its first byte."""

    path: Path
    kind: Kind
    compression: str | None = None

    @property
    def place(self) -> str:
        """What stands before the number of a row for people: `train.jsonl:` or `train.parquet row `."""
        return f"{self.path}:" if self.kind == "JSON lines" else f"{self.path} row "

    @contextmanager
    def open(self, number: Callable[[], int] = lambda: 0) -> Iterator[BinaryIO]:
        """The bytes of a file, decompressed; `number` says which row is being read.

        Raises:
            UserError: a compressed file that ends early or is damaged, named with that row.
        """
        if self.compression is None:
            with self.path.open("rb") as file:
                yield file
            return
        try:
            with _decompressed(self.path, self.compression) as file:
                yield file
        except (EOFError, OSError, zlib.error) as error:
            text = (
                f"{self.place}{number()}: the {self.compression} data ends early or is damaged ({error}); "
                "copy or write the file again"
            )
            raise error_of(text, error) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRow:
    """Values by column, the file, and the line of a file of JSON lines, from 1, or else the row, from 0."""

    values: Mapping[str, object]
    file: SourceFile
    number: int

    @property
    def place(self) -> str:
        """Where the row stands, for people: `train.jsonl:17` or `train.parquet row 16`."""
        return f"{self.file.place}{self.number}"


def _decompressed(path: Path, compression: str) -> BinaryIO:
    if compression == "gzip":
        return cast(BinaryIO, gzip.open(path, "rb"))
    import pyarrow

    stream = pyarrow.input_stream(str(path), compression=compression)
    return cast(BinaryIO, io.BufferedReader(stream, 1 << 16))


def find_files(path: Path, key: str = "data") -> tuple[SourceFile, ...]:
    """The files that a path stands for, in the order in which they are read; `key` names its setting.

    Raises:
        UserError: nothing is there, or something of no known kind, or files of several kinds or splits, or
            not all shards of a split.
    """
    if path.exists():
        return _of_directory(path, key) if path.is_dir() else (_file(path, key),)
    text = str(path)
    if glob.has_magic(text):
        return _of_pattern(text, key)
    base, colon, split = text.rpartition(":")
    if colon and Path(base).is_dir():
        return _of_split(Path(base), split, key)
    raise UserError(f"{key}: {path} does not exist; check {key}{hub_hint(path)}")


def check_source(path: Path, key: str = "data") -> None:
    """Raise UserError for a path that stands for no files, as find_files does."""
    find_files(path, key)


def _file(path: Path, key: str) -> SourceFile:
    compression = _COMPRESSIONS.get(path.suffix)
    suffix = Path(path.stem).suffix if compression else path.suffix
    if suffix not in _SUFFIXES or (compression and suffix == ".parquet"):
        raise UserError(f"{key}: {_EXPECTED}, got {path}")
    if suffix == ".parquet":
        return SourceFile(path=path, kind="Parquet")
    file = SourceFile(path=path, kind="JSON lines", compression=compression)
    if suffix == ".json" and _opens_an_array(file):
        return SourceFile(path=path, kind="JSON array", compression=compression)
    return file


def _opens_an_array(file: SourceFile) -> bool:
    """Whether the first character is a bracket; in UTF-16 and UTF-32 zeros and a mark stand around it."""
    with file.open(lambda: 1) as stream:
        while block := stream.read(256):
            if start := block.strip(b"\x00\xef\xbb\xbf\xfe\xff \t\r\n"):
                return start[:1] == b"["
    return False


def _of_pattern(pattern: str, key: str) -> tuple[SourceFile, ...]:
    found = sorted(Path(each) for each in glob.glob(pattern, recursive=True))
    if not found:
        fixed = Path(pattern)
        while glob.has_magic(str(fixed)) or not fixed.exists():
            fixed = fixed.parent
        raise UserError(f"{key}: nothing matches {pattern}; {_content_of(fixed)}")
    files = []
    for path in found:
        files += [SourceFile(path=path, kind="saved dataset")] if _is_saved(path) else [_file(path, key)]
    return _of_one_kind(files, pattern, key)


def _of_directory(directory: Path, key: str) -> tuple[SourceFile, ...]:
    if _is_saved(directory):
        return (SourceFile(path=directory, kind="saved dataset"),)
    splits = _splits(directory, key)
    if not splits:
        raise UserError(
            f"{key}: {directory} holds no rows: it was not written by datasets.save_to_disk (no state.json "
            f"in it), and {_content_of(directory)}; {_EXPECTED}"
        )
    numbered = any(_SHARD.fullmatch(_stem(file.path)) for files in splits.values() for file in files)
    is_dict = (directory / "dataset_dict.json").exists()
    if len(splits) > 1 and (is_dict or numbered or any(map(_HELD_OUT.match, splits))):
        raise UserError(
            f"{key}: {directory} holds several splits {sorted(splits)}; name one, such as "
            f"{directory}:{'train' if 'train' in splits else min(splits)}"
        )
    return _complete(
        sorted((file for files in splits.values() for file in files), key=_by_path), directory, key
    )


def _of_split(directory: Path, split: str, key: str) -> tuple[SourceFile, ...]:
    if _is_saved(directory):
        raise UserError(f"{key}: {directory} holds one dataset and no splits; write it without :{split}")
    splits = _splits(directory, key)
    if split not in splits:
        there = f"it has {', '.join(sorted(splits))}" if splits else _content_of(directory)
        raise UserError(f"{key}: {directory} has no split {split!r}: {there}")
    return _complete(splits[split], directory, key)


def _splits(directory: Path, key: str) -> dict[str, list[SourceFile]]:
    """The files of a directory by split: what datasets' directory is called, or how file names begin."""
    if (directory / "dataset_dict.json").exists():
        saved = sorted(entry for entry in directory.iterdir() if _is_saved(entry))
        return {path.name: [SourceFile(path=path, kind="saved dataset")] for path in saved}
    entries = sorted(each for each in directory.iterdir() if not _BESIDE_DATA.fullmatch(each.name))
    if [each.name for each in entries] == ["data"] and entries[0].is_dir():
        return _splits(entries[0], key)  # as the Hub lays out a dataset
    splits: dict[str, list[SourceFile]] = {}
    for path in entries:
        if path.is_dir():
            raise UserError(
                f"{key}: {directory} holds the folder {path.name} beside or in place of files of rows; name "
                f"the files, such as {path}/*"
            )
        stem = _stem(path)
        match = _SHARD.fullmatch(stem)
        split = match["split"] if match else re.sub(r"[-_.]?\d+$", "", stem) or stem
        splits.setdefault(split, []).append(_file(path, key))
    return splits


def _complete(files: Sequence[SourceFile], origin: Path, key: str) -> tuple[SourceFile, ...]:
    """The files, none of whose numbered shards is missing."""
    shards = [match for file in files if (match := _SHARD.fullmatch(_stem(file.path)))]
    for split, count in {(match["split"], int(match["count"])) for match in shards}:
        there = {int(m["number"]) for m in shards if (m["split"], int(m["count"])) == (split, count)}
        if missing := sorted(set(range(count)) - there):
            names = ", ".join(first_of([f"{split}-{number:05}-of-{count:05}" for number in missing]))
            raise UserError(
                f"{key}: {origin} is not complete: {names} is not there; fetch it, or name the files"
            )
    return _of_one_kind(files, origin, key)


def _of_one_kind(files: Iterable[SourceFile], origin: str | Path, key: str) -> tuple[SourceFile, ...]:
    files = tuple(files)
    first = files[0]
    for file in files:
        if file.kind != first.kind:
            raise UserError(
                f"{key}: {origin} holds files of two kinds, {first.path.name} ({first.kind}) and "
                f"{file.path.name} ({file.kind}); name those that are meant, such as "
                f"{first.path.parent}/*{''.join(first.path.suffixes[-2:])}"
            )
    return files


def _is_saved(path: Path) -> bool:
    return (path / "state.json").exists()


def _stem(path: Path) -> str:
    """A file's name without the endings of its kind and compression."""
    name = path.stem if path.suffix in _COMPRESSIONS else path.name
    return name.removesuffix(Path(name).suffix) if Path(name).suffix in _SUFFIXES else name


def _by_path(file: SourceFile) -> Path:
    return file.path


def _content_of(directory: Path) -> str:
    names = sorted(entry.name for entry in directory.iterdir())
    return f"{directory} holds {', '.join(first_of(names)) if names else 'nothing'}"
