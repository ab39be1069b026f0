"""What there is to say about rows, in lines that a terminal and a page show alike."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from megatron_sftrl.apps.show_data.counts import DataCounts, Problems, Repeats, SourceCounts
from megatron_sftrl.apps.show_data.examine import Piece, ShownRow
from megatron_sftrl.config.schema import GrpoConfig, RunConfig

# One row.

_BRACKETS = (("⟦", "⟧"), ("⟪", "⟫"), ("⦃", "⦄"), ("⸨", "⸩"))


def in_brackets(pieces: Sequence[Piece]) -> str:
    """The text with brackets around what is learned, of a kind that the text itself does not hold."""
    text = "".join(piece.text for piece in pieces)
    begin, end = next((pair for pair in _BRACKETS if not any(each in text for each in pair)), ("[[[", "]]]"))
    runs = groupby(pieces, key=lambda piece: piece.is_learned)
    return "".join(
        f"{begin if is_learned else ''}{printable(''.join(each.text for each in run))}"
        f"{end if is_learned else ''}"
        for is_learned, run in runs
    )


def id_pieces(row: ShownRow) -> list[Piece]:
    """The token ids of a row as text, learned ones apart."""
    runs = groupby(zip(row.mask, row.ids, strict=True), key=lambda pair: pair[0])
    found = [(is_learned, " ".join(str(i) for _, i in run)) for is_learned, run in runs]
    return [
        Piece(text=f"{' ' if n else ''}{text}", is_learned=is_learned, is_special=False)
        for n, (is_learned, text) in enumerate(found)
    ]


def printable(text: str) -> str:
    """Control characters other than newline and tab as `\\x1b`: a terminal would obey them."""
    if text.isprintable():
        return text
    return "".join(
        f"\\x{ord(each):02x}" if unicodedata.category(each) == "Cc" and each not in "\n\t" else each
        for each in text
    )


def short(text: str, limit: int | None) -> str:
    """The text, or its two ends where it has more than `limit` characters."""
    if limit is None or len(text) <= limit:
        return text
    left_out = len(text) - 2 * (limit // 2)
    return f"{text[: limit // 2]} (... {left_out} characters ...) {text[-(limit // 2) :]}"


def headline(row: ShownRow) -> str:
    """Where a row stands, its tokens, and what becomes of it."""
    if not row.ids:
        return f"{row.place}: {row.fate}{' by its weight' if row.fate == 'left out' else ''}"
    told = f"{row.place}: {_of(row.num_tokens, 'token')}"
    if any(row.mask) and row.fate != "dropped":
        told += f", {sum(row.mask):,} learned"
    of_fate = {"cut": f", cut to {len(row.ids):,}", "dropped": ", dropped: too long", "refused": ", refused"}
    return told + of_fate.get(row.fate, "")


# All rows.


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A heading and the lines below it."""

    title: str
    lines: tuple[str, ...]


def summary(
    config: RunConfig | GrpoConfig, sets: Sequence[DataCounts], repeats: Sequence[Repeats], problems: Problems
) -> list[Section]:
    """What there is to say about all rows of data.train, and of data.valid where there is one."""
    found = [Section(title=each.key, lines=tuple(_lines_of_set(each, config))) for each in sets]
    found.append(Section(title="the same tokens twice", lines=tuple(_repeat_lines(repeats))))
    lines = [f"{problem.count:,} x {problem.message}" for problem in problems]
    if lines:
        lines.append(f"training refuses these data: {_of(problems.count, 'problem')} of {len(lines)} kind(s)")
    found.append(Section(title="refused", lines=tuple(lines) or ("nothing",)))
    return found


def _lines_of_set(counts: DataCounts, config: RunConfig | GrpoConfig) -> Iterator[str]:
    for source in counts.sources:
        yield f"{source.path}: {source.format_title or 'no row that could be read'}"
        yield f"    {_fates(source)}{_answers(source, config)}"
    tokens, learned = counts.all_of("kept"), counts.all_of("learned")
    per_epoch = "one epoch" if counts.key == "data.train" else "one evaluation"
    told = f"{per_epoch}: {_of(counts.num_rows, 'row')}"
    if counts.num_sequences != counts.num_rows:
        told += f" in {_of(counts.num_sequences, 'sequence')}"
    told += f", {_of(int(tokens.sum()), 'token')}"
    if isinstance(config, RunConfig):
        told += f", {int(learned.sum()):,} of them learned{_percent(int(learned.sum()), int(tokens.sum()))}"
    yield told
    yield _too_long(counts, config)
    lengths = counts.all_of("lengths")
    if len(lengths):
        middle, most, longest = (int(np.quantile(lengths, q, method="higher")) for q in (0.5, 0.99, 1.0))
        of_what = "sequence before truncation" if isinstance(config, RunConfig) else "prompt"
        yield f"tokens of a {of_what}: median {middle:,}, 99% at most {most:,}, longest {longest:,}"
        yield from _length_bars(lengths)
    if isinstance(config, RunConfig) and len(tokens):
        yield "learned share of a sequence's tokens, in percent:"
        tenths = np.minimum(10 * learned // np.maximum(tokens, 1), 9)
        yield from _bars(tenths, [f"{10 * n}-{10 * n + 10}" for n in range(10)])


def _fates(source: SourceCounts) -> str:
    told = _of(source.num_rows, "row")
    for count, fate in (
        (source.num_refused, "refused"),
        (source.num_left_out, "left out by their weight"),
        (source.num_dropped, "dropped"),
        (source.num_cut, "cut"),
    ):
        told += f", {count:,} {fate}" if count else ""
    told += f", {source.num_scored:,} with behaviour scores" if source.num_scored else ""
    return told if source.is_whole else f"{told}; there are more, which could not be read"


def _answers(source: SourceCounts, config: RunConfig | GrpoConfig) -> str:
    if isinstance(config, RunConfig):
        return ""
    column = f" (from {source.answer_column})" if source.answer_column else ""
    return f", {source.num_answers:,} with an answer{column}"


def _too_long(counts: DataCounts, config: RunConfig | GrpoConfig) -> str:
    """How many rows are over the limit, and what that means for them."""
    num_longer = sum(source.num_longer for source in counts.sources)
    if isinstance(config, RunConfig):
        name, limit = "data.max_length", config.data.max_length
        what = {
            "error": "they are refused (data.truncation: error)",
            "drop": "they are dropped (data.truncation: drop)",
            "right": "their end is cut, the end token with it (data.truncation: right)",
            "left_prompt": "the start of their prompt is cut (data.truncation: left_prompt)",
        }[config.data.truncation]
    else:
        name, limit, what = "data.max_prompt_length", config.data.max_prompt_length, "they are refused"
    sequence = "sequence" if isinstance(config, RunConfig) else "prompt"
    told = f"longer than {name} = {limit:,}: {_of(num_longer, sequence)}"
    return f"{told}; {what}" if num_longer else told


def _repeat_lines(repeats: Sequence[Repeats]) -> Iterator[str]:
    for each in repeats:
        yield f"{each.title}: {each.count:,}"
        yield from (f"    {row} is {earlier}" for row, earlier in each.pairs)
        if each.count > len(each.pairs) > 0:
            yield f"    ... and {each.count - len(each.pairs):,} more"


# Bars.

_WIDTH = 40
_NUM_BARS = 12


def _length_bars(lengths: NDArray[np.int64]) -> Iterator[str]:
    """Bars of a round width that show 99 % of the rows; the last one holds all that are longer."""
    least, most = int(lengths.min()), int(np.quantile(lengths, 0.99, method="higher"))
    widths = (step * 10**power for power in range(19) for step in (1, 2, 5))
    width = next(width for width in widths if width * _NUM_BARS > most - least)
    first, last = least // width, most // width
    labels = [_range(n * width, (n + 1) * width - 1) for n in range(first, last + 1)]
    if lengths.max() >= (last + 1) * width:
        labels[-1] = _range(last * width, int(lengths.max()))
    yield from _bars(np.minimum(lengths // width, last) - first, labels)


def _range(first: int, last: int) -> str:
    return f"{first:,}" if first == last else f"{first:,}-{last:,}"


def _bars(places: NDArray[np.int64], labels: Sequence[str]) -> Iterator[str]:
    """A line for each label with the number of `places` that are its index; none for empty ends."""
    counts = np.bincount(places, minlength=len(labels)).tolist()
    filled = slice(int(places.min()), int(places.max()) + 1)
    counts, labels = counts[filled], labels[filled]
    widest = max(map(len, labels))
    for label, count in zip(labels, counts, strict=True):
        bar = "█" * -(-_WIDTH * count // max(counts))
        yield f"    {label.rjust(widest)}  {bar}{' ' if bar else ''}{count:,}"


def _percent(part: int, whole: int) -> str:
    return f" ({part / whole:.1%})" if whole else ""


def _of(count: int, name: str) -> str:
    return f"{count:,} {name}{'' if count == 1 else 's'}"
