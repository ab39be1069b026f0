"""Counts over all rows: of each source, of each kind of problem, of rows that are there twice."""

from __future__ import annotations

import hashlib
import logging
import re
import traceback
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_sftrl.apps.show_data.examine import DataReader, ExaminedRow, ShownRow
from megatron_sftrl.data.examples import Example
from megatron_sftrl.data.sources import check_source
from megatron_sftrl.data.tokenizer import Tokenizer
from megatron_sftrl.errors import UserError

LOGGER = logging.getLogger(__name__)

_ROWS_BETWEEN_LINES = 100_000
"""Of the log, for people who wait."""

# Problems of one kind: raised at one place in the code, in the same words but for what is the row's own.

_QUOTED = r"""(?<!\w)(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")(?!\w)"""
_OWN_WORDS = (
    (re.compile(_QUOTED, re.DOTALL), "'...'"),
    (re.compile(r"\b0x[0-9a-fA-F]+\b|\d+(?:\.\d+)?"), "0"),
    (re.compile(r"\[[^\[\]]*\]"), "[...]"),
)
_MOST_KINDS_OF_A_PLACE = 8
"""Texts that differ in something else than quotes, numbers and lists, of one place in the code."""


def same_words(message: str) -> str:
    """A message without what differs from row to row: quoted text, numbers, lists."""
    for pattern, instead in _OWN_WORDS:
        message = pattern.sub(instead, message)
    return message


@dataclass(slots=True)
class Problem:
    """One kind of it: the message for the first row that has it, and the number of rows."""

    message: str
    count: int = 0


class Problems:
    """Refused rows by kind, in the order in which the kinds were met."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[str, str], Problem] = {}
        self._per_place: dict[str, int] = {}

    def add(self, error: UserError, *, place: str = "", count: int = 1) -> None:
        """Count an error; `place` is the row that its message begins with."""
        inner: BaseException = error
        while isinstance(inner.__cause__, UserError):
            inner = inner.__cause__
        frames = traceback.extract_tb(inner.__traceback__)
        raised = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""
        words = same_words(str(inner).removeprefix(f"{place}: "))
        if (raised, words) not in self._kinds:
            # Whatever else may stand in messages, the list stays one that can be read.
            if self._per_place.get(raised, 0) >= _MOST_KINDS_OF_A_PLACE:
                words = "others"
            else:
                self._per_place[raised] = self._per_place.get(raised, 0) + 1
        self._kinds.setdefault((raised, words), Problem(message=str(error))).count += count

    def __iter__(self) -> Iterator[Problem]:
        return iter(self._kinds.values())

    def __len__(self) -> int:
        return len(self._kinds)

    @property
    def count(self) -> int:
        return sum(problem.count for problem in self)


@dataclass(slots=True)
class SourceCounts:
    """One file or directory: sums, and of each row a few numbers.

    Args:
        format_title: of its rows, as the log calls it; empty while no row could be read.
        is_whole: it was read to its end.
        answer_column: where prompts have their answer, by data.columns or the format.
        num_answers: rows with an answer for the rewards.
        num_trained: rows of which a sequence is trained on.
        num_left_out: rows that say so.
        num_dropped, num_cut: sequences, of which most rows have one.
        num_longer: sequences that are longer than the limit, whatever becomes of them.
        num_scored: sequences with behaviour scores that are trained on.
        unscored: the first row without them.
        lengths: tokens before truncation of every sequence.
        places: what stands before the number of a row of each file.
        files, numbers, kept, learned: of each sequence that is trained on, its file among places, the row's
            number, tokens, learned tokens.
        hashes: 16 bytes of each of them, of its token ids.
    """

    path: Path
    format_title: str = ""
    is_whole: bool = True
    answer_column: str | None = None
    num_rows: int = 0
    num_trained: int = 0
    num_refused: int = 0
    num_left_out: int = 0
    num_dropped: int = 0
    num_cut: int = 0
    num_longer: int = 0
    num_answers: int = 0
    num_scored: int = 0
    unscored: str = ""
    lengths: array[int] = field(default_factory=lambda: array("q"))
    places: list[str] = field(default_factory=list)
    files: array[int] = field(default_factory=lambda: array("q"))
    numbers: array[int] = field(default_factory=lambda: array("q"))
    kept: array[int] = field(default_factory=lambda: array("q"))
    learned: array[int] = field(default_factory=lambda: array("q"))
    hashes: bytearray = field(default_factory=bytearray)

    def add(self, row: ExaminedRow, *, max_length: int) -> None:
        """Count a row."""
        self.format_title = self.format_title or row.format_title
        self.answer_column = self.answer_column or row.answer_column
        self.num_rows += 1
        self.num_refused += row.error is not None
        self.num_left_out += row.error is None and not row.whole
        self.lengths.extend(len(full.tokens) for full in row.whole)
        self.num_longer += sum(len(full.tokens) > max_length for full in row.whole)
        if row.error is not None:
            return
        self.num_answers += row.answer is not None
        self.num_trained += any(kept is not None for kept in row.kept)
        for full, kept in zip(row.whole, row.kept, strict=True):
            if kept is None:
                self.num_dropped += 1
            else:
                self.num_cut += len(kept.tokens) < len(full.tokens)
                self._add_sequence(row, kept)

    def _add_sequence(self, row: ExaminedRow, kept: Example) -> None:
        if kept.behavior_logprobs is not None:
            self.num_scored += 1
        else:
            self.unscored = self.unscored or row.place
        place = row.place.removesuffix(str(row.number))
        if self.places[-1:] != [place]:  # files come one after the other
            self.places.append(place)
        self.files.append(len(self.places) - 1)
        self.numbers.append(row.number)
        self.kept.append(len(kept.tokens))
        self.learned.append(kept.num_loss_tokens)
        self.hashes += hashlib.blake2b(kept.tokens.tobytes(), digest_size=16).digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class DataCounts:
    """Everything about data.train or data.valid."""

    key: str
    sources: tuple[SourceCounts, ...]

    @property
    def num_sequences(self) -> int:
        """Sequences of one epoch."""
        return sum(len(source.numbers) for source in self.sources)

    @property
    def num_rows(self) -> int:
        """Rows that they come from."""
        return sum(source.num_trained for source in self.sources)

    def all_of(self, name: str) -> NDArray[np.int64]:
        """An array of the sources, one behind the other."""
        return np.concatenate([np.asarray(getattr(source, name), np.int64) for source in self.sources])

    def places(self) -> list[tuple[SourceCounts, int]]:
        """Where each source's sequences begin among all that are trained on."""
        starts = np.cumsum([0, *(len(source.numbers) for source in self.sources)]).tolist()
        return list(zip(self.sources, starts, strict=False))

    def describe(self, index: int) -> str:
        """Place of the row of sequence `index` of those that are trained on."""
        source, start = next(found for found in reversed(self.places()) if found[1] <= index)
        return f"{source.places[source.files[index - start]]}{source.numbers[index - start]}"


def count_rows(
    reader: DataReader,
    tokenizer: Tokenizer,
    paths: Sequence[Path],
    key: str,
    *,
    max_length: int,
    problems: Problems,
    show: Callable[[ShownRow], None],
    num_shown: int,
) -> DataCounts:
    """Read all of data.train or data.valid (`key`); the first `num_shown` rows of each source go to `show`.

    Refused rows, and sources, are counted in `problems`.
    """
    sources = []
    for path in paths:
        counts = SourceCounts(path=path)

        def take(row: ExaminedRow, counts: SourceCounts = counts) -> None:
            if counts.num_rows < num_shown:
                for shown in row.shown(tokenizer):
                    show(shown)
            counts.add(row, max_length=max_length)
            if row.error is not None:
                problems.add(row.error, place=row.place)
            if counts.num_rows % _ROWS_BETWEEN_LINES == 0:
                LOGGER.info("%s: %s rows", counts.path, f"{counts.num_rows:,}")

        try:
            check_source(path, key)
            counts.is_whole = False
            reader.read(path, key, take)
            counts.is_whole = True
            if counts.num_rows == 0:
                problems.add(UserError(f"{key}: no row in {path}; remove it from {key}, or write it again"))
        except UserError as error:
            problems.add(error)
        sources.append(counts)
    found = DataCounts(key=key, sources=tuple(sources))
    num_scored = sum(source.num_scored for source in sources)
    if 0 < num_scored < found.num_sequences:
        first = next(source.unscored for source in sources if source.unscored)
        problems.add(
            UserError(
                f"{first}: the row has no behaviour scores but others do; score every row with `sftrl score`"
            ),
            count=found.num_sequences - num_scored,
        )
    if found.num_sequences == 0 and any(source.num_dropped or source.num_left_out for source in sources):
        told = f"{key}: every row is left out, or longer than data.max_length = {max_length}"
        problems.add(UserError(told))
    return found


# Rows that are there twice.


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeats:
    """Rows with the tokens of an earlier one: their number, and the first of them (the row, the earlier one).

    `title` says which rows are compared.
    """

    title: str
    count: int
    pairs: tuple[tuple[str, str], ...]


def find_repeats(train: DataCounts, valid: DataCounts | None, *, num_pairs: int = 5) -> list[Repeats]:
    """Rows that repeat an earlier one of data.train or of data.valid, and rows of valid that are in train."""
    sets = [train] if valid is None else [train, valid]
    joined = b"".join(bytes(source.hashes) for each in sets for source in each.sources)
    halves = np.frombuffer(joined, np.uint64).reshape(-1, 2)
    # Equal rows stand side by side, and, the sort being stable, in the order in which they are read.
    order = np.lexsort((halves[:, 1], halves[:, 0]))
    is_new = np.ones(len(order), np.bool_)
    is_new[1:] = (halves[order[1:]] != halves[order[:-1]]).any(axis=1)
    starts = np.maximum.accumulate(np.where(is_new, np.arange(len(order)), 0)) if len(order) else order
    first, later = order[starts], order
    border = train.num_sequences

    def repeats(title: str, chosen: NDArray[np.bool_]) -> Repeats:
        found = np.flatnonzero(chosen)
        found = found[np.argsort(later[found])[:num_pairs]]
        pairs = zip(later[found].tolist(), first[found].tolist(), strict=True)
        named = tuple((_describe(sets, border, a), _describe(sets, border, b)) for a, b in pairs)
        return Repeats(title=title, count=int(chosen.sum()), pairs=named)

    found = [repeats("rows of data.train that repeat an earlier one of it", ~is_new & (later < border))]
    if valid is not None:
        # Equal rows have the same first one, which is in data.train where any of them is.
        inside = ~is_new & (first >= border)
        found.append(repeats("rows of data.valid that repeat an earlier one of it", inside))
        both = (later >= border) & (first < border)
        found.append(repeats("rows of data.valid that are in data.train, too", both))
    return found


def _describe(sets: Sequence[DataCounts], border: int, index: int) -> str:
    """Place of a row by its number over both sets; `border` is the first one of data.valid."""
    return sets[0].describe(index) if index < border else sets[1].describe(index - border)
