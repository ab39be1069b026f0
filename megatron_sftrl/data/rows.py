"""Rows of a file, in order: JSON lines and arrays, Parquet, and what datasets.save_to_disk has written."""

from __future__ import annotations

import importlib.metadata
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TextIO, cast

import numpy as np
from numpy.typing import NDArray

from megatron_sftrl.data.columnar import read_parquet, read_saved_dataset
from megatron_sftrl.data.sources import SourceFile, SourceRow, find_files
from megatron_sftrl.errors import UserError

_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


OnRefused = Callable[[int, str, UserError], None]
"""Takes number and place of a row that cannot be used, and why; the rows behind it follow all the same."""


def read_rows(path: Path, key: str = "data") -> Iterator[SourceRow]:
    """Rows of all files that a path stands for, in order, one at a time; `key` names its setting.

    Raises:
        UserError: as find_files, or a row cannot be read; the message names file and line.
    """
    for file in find_files(path, key):
        yield from read_file(file)


def read_file(file: SourceFile, *, on_refused: OnRefused | None = None) -> Iterator[SourceRow]:
    """Rows of one file in its order, one at a time; `on_refused` is given rows of JSON that are none.

    Raises:
        UserError: the file or a row cannot be read; the message names file and line.
    """
    if file.kind == "JSON lines":
        return _read_json_lines(file, on_refused)
    if file.kind == "JSON array":
        return _read_json_array(file, on_refused)
    return read_parquet(file) if file.kind == "Parquet" else read_saved_dataset(file)


def _read_json_lines(file: SourceFile, on_refused: OnRefused | None) -> Iterator[SourceRow]:
    number = 1
    with file.open(lambda: number) as stream:
        for line in stream:
            if line.strip() and (row := _or_refused(file, number, on_refused, _row_of_line, line)):
                yield row
            number += 1


def _or_refused(
    file: SourceFile,
    number: int,
    on_refused: OnRefused | None,
    read: Callable[..., SourceRow],
    *found: object,
) -> SourceRow | None:
    """What `read` makes of a row; None where it cannot be used and `on_refused` has taken it."""
    try:
        return read(file, number, *found)
    except UserError as error:
        if on_refused is None:
            raise
        on_refused(number, f"{file.place}{number}", error)
        return None


def _row_of_line(file: SourceFile, number: int, line: bytes) -> SourceRow:
    try:
        # json.loads would let halves of a pair through that stand in the bytes themselves.
        text = line.decode(json.detect_encoding(line))
        values = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(
            f"{file.place}{number}: not JSON ({error}); expected one JSON object on each line"
        ) from error
    return _row_of_json(file, number, values, text)


def _row_of_json(file: SourceFile, number: int, values: object, text: str) -> SourceRow:
    source = f"{file.place}{number}"
    if not isinstance(values, dict):
        raise UserError(f"{source}: expected a JSON object, got {type(values).__name__}")
    if _ESCAPED_SURROGATE.search(text) and (place := _surrogate(values)) is not None:
        raise UserError(
            f"{source}: {place} holds half of a surrogate pair, which is no character (a text cut in the "
            "middle of one, say); repair or remove the row"
        )
    return SourceRow(values=values, file=file, number=number)


def _read_json_array(file: SourceFile, on_refused: OnRefused | None) -> Iterator[SourceRow]:
    number = 0
    with file.open(lambda: number) as binary:
        head = cast(io.BufferedReader, binary).peek(4)[:4]
        array = _JsonArray(io.TextIOWrapper(binary, json.detect_encoding(head), newline=""))
        try:
            for values, text in array:
                if row := _or_refused(file, number, on_refused, _row_of_json, values, text):
                    yield row
                number += 1
        except json.JSONDecodeError as error:
            near = error.doc[max(0, error.pos - 30) : error.pos + 10]
            raise UserError(
                f"{file.place}{number}: not JSON ({error.msg}, near {near!r}); expected one array of objects"
            ) from error
        except (UnicodeDecodeError, RecursionError) as error:
            raise UserError(
                f"{file.place}{number}: not JSON ({error}); expected one array of objects"
            ) from error


class _JsonArray:
    """The elements of an array with their text, of which little more than one is held at a time."""

    _AT_ONCE = 2**20
    _LONGEST_WORD = 16
    """No word of JSON that may be cut at the end of a text, such as a Unicode escape, is longer."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._text, self._at = stream, "", 0
        self._decode = json.JSONDecoder().raw_decode

    def __iter__(self) -> Iterator[tuple[object, str]]:
        self._take("[")
        if self._peek() == "]":
            self._at += 1
        else:
            yield self._element()
            while self._take(",]") == ",":
                yield self._element()
        if self._peek():
            raise json.JSONDecodeError("Extra data behind the array", self._text, self._at)

    def _read(self) -> bool:
        """Whether the text could be prolonged; twice as long at least, so that a long element is cheap."""
        rest = self._text[self._at :]
        block = self._stream.read(max(self._AT_ONCE, len(rest)))
        self._text, self._at = rest + block, 0
        return bool(block)

    def _peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            while self._at < len(self._text):
                if not self._text[self._at].isspace():
                    return self._text[self._at]
                self._at += 1
            if not self._read():
                return ""

    def _take(self, expected: str) -> str:
        found = self._peek()
        if not found or found not in expected:
            named = " or ".join(repr(each) for each in expected)
            raise json.JSONDecodeError(
                f"expected {named}, got {found or 'the end of the file'}", self._text, self._at
            )
        self._at += 1
        return found

    def _element(self) -> tuple[object, str]:
        self._peek()
        while True:
            try:
                value, end = self._decode(self._text, self._at)
            except json.JSONDecodeError as error:
                is_cut = error.pos >= len(self._text) - self._LONGEST_WORD
                if not ((is_cut or error.msg.startswith("Unterminated string")) and self._read()):
                    raise
            else:
                start, self._at = self._at, end
                return value, self._text[start:end]


def _surrogate(value: object, place: str = "") -> str | None:
    """Where the first text stands that cannot be written as UTF-8, such as `messages[0].content`."""
    if isinstance(value, str):
        return place if any("\ud800" <= character <= "\udfff" for character in value) else None
    if isinstance(value, dict):
        for key, inner in value.items():
            if _surrogate(key) is not None:
                return f"a key in {place or 'the row'}"
            if (found := _surrogate(inner, f"{place}.{key}" if place else str(key))) is not None:
                return found
    if isinstance(value, list):
        for number, inner in enumerate(value):
            if (found := _surrogate(inner, f"{place}[{number}]")) is not None:
                return found
    return None


# Behaviour scores of a row: log-probabilities that travel with the token ids they belong to. Scores made with
# another tokenizer or chat template are off by a few tokens and ruin every weight computed from them without
# an error, so ids are compared one by one (one public PEAR does not).

LOGPROBS_COLUMN = "behavior_logprobs"
SCORER_COLUMN = "behavior_scorer"
_PACKAGES = ("megatron_sftrl", "torch", "megatron-core")
TOKEN_IDS_COLUMN = "behavior_token_ids"

_RESCORE = "score the rows again with `sftrl score` and this tokenizer, template and max_length"

# An engine that computes log-softmax in bf16 or fp32 may report a certain token slightly above 0.
_ABOVE_ZERO = 1e-2


def read_behavior_scores(
    values: Mapping[str, object], *, loss_token_ids: NDArray[np.int32], num_kept: int
) -> NDArray[np.float32] | None:
    """[num_kept] fp32 nats, checked against the tokens that we learn; None when the row has no scores.

    A row that is cut on the right may carry scores of all its loss tokens, [k] before truncation, or of the
    first num_kept, which remain.

    Raises:
        UserError: one column without the other, unequal lengths, ids that differ, or scores that are not
            finite or above 0.
    """
    logprobs, ids = values.get(LOGPROBS_COLUMN), values.get(TOKEN_IDS_COLUMN)
    if logprobs is None and ids is None:
        return None
    if logprobs is None or ids is None:
        missing = LOGPROBS_COLUMN if logprobs is None else TOKEN_IDS_COLUMN
        raise UserError(f"{missing} is missing; scores and the ids they belong to go together: {_RESCORE}")
    scores = _numbers(logprobs, LOGPROBS_COLUMN)
    scored_ids = _numbers(ids, TOKEN_IDS_COLUMN)
    if len(scores) != len(scored_ids):
        raise UserError(
            f"{LOGPROBS_COLUMN} has {len(scores)} entries but {TOKEN_IDS_COLUMN} has {len(scored_ids)}; "
            f"{_RESCORE}"
        )
    common = min(len(scored_ids), len(loss_token_ids))
    differs = np.flatnonzero(scored_ids[:common] != loss_token_ids[:common])
    if len(differs):
        at = int(differs[0])
        raise UserError(
            f"behaviour scores belong to other tokens: loss token {at} is {loss_token_ids[at]} here, "
            f"{TOKEN_IDS_COLUMN}[{at}] is {scored_ids[at]:g}; {_RESCORE}"
        )
    if len(scored_ids) not in (len(loss_token_ids), num_kept):
        raise UserError(
            f"behaviour scores: expected one for each of the {len(loss_token_ids)} loss tokens, "
            f"got {len(scored_ids)} (the first {common} ids agree); {_RESCORE}"
        )
    bad = np.flatnonzero(~np.isfinite(scores) | (scores > _ABOVE_ZERO))
    if len(bad):
        at = int(bad[0])
        raise UserError(
            f"{LOGPROBS_COLUMN}[{at}]: expected a finite log-probability of at most 0, got {scores[at]}; "
            f"{_RESCORE}"
        )
    return scores[:num_kept].astype(np.float32)


def scorer(model: str, dtype: str) -> dict[str, str]:
    """Who scores a row, for its column behavior_scorer: model, dtype (bf16 or fp32), versions of the code."""
    return {"model": model, "dtype": dtype, **_versions()}


def read_scorer(values: Mapping[str, object]) -> str:
    """The column behavior_scorer of a row as one text, empty where the row has none."""
    found = values.get(SCORER_COLUMN)
    return "" if found is None else json.dumps(found, sort_keys=True, default=str)


def scorer_warnings(scorers: Sequence[str], *, dtype: str) -> list[str]:
    """What makes a data set's scores doubtful beside a training run, one line each.

    `scorers` are the different texts of read_scorer() in it, `dtype` is the one that training computes in:
    another one rounds the log-probabilities of the same weights to other values, and PEAR adds up hundreds
    of their differences.
    """
    lines = []
    if len(scorers) > 1:
        named = "; ".join(each or "unknown" for each in scorers)
        lines.append(f"rows were scored by {len(scorers)} scorers: {named}")
    for text in scorers:
        found = json.loads(text) if text else None
        if not isinstance(found, dict) or "dtype" not in found:
            lines.append(
                f"{SCORER_COLUMN} is missing: in which dtype the behaviour scores were made is not known; "
                f"training computes in {dtype}. Scores of another dtype bias every weight"
            )
            continue
        if found["dtype"] != dtype:
            lines.append(
                f"behaviour scores were made in {found['dtype']}, training computes in {dtype}: rounding "
                "alone biases every weight; score the rows again in the dtype that trains"
            )
        versions = _versions()
        if changed := [name for name in versions if found.get(name) != versions[name]]:
            told = ", ".join(f"{name} {found.get(name)} (now {versions[name]})" for name in changed)
            lines.append(f"behaviour scores were made with {told}")
    return lines


def _versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "unknown"
    return versions


def _numbers(values: object, column: str) -> NDArray[np.float64]:
    """A column's list as an array."""
    if not isinstance(values, Sequence | np.ndarray) or isinstance(values, str):
        raise UserError(f"{column}: expected a list of numbers, got {type(values).__name__}")
    try:
        return np.asarray(values, dtype=np.float64).reshape(len(values))
    except (TypeError, ValueError) as error:
        raise UserError(f"{column}: expected a list of numbers ({error})") from error
