"""Tokenized rows in five flat arrays: small in memory, and shared by all ranks of a machine when on disk."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_sftrl.data.example import Example
from megatron_sftrl.data.sources import describe_row
from megatron_sftrl.errors import UserError

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
        num_dropped: rows left out because they were too long.
        num_truncated: rows that were cut.
        scorers: who made the scores: the different texts of behavior.read_scorer() in the rows.
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
        """Sequence `index`, as views into the arrays.

        Args:
            index: 0 <= index < R.
        Returns:
            The example.
        """
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
    """Flatten examples into a store.

    Args:
        examples: file index, number inside the file, and the example.
        sources: paths that the file index points into.
        num_dropped: rows left out before.
        num_truncated: rows cut before.
        scorers: as in TokenStore, in any order and number.
    Returns:
        The store.
    Raises:
        UserError: some rows have behaviour scores and others have none.
    """
    rows = list(examples)
    unscored = [example.source for _, _, example in rows if example.behavior_logprobs is None]
    if unscored and len(unscored) < len(rows):
        raise UserError(
            f"{unscored[0]}: the row has no behaviour scores but others do; score every row with "
            "tools/score_behavior_logprobs.py, or remove the columns behavior_logprobs and behavior_token_ids"
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
    """Write a store so that it is either there completely or not at all.

    Args:
        store: what to write.
        directory: its final place; whoever is there first wins.
    """
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
    """Map a store from disk, without reading it.

    Args:
        directory: where `save_store` put it.
    Returns:
        The store, or None when there is none of this format.
    """
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
