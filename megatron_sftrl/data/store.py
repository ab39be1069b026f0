"""Tokenized rows in flat arrays: written as they come, and shared by all ranks of a machine when on disk."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_sftrl.data.examples import Example
from megatron_sftrl.data.formats import FormattedRow
from megatron_sftrl.data.sources import SourceFile
from megatron_sftrl.data.tokenizing import TokenizedRows
from megatron_sftrl.errors import UserError, error_of

FORMAT = 3
"""Raised when a directory of another version cannot be read."""
_DTYPES = {
    "tokens": np.int32,
    "loss_mask": np.bool_,
    "offsets": np.int64,
    "rows": np.int64,
    "files": np.int32,
    "numbers": np.int64,
    "behavior_logprobs": np.float32,
}
_BUFFER = 2**20

OnMove = Callable[[], None]
"""Called when a part of the work is done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenStore:
    """R sequences of N tokens in all, K of them learned.

    Args:
        tokens: [N] int32.
        loss_mask: [N] bool.
        offsets: [R + 1] int64, sequence r is tokens[offsets[r]:offsets[r + 1]].
        rows: [R] int64, number of the row over all sources, dropped rows counted.
        files: [R] int32, index into places.
        numbers: [R] int64, line or row inside its file.
        behavior_logprobs: [N] fp32 nats, 0 where not learned; None when the rows have no scores.
        places: what stands before the number of a row of each file, as in SourceFile.place.
        sources: of each file, the index of the source (a path of data.train) that it belongs to.
        num_read: rows that were read for them, dropped ones counted.
        scorers: who made the scores: the different texts of read_scorer() in the rows.
        fingerprint: hash of everything above that reaches a model.
    """

    tokens: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    rows: NDArray[np.int64]
    files: NDArray[np.int32]
    numbers: NDArray[np.int64]
    behavior_logprobs: NDArray[np.float32] | None
    places: tuple[str, ...]
    sources: tuple[int, ...]
    num_read: int
    num_dropped: int
    num_truncated: int
    scorers: tuple[str, ...]
    fingerprint: str

    def example(self, index: int) -> Example:
        """Sequence `index`, as views into the arrays."""
        span = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        mask = self.loss_mask[span]
        scores = None if self.behavior_logprobs is None else self.behavior_logprobs[span][mask]
        return Example(
            tokens=self.tokens[span],
            loss_mask=mask,
            behavior_logprobs=scores,
            row=int(self.rows[index]),
            source=self.describe(index),
        )

    def describe(self, index: int) -> str:
        """Where sequence `index` comes from, such as `train.jsonl:17`."""
        return f"{self.places[int(self.files[index])]}{self.numbers[index]}"


class StoreWriter:
    """Takes rows as they are tokenized; given a directory, its memory does not grow with them."""

    def __init__(self, directory: Path | None = None) -> None:
        """Write beside `directory`, which appears when the store is finished; in memory where it is None."""
        self._directory = directory
        self._partial: Path | None = None
        self._made: list[Path] = []
        if directory is not None:
            self._made = [each for each in directory.parents if not each.exists()]
            with _told(directory):
                directory.parent.mkdir(parents=True, exist_ok=True)
                self._partial = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
        self._columns = {name: _Column(dtype, self._path(name)) for name, dtype in _DTYPES.items()}
        self._columns["offsets"].append(np.zeros(1, np.int64))
        self.files_read: dict[SourceFile, int] = {}
        self._sources: list[int] = []
        self._unscored: str | None = None
        self._scorers: set[str] = set()
        self.num_tokens = self.num_rows = self.num_dropped = self.num_truncated = self._num_read = 0

    def _path(self, name: str) -> Path | None:
        return None if self._partial is None else self._partial / f"{name}.npy"

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        for column in self._columns.values():
            column.close()
        if self._partial is not None:
            shutil.rmtree(self._partial, ignore_errors=True)
        # A run that is refused leaves no directory behind; one that holds a store is not empty.
        for folder in self._made:
            with contextlib.suppress(OSError):
                folder.rmdir()

    def add(self, rows: Sequence[FormattedRow], tokenized: TokenizedRows, *, source: int) -> None:
        """Append what became of `rows`, all of one source.

        Raises:
            UserError: some rows have behaviour scores and others have none, or the disk is full.
        """
        for row in rows:
            self._see(row.file, source)
        kept = [rows[index] for index in tokenized.kept]
        self._check_scores(kept, tokenized.is_scored)
        columns = {
            "tokens": tokenized.tokens,
            "loss_mask": tokenized.loss_mask,
            "offsets": self.num_tokens + np.cumsum(tokenized.lengths),
            "rows": self._num_read + tokenized.kept,
            "files": [self.files_read[row.file] for row in kept],
            "numbers": [row.number for row in kept],
        }
        if self._unscored is None:
            columns["behavior_logprobs"] = tokenized.behavior_logprobs
        with _told(self._directory):
            for name, values in columns.items():
                self._columns[name].append(values)
        self.num_tokens += len(tokenized.tokens)
        self.num_rows += len(kept)
        self._num_read += len(rows)
        self.num_dropped += tokenized.num_dropped
        self.num_truncated += tokenized.num_truncated
        self._scorers |= tokenized.scorers

    def add_store(
        self, part: TokenStore, files: Sequence[SourceFile], sources: Sequence[int], on_move: OnMove
    ) -> None:
        """Append a finished store of further rows, block by block.

        Args:
            files: that `part` was made of, in order, each with a row; `sources` of each.
            on_move: called for every block.
        Raises:
            UserError: as add().
        """
        for file, source in zip(files, sources, strict=True):
            self._see(file, source)
        if len(part.rows):
            self._check_part(part)
        own_files = np.array([self.files_read[file] for file in dict.fromkeys(files)], np.int32)
        first_token, first_row = self.num_tokens, self._num_read
        changes: dict[str, Callable[[NDArray], NDArray]] = {
            "offsets": lambda values: values + first_token,
            "rows": lambda values: values + first_row,
            "files": lambda values: own_files[values],
        }
        with _told(self._directory):
            for name, column in self._columns.items():
                values = getattr(part, name)
                if values is None:
                    continue
                values = values[1:] if name == "offsets" else values
                for start in range(0, len(values), _BUFFER):
                    block = values[start : start + _BUFFER]
                    column.append(changes[name](block) if name in changes else block)
                    on_move()
        self.num_tokens += len(part.tokens)
        self.num_rows += len(part.rows)
        self._num_read += part.num_read
        self.num_dropped += part.num_dropped
        self.num_truncated += part.num_truncated
        self._scorers |= {*part.scorers}

    def finish(self) -> TokenStore:
        """All rows as a store; a directory is there completely or not at all, and the first writer wins."""
        is_scored = self._is_scored
        with _told(self._directory):
            arrays: dict[str, Any] = dict.fromkeys(_DTYPES)
            for name, column in self._columns.items():
                if is_scored or name != "behavior_logprobs":
                    arrays[name] = column.finish()
                else:
                    column.remove()
            store = TokenStore(
                **arrays,
                places=tuple(file.place for file in self.files_read),
                sources=tuple(self._sources),
                num_read=self._num_read,
                num_dropped=self.num_dropped,
                num_truncated=self.num_truncated,
                scorers=tuple(sorted(self._scorers)) if is_scored else (),
                fingerprint=self._fingerprint(is_scored),
            )
            return store if self._partial is None else self._published(store)

    def _fingerprint(self, is_scored: bool) -> str:
        digest = hashlib.sha256()
        for name in ("tokens", "loss_mask", "offsets"):
            self._columns[name].digest_into(digest)
        if is_scored:
            self._columns["behavior_logprobs"].digest_into(digest)
        else:
            digest.update(b"-")
        return digest.hexdigest()

    def _published(self, store: TokenStore) -> TokenStore:
        assert self._partial is not None
        assert self._directory is not None
        (self._partial / "store.json").write_text(json.dumps(_facts(store)), encoding="utf-8")
        try:
            os.replace(self._partial, self._directory)
        except OSError:
            # Another process has written the same store meanwhile; a rename onto a full directory fails.
            if not (self._directory / "store.json").exists():
                raise
        return open_store(self._directory) or store

    def _see(self, file: SourceFile, source: int) -> None:
        if file not in self.files_read:
            self.files_read[file] = len(self.files_read)
            self._sources.append(source)

    @property
    def _is_scored(self) -> bool:
        """Every row so far has scores."""
        return self._unscored is None and self.num_rows > 0

    def _check_scores(self, kept: Sequence[FormattedRow], is_scored: NDArray[np.bool_]) -> None:
        for row, has_scores in zip(kept, is_scored, strict=True):
            if not has_scores and self._unscored is None:
                self._unscored = row.source
        self._refuse_some(has_new=bool(is_scored.any()))

    def _check_part(self, part: TokenStore) -> None:
        if part.behavior_logprobs is None and self._unscored is None:
            self._unscored = part.describe(0)
        self._refuse_some(has_new=part.behavior_logprobs is not None)

    def _refuse_some(self, *, has_new: bool) -> None:
        if self._unscored is not None and (has_new or len(self._columns["behavior_logprobs"])):
            raise UserError(
                f"{self._unscored}: the row has no behaviour scores but others do; score every row with "
                "`sftrl score`, or remove the columns behavior_logprobs and behavior_token_ids"
            )


class _Column:
    """One array that grows at its end, in memory or as a file that numpy can map."""

    def __init__(self, dtype: type, path: Path | None) -> None:
        self._dtype, self._path, self._length = np.dtype(dtype), path, 0
        self._file: BinaryIO = io.BytesIO() if path is None else path.open("w+b", buffering=_BUFFER)
        self._write_header()
        self._start = self._file.tell()

    def __len__(self) -> int:
        return self._length

    def append(self, values: NDArray | Sequence[int]) -> None:
        array = np.ascontiguousarray(values, self._dtype)
        self._file.write(array.data.cast("B") if array.size else b"")
        self._length += len(array)

    def finish(self) -> NDArray:
        """The whole array."""
        if self._path is None:
            assert isinstance(self._file, io.BytesIO)
            return np.frombuffer(self._file.getbuffer(), self._dtype)
        self._file.seek(0)
        self._write_header()
        self._file.close()
        return np.load(self._path, mmap_mode="r", allow_pickle=False)

    def digest_into(self, digest: Any) -> None:
        """Hash the finished array. Read, not mapped: what is mapped looks like memory of this process."""
        if self._path is None:
            assert isinstance(self._file, io.BytesIO)
            digest.update(self._file.getbuffer())
            return
        with self._path.open("rb") as file:
            file.seek(self._start)
            while block := file.read(_BUFFER):
                digest.update(block)

    def remove(self) -> None:
        self.close()
        if self._path is not None:
            self._path.unlink()

    def close(self) -> None:
        if self._path is not None:  # in memory the array lies in it
            self._file.close()

    def _write_header(self) -> None:
        if self._path is not None:
            # numpy leaves room in it for any length of a first axis.
            header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._length,)}
            np.lib.format.write_array_header_1_0(self._file, header)


@contextmanager
def _told(directory: Path | None) -> Iterator[None]:
    """What the disk says when the rows cannot be kept there, as an error of this program."""
    try:
        yield
    except OSError as error:
        assert directory is not None
        raise error_of(
            f"the tokenized rows cannot be kept in {directory.parent}: {error}; free space there, or choose "
            "another run_dir",
            error,
        ) from error


_FACTS = ("places", "sources", "num_read", "num_dropped", "num_truncated", "scorers", "fingerprint")


def _facts(store: TokenStore) -> dict[str, object]:
    return {"format": FORMAT, **{name: getattr(store, name) for name in _FACTS}}


def open_store(directory: Path) -> TokenStore | None:
    """Map a finished store from disk, without reading it; None when there is none of this format."""
    if not (directory / "store.json").exists():
        return None
    facts = json.loads((directory / "store.json").read_text(encoding="utf-8"))
    if facts.pop("format") != FORMAT:
        return None
    arrays: dict[str, Any] = {name: _open_array(directory / f"{name}.npy") for name in _DTYPES}
    lists = {name: tuple(value) for name, value in facts.items() if isinstance(value, list)}
    return TokenStore(**arrays, **(facts | lists))


def _open_array(path: Path) -> Any:
    return np.load(path, mmap_mode="r", allow_pickle=False) if path.exists() else None
