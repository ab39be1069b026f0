"""All rows of the data, tokenized and checked once, before a model is built.

Every row passes through here at the start: a broken row stops a run in its first minute and not in its
third day, and every rank knows all lengths, so that all ranks can plan the same micro-batches without
talking to each other. With a cache directory one rank does the work and the others map its arrays.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_sftrl.config.data import ALL_TURNS, DemonstrationColumns, Learning
from megatron_sftrl.data.chat import tokenize_row
from megatron_sftrl.data.conversation import is_left_out
from megatron_sftrl.data.formats import FormattedRow, read_formatted
from megatron_sftrl.data.packing import Example, Truncation, truncate
from megatron_sftrl.data.rows import check_source, describe_row, read_behavior_scores, read_scorer
from megatron_sftrl.data.tokenizer import Tokenizer
from megatron_sftrl.errors import UserError, error_of

# Tokenized rows in five flat arrays: small in memory, and shared by all ranks of a machine when on disk.

_ARRAYS = ("tokens", "loss_mask", "offsets", "rows", "files", "numbers", "behavior_logprobs")
_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenStore:
    """R sequences of N tokens in all, K of them learned.

    Args:
        tokens: [N] int32.
        loss_mask: [N] bool.
        offsets: [R + 1] int64, sequence r is tokens[offsets[r]:offsets[r + 1]].
        rows: [R] int64, number of the row over all sources, dropped rows counted.
        files: [R] int32, index into sources.
        numbers: [R] int64, line or row inside its source.
        behavior_logprobs: [N] fp32 nats, 0 where not learned; None when the rows have no scores.
        sources: paths as the user gave them.
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
    sources: tuple[str, ...]
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
        return describe_row(self.sources[int(self.files[index])], int(self.numbers[index]))


def pack_examples(
    examples: Iterable[tuple[int, int, Example]],
    *,
    sources: tuple[str, ...],
    num_dropped: int,
    num_truncated: int,
    scorers: Iterable[str] = (),
) -> TokenStore:
    """Flatten examples, each with its file index and its number inside the file, into a store.

    Raises:
        UserError: some rows have behaviour scores and others have none.
    """
    rows = list(examples)
    unscored = [example.source for _, _, example in rows if example.behavior_logprobs is None]
    if unscored and len(unscored) < len(rows):
        raise UserError(
            f"{unscored[0]}: the row has no behaviour scores but others do; score every row with "
            "`sftrl score`, or remove the columns behavior_logprobs and behavior_token_ids"
        )
    lengths = [len(example.tokens) for _, _, example in rows]
    tokens = _concatenate([example.tokens for _, _, example in rows], np.int32)
    mask = _concatenate([example.loss_mask for _, _, example in rows], np.bool_)
    scores = None
    if rows and not unscored:
        scores = np.zeros(len(tokens), np.float32)
        scores[mask] = np.concatenate([example.behavior_logprobs for _, _, example in rows])  # pyright: ignore
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
    digest = hashlib.sha256()
    for array in (tokens, mask, offsets, scores):
        digest.update(b"-" if array is None else array.tobytes())
    return TokenStore(
        tokens=tokens,
        loss_mask=mask,
        offsets=offsets,
        rows=np.array([example.row for _, _, example in rows], np.int64),
        files=np.array([file for file, _, _ in rows], np.int32),
        numbers=np.array([number for _, number, _ in rows], np.int64),
        behavior_logprobs=scores,
        sources=sources,
        num_dropped=num_dropped,
        num_truncated=num_truncated,
        scorers=() if scores is None else tuple(sorted(set(scorers))),
        fingerprint=digest.hexdigest(),
    )


def save_store(store: TokenStore, directory: Path) -> None:
    """Write a store so that it is there completely or not at all; the first writer wins."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
    try:
        for name in _ARRAYS:
            if (array := getattr(store, name)) is not None:
                np.save(partial / f"{name}.npy", array, allow_pickle=False)
        facts = {
            "format": _FORMAT,
            "sources": store.sources,
            "num_dropped": store.num_dropped,
            "num_truncated": store.num_truncated,
            "scorers": store.scorers,
            "fingerprint": store.fingerprint,
        }
        (partial / "store.json").write_text(json.dumps(facts), encoding="utf-8")
        try:
            os.replace(partial, directory)
        except OSError:
            # Another process has written the same store meanwhile; a rename onto a full directory fails.
            if not (directory / "store.json").exists():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def open_store(directory: Path) -> TokenStore | None:
    """Map a store of `save_store` from disk, without reading it; None when there is none of this format."""
    if not (directory / "store.json").exists():
        return None
    facts = json.loads((directory / "store.json").read_text(encoding="utf-8"))
    if facts["format"] != _FORMAT:
        return None
    arrays = {name: _open_array(directory / f"{name}.npy") for name in _ARRAYS}
    return TokenStore(
        tokens=arrays["tokens"],
        loss_mask=arrays["loss_mask"],
        offsets=arrays["offsets"],
        rows=arrays["rows"],
        files=arrays["files"],
        numbers=arrays["numbers"],
        behavior_logprobs=arrays["behavior_logprobs"],
        sources=tuple(facts["sources"]),
        num_dropped=facts["num_dropped"],
        num_truncated=facts["num_truncated"],
        # Older versions tokenized rows that named no scorer.
        scorers=tuple(facts.get("scorers", [""] if arrays["behavior_logprobs"] is not None else [])),
        fingerprint=facts["fingerprint"],
    )


def _open_array(path: Path) -> Any:
    return np.load(path, mmap_mode="r", allow_pickle=False) if path.exists() else None


def _concatenate(arrays: list, dtype: type) -> NDArray:
    return np.concatenate(arrays).astype(dtype) if arrays else np.zeros(0, dtype)


_READING = 4
"""Raised when the same rows become other tokens or masks, so that no cache of an earlier version is used."""


class Dataset:
    """Examples by index, 0 <= index < len. Owns the arrays they are views of."""

    def __init__(self, store: TokenStore) -> None:
        """Stand in front of a store."""
        self._store = store
        ends = np.concatenate([[0], np.cumsum(store.loss_mask, dtype=np.int64)])[store.offsets]
        self._num_loss_tokens = np.diff(ends)
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
    for path in paths:
        check_source(path, key)
    place = None
    if cache_dir is not None:
        mapped = columns and columns.model_dump()
        settings = (max_length, truncation, mapped, learning.turns, learning.thinking)
        place = cache_dir / _cache_key(paths, tokenizer, *settings)
        if (store := open_store(place)) is not None:
            return Dataset(store)
    store = _build_store(
        paths,
        tokenizer,
        max_length=max_length,
        truncation=truncation,
        columns=columns,
        learning=learning,
        key=key,
    )
    if place is not None:
        try:
            save_store(store, place)
        except OSError as error:
            raise error_of(
                f"the tokenized rows cannot be kept in {cache_dir}: {error}; free space there, or choose "
                "another run_dir",
                error,
            ) from error
        store = open_store(place) or store
    return Dataset(store)


def tokenize_sources(
    paths: Sequence[Path],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    truncation: Truncation,
    columns: DemonstrationColumns | None = None,
    learning: Learning = ALL_TURNS,
    key: str,
    use_scores: bool = True,
) -> Iterator[tuple[int, FormattedRow, Example | None, bool]]:
    """Index of the source, the row, an example of it (None when dropped), and whether it was cut, in order.

    A row has several examples where its learned turns have no common context, and none where it says that it
    is left out. `max_length` is in tokens, `columns` are data.columns, `key` says where the paths come from.
    A tool that replaces behaviour scores does not read them (use_scores).

    Raises:
        UserError: a row that cannot be read or used, named by file and line.
    """
    first_row = 0
    # Threads: the tokenizers run outside of Python's lock, and results come back in order.
    with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        for index, path in enumerate(paths):
            for chunk in _chunks(read_formatted(path, "demonstrations", columns=columns, key=key)):
                numbers = range(first_row, first_row + len(chunk))
                examples = pool.map(partial(whole_examples, tokenizer, learning), chunk, numbers)
                for row, whole in zip(chunk, examples, strict=True):
                    cuts = cut_examples(tokenizer, whole, max_length=max_length, truncation=truncation)
                    scored = with_scores(row, whole, cuts) if use_scores else cuts
                    for full, cut, example in zip(whole, cuts, scored, strict=True):
                        yield index, row, example, cut is not full
                    if not whole:
                        yield index, row, None, False
                first_row += len(chunk)


def _chunks(rows: Iterator[FormattedRow]) -> Iterator[list[FormattedRow]]:
    """Rows in lists that keep every thread busy and memory small."""
    while chunk := list(islice(rows, 1024)):
        yield chunk


def whole_examples(
    tokenizer: Tokenizer, learning: Learning, row: FormattedRow, row_over_all: int
) -> list[Example]:
    """The whole examples of a row, without their scores; none where the row says that it is left out.

    Raises:
        UserError: the row cannot be used; names its place.
    """
    if is_left_out(row.values):
        return []
    try:
        sequences = tokenize_row(tokenizer, row.conversation(), learning)
    except ValueError as error:
        raise UserError(f"{row.source}: {error}") from error
    return [
        Example(
            tokens=np.array(ids, np.int32),
            loss_mask=np.array(mask, np.bool_),
            behavior_logprobs=None,
            row=row_over_all,
            source=row.source,
        )
        for ids, mask in sequences
    ]


def cut_examples(
    tokenizer: Tokenizer, whole: Sequence[Example], *, max_length: int, truncation: Truncation
) -> list[Example | None]:
    """What truncate() leaves of each example, an opening token in its place."""
    return [
        truncate(
            full,
            max_length=max_length,
            truncation=truncation,
            keep_first=int(full.tokens[0]) == tokenizer.bos_id,
        )
        for full in whole
    ]


def with_scores(
    row: FormattedRow, whole: Sequence[Example], cuts: Sequence[Example | None]
) -> list[Example | None]:
    """The examples of a row with its behaviour scores, if it has any: one after the other in its columns.

    Raises:
        UserError: the scores do not fit the row; names its place.
    """
    if not whole:
        return []
    learned = np.concatenate([full.loss_token_ids for full in whole])
    num_kept = len(learned)
    if len(cuts) == 1 and cuts[0] is not None:
        # One sequence may carry the scores of what remains of it.
        num_kept = cuts[0].num_loss_tokens
    try:
        scores = read_behavior_scores(row.values, loss_token_ids=learned, num_kept=num_kept)
    except ValueError as error:
        raise UserError(f"{row.source}: {error}") from error
    if scores is None:
        return list(cuts)
    found: list[Example | None] = []
    for full, cut in zip(whole, cuts, strict=True):
        own, scores = scores[: full.num_loss_tokens], scores[full.num_loss_tokens :]
        found.append(cut and replace(cut, behavior_logprobs=own[: cut.num_loss_tokens]))
    return found


def _build_store(
    paths: Sequence[Path],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    truncation: Truncation,
    columns: DemonstrationColumns | None,
    learning: Learning,
    key: str,
) -> TokenStore:
    kept: list[tuple[int, int, Example]] = []
    num_dropped = num_truncated = 0
    scorers: set[str] = set()
    empty = set(range(len(paths)))
    for index, row, example, is_cut in tokenize_sources(
        paths,
        tokenizer,
        max_length=max_length,
        truncation=truncation,
        columns=columns,
        learning=learning,
        key=key,
    ):
        empty.discard(index)
        if example is None:
            num_dropped += 1
            continue
        num_truncated += is_cut
        scorers.add(read_scorer(row.values))
        kept.append((index, row.number, example))
    purpose = "train" if key == "data.train" else "evaluate"
    if empty:
        raise UserError(
            f"{key}: no row to {purpose} on in {paths[min(empty)]}; remove it from {key}, or write it again"
        )
    if not kept:
        raise UserError(
            f"{key}: no row to {purpose} on in {[str(path) for path in paths]}; all {num_dropped} are longer "
            f"than data.max_length = {max_length}, or say that they are left out"
        )
    return pack_examples(
        kept,
        sources=tuple(str(path) for path in paths),
        num_dropped=num_dropped,
        num_truncated=num_truncated,
        scorers=scorers,
    )


def _cache_key(paths: Sequence[Path], tokenizer: Tokenizer, *settings: object) -> str:
    """Name that changes whenever the tokenized rows could."""
    files = []
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            stat = file.stat()
            files.append((str(file.resolve()), stat.st_size, stat.st_mtime_ns))
    facts = [_READING, files, [str(path) for path in paths], tokenizer.fingerprint, *settings]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
