"""All rows of the data, tokenized and checked once, before a model is built.

Every row passes through here at the start: a broken row stops a run in its first minute and not in its
third day, and every rank knows all lengths, so that all ranks can plan the same micro-batches without
talking to each other. With a cache directory one rank of each node does the work and all ranks map the
arrays.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_sftrl.config.data import ALL_TURNS, DemonstrationColumns, Learning
from megatron_sftrl.data.examples import Example, Truncation
from megatron_sftrl.data.formats import read_formatted
from megatron_sftrl.data.sources import SourceFile, find_files
from megatron_sftrl.data.store import FORMAT, OnMove, StoreWriter, TokenStore, open_store
from megatron_sftrl.data.tokenizer import Tokenizer
from megatron_sftrl.data.tokenizing import Tokenizing, processes_of_this_rank, tokenize_rows
from megatron_sftrl.errors import UserError

_READING = 4
"""Raised when the same rows become other tokens or masks, so that no cache of an earlier version is used."""
_ROWS_AT_ONCE = 4096


class Dataset:
    """Examples by index, 0 <= index < len. Owns the arrays they are views of."""

    def __init__(self, store: TokenStore) -> None:
        """Stand in front of a store."""
        self._store = store
        self._num_loss_tokens = _num_loss_tokens(store)
        self._lengths = np.diff(store.offsets)

    def __len__(self) -> int:
        """Rows that are trained on: those that were dropped are not counted."""
        return len(self._store.rows)

    def __getitem__(self, index: int) -> Example:
        """The example at `index`."""
        return self._store.example(index)

    def describe(self, index: int) -> str:
        """Where the row comes from, such as `train.jsonl:17`."""
        return self._store.describe(index)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[R] tokens of each example."""
        return self._lengths

    @property
    def num_loss_tokens(self) -> NDArray[np.int64]:
        """[R] learned tokens of each example."""
        return self._num_loss_tokens

    @property
    def sources(self) -> NDArray[np.int32]:
        """[R] of each example, the index of the path that it comes from; ascending."""
        return np.array(self._store.sources, np.int32)[self._store.files]

    @property
    def num_dropped(self) -> int:
        """Sequences left out: too long (data.truncation: drop), or rows of weight 0."""
        return self._store.num_dropped

    @property
    def num_truncated(self) -> int:
        """Rows that were cut."""
        return self._store.num_truncated

    @property
    def has_behavior_logprobs(self) -> bool:
        """Whether every row carries behaviour scores (otherwise none does)."""
        return self._store.behavior_logprobs is not None

    @property
    def scorers(self) -> tuple[str, ...]:
        """Who made the behaviour scores, as in rows.scorer_warnings(); empty without scores."""
        return self._store.scorers

    @property
    def fingerprint(self) -> str:
        """Hash of the tokens, masks and scores: equal means that the same order gives the same batches."""
        return self._store.fingerprint


def _num_loss_tokens(store: TokenStore) -> NDArray[np.int64]:
    """[R] learned tokens of each row, some rows at a time: sums take eight times the memory of masks."""
    counts, offsets = np.zeros(len(store.rows), np.int64), store.offsets
    for first in range(0, len(counts), _ROWS_AT_ONCE):
        borders = offsets[first : first + _ROWS_AT_ONCE + 1]
        ends = np.cumsum(store.loss_mask[borders[0] : borders[-1]], dtype=np.int64)
        counts[first : first + _ROWS_AT_ONCE] = np.diff(np.concatenate([[0], ends])[borders - borders[0]])
    return counts


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsToTokenize:
    """The rows of some paths and how they are tokenized; made by find_rows().

    Args:
        key: where the paths stand in the configuration, for messages.
        files: of all paths in order, each with the index of its path.
        cache: directory of the tokenized rows, which need not be there; None keeps them in memory.
    """

    paths: Sequence[Path]
    key: str
    files: Sequence[tuple[int, SourceFile]]
    tokenizing: Tokenizing
    columns: DemonstrationColumns | None
    cache: Path | None

    def is_tokenized(self) -> bool:
        """load() will find what is there already."""
        return self.cache is not None and open_store(self.cache) is not None

    def load(self, *, num_parts: int = 1, on_move: OnMove = _nothing) -> Dataset:
        """What is there already, else the parts that are there joined, else every row read and tokenized.

        Args:
            num_parts: as given to write_part(), which has been called for each of them.
            on_move: called for every chunk of rows.
        Raises:
            UserError: a source that cannot be read, a row that cannot be used (named by file and line), no
                row left, or a cache that cannot be written.
        """
        if self.cache is not None and (store := open_store(self.cache)) is not None:
            return Dataset(store)
        # With a cache the other ranks of the node wait for this one.
        num_processes = processes_of_this_rank(is_alone=self.cache is not None)
        groups = self._groups(num_parts)
        with StoreWriter(self.cache) as writer:
            for index, group in enumerate(groups):
                part = open_store(self._part(index, len(groups))) if len(groups) > 1 else None
                if part is None:
                    self._tokenize(group, writer, num_processes, on_move)
                else:
                    sources, files = zip(*group, strict=True)
                    writer.add_store(part, files, sources, on_move)
            self._check_rows(writer)
            dataset = Dataset(writer.finish())
        for index in range(len(groups) if len(groups) > 1 else 0):
            shutil.rmtree(self._part(index, len(groups)), ignore_errors=True)
        return dataset

    def write_part(self, index: int, num_parts: int, on_move: OnMove) -> None:
        """Tokenize one of `num_parts` shares of the files into the cache, for a load() that joins them.

        A part that is there already stays; of fewer files than parts, the last parts are nothing. Where that
        leaves one part only, it is left to load().

        Raises:
            UserError: as load().
        """
        groups = self._groups(num_parts)
        if self.is_tokenized() or len(groups) == 1 or index >= len(groups):
            return
        place = self._part(index, len(groups))
        if open_store(place) is None:
            with StoreWriter(place) as writer:
                self._tokenize(groups[index], writer, processes_of_this_rank(is_alone=True), on_move)
                writer.finish()

    def _groups(self, num_parts: int) -> list[list[tuple[int, SourceFile]]]:
        """The files in order, in at most `num_parts` groups of about as many bytes."""
        sizes = [sum(file.stat().st_size for file in _inner_files(each)) for _, each in self.files]
        groups: list[list[tuple[int, SourceFile]]] = [[] for _ in range(num_parts)]
        total, before = max(1, sum(sizes)), 0
        for file, size in zip(self.files, sizes, strict=True):
            groups[min(num_parts - 1, (2 * before + size) * num_parts // (2 * total))].append(file)
            before += size
        return [group for group in groups if group]

    def _part(self, index: int, num_parts: int) -> Path:
        assert self.cache is not None, "parts are files"
        return self.cache.with_name(f"{self.cache.name}.{index}-of-{num_parts}")

    def _tokenize(
        self,
        group: Sequence[tuple[int, SourceFile]],
        writer: StoreWriter,
        num_processes: int,
        on_move: OnMove,
    ) -> None:
        for source, files in groupby(group, key=itemgetter(0)):
            rows = read_formatted(
                self.paths[source],
                "demonstrations",
                columns=self.columns,
                key=self.key,
                files=[file for _, file in files],
            )
            for chunk, tokenized in tokenize_rows(rows, self.tokenizing, num_processes=num_processes):
                writer.add(chunk, tokenized, source=source)
                on_move()
        for _, file in group:
            if file not in writer.files_read:
                raise UserError(
                    f"{self.key}: no row to {self._purpose} on in {file.path}; remove it from {self.key}, or "
                    "write it again"
                )

    def _check_rows(self, writer: StoreWriter) -> None:
        """Raise UserError where no row is left."""
        if not writer.num_rows:
            raise UserError(
                f"{self.key}: no row to {self._purpose} on in {[str(file.path) for _, file in self.files]}; "
                f"all {writer.num_dropped} are longer than data.max_length = {self.tokenizing.max_length}, "
                "or say that they are left out"
            )

    @property
    def _purpose(self) -> str:
        return "train" if self.key.endswith("data.train") else "evaluate"


def find_rows(
    paths: Sequence[Path],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    truncation: Truncation,
    columns: DemonstrationColumns | None = None,
    learning: Learning = ALL_TURNS,
    cache_dir: Path | None = None,
    key: str = "data.train",
) -> RowsToTokenize:
    """Find the files that paths stand for; nothing is read yet.

    Args:
        max_length: tokens of the longest sequence; `truncation` says what happens to longer ones.
        columns: data.columns.
        learning: data.learn and data.thinking.
        cache_dir: where the tokenized rows are kept and looked for; memory only when None.
        key: where the paths stand in the configuration, for messages.
    Raises:
        UserError: a path that stands for no files.
    """
    sources = tuple(find_files(path, key) for path in paths)
    cache = None
    if cache_dir is not None:
        mapped = columns and columns.model_dump()
        settings = (max_length, truncation, mapped, learning.turns, learning.thinking)
        cache = cache_dir / _cache_key(sources, tokenizer, *settings)
    return RowsToTokenize(
        paths=paths,
        key=key,
        files=[(index, file) for index, files in enumerate(sources) for file in files],
        tokenizing=Tokenizing(
            tokenizer=tokenizer, max_length=max_length, truncation=truncation, learning=learning
        ),
        columns=columns,
        cache=cache,
    )


def _inner_files(file: SourceFile) -> list[Path]:
    return sorted(file.path.rglob("*")) if file.path.is_dir() else [file.path]


def _cache_key(sources: Sequence[Sequence[SourceFile]], tokenizer: Tokenizer, *settings: object) -> str:
    """Name that changes whenever the tokenized rows could."""
    stamps = []
    for source in sources:
        for each in source:
            stats = [
                (str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns)
                for file in _inner_files(each)
            ]
            stamps.append((each.place, stats))
        stamps.append(None)
    facts = [_READING, FORMAT, stamps, tokenizer.fingerprint, *settings]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
