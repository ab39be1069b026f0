"""All rows of the data, tokenized and checked once, before a model is built.

Every row passes through here at the start: a broken row stops a run in its first minute and not in its
third day, and every rank knows all lengths, so that all ranks can plan the same micro-batches without
talking to each other. With a cache directory one rank does the work and the others map its arrays.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_sftrl.config.data import ALL_TURNS, DemonstrationColumns, Learning
from megatron_sftrl.data.examples import Example, Truncation
from megatron_sftrl.data.formats import read_formatted
from megatron_sftrl.data.sources import SourceFile, find_files
from megatron_sftrl.data.store import FORMAT, StoreWriter, TokenStore, open_store
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


def load_dataset(
    paths: Sequence[Path],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    truncation: Truncation,
    columns: DemonstrationColumns | None = None,
    learning: Learning = ALL_TURNS,
    cache_dir: Path | None = None,
    key: str = "data.train",
) -> Dataset:
    """Read, tokenize and check every row.

    Args:
        max_length: tokens of the longest sequence; `truncation` says what happens to longer ones.
        columns: data.columns.
        learning: data.learn and data.thinking.
        cache_dir: where the tokenized rows are kept and looked for; memory only when None. Let one rank
            come first, and the others after a barrier, so that the work is done once.
        key: where the paths stand in the configuration, for messages.
    Raises:
        UserError: a source that cannot be read, a row that cannot be used (named by file and line), no row
            left, or a cache that cannot be written.
    """
    sources = tuple(find_files(path, key) for path in paths)
    tokenizing = Tokenizing(
        tokenizer=tokenizer, max_length=max_length, truncation=truncation, learning=learning
    )
    place = None
    if cache_dir is not None:
        mapped = columns and columns.model_dump()
        settings = (max_length, truncation, mapped, learning.turns, learning.thinking)
        place = cache_dir / _cache_key(sources, tokenizer, *settings)
        if (store := open_store(place)) is not None:
            return Dataset(store)
    # With a cache the other ranks wait for this one.
    num_processes = processes_of_this_rank(is_alone=cache_dir is not None)
    with StoreWriter(place) as writer:
        for index, (path, files) in enumerate(zip(paths, sources, strict=True)):
            rows = read_formatted(path, "demonstrations", columns=columns, key=key, files=files)
            for chunk, tokenized in tokenize_rows(rows, tokenizing, num_processes=num_processes):
                writer.add(chunk, tokenized, source=index)
        _check_rows(writer, sources, key=key, max_length=max_length)
        return Dataset(writer.finish())


def _check_rows(
    writer: StoreWriter, sources: Sequence[Sequence[SourceFile]], *, key: str, max_length: int
) -> None:
    """Raise UserError for a file without rows, or where no row is left."""
    purpose = "train" if key == "data.train" else "evaluate"
    files = [file for source in sources for file in source]
    for file in files:
        if file not in writer.files_read:
            raise UserError(
                f"{key}: no row to {purpose} on in {file.path}; remove it from {key}, or write it again"
            )
    if not writer.num_rows:
        raise UserError(
            f"{key}: no row to {purpose} on in {[str(file.path) for file in files]}; all "
            f"{writer.num_dropped} are longer than data.max_length = {max_length}, or say that they are left "
            "out"
        )


def _cache_key(sources: Sequence[Sequence[SourceFile]], tokenizer: Tokenizer, *settings: object) -> str:
    """Name that changes whenever the tokenized rows could."""
    stamps = []
    for source in sources:
        for each in source:
            inner = sorted(each.path.rglob("*")) if each.path.is_dir() else [each.path]
            stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in inner]
            stamps.append((each.place, stats))
        stamps.append(None)
    facts = [_READING, FORMAT, stamps, tokenizer.fingerprint, *settings]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
