"""Files of rows: JSON lines, Parquet, and directories written by datasets.save_to_disk, read in order."""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_sftrl.errors import UserError, error_of, hub_hint

_JSON_LINES = (".jsonl", ".json")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_NOT_UTF8 = "a text of this row is not UTF-8; repair or remove the row"


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRow:
    """Values by column, and the line of a JSONL file, from 1, or the row of any other source, from 0."""

    values: Mapping[str, object]
    number: int


OnRefused = Callable[[int, UserError], None]
"""Takes the number of a row that cannot be used, and why; the rows behind it follow all the same."""


def describe_row(path: str | Path, number: int) -> str:
    """Where a row stands, for people: `train.jsonl:17` or `train.parquet row 16`."""
    return f"{path}:{number}" if Path(path).suffix in _JSON_LINES else f"{path} row {number}"


def check_source(path: Path, key: str = "data") -> None:
    """Raise UserError for a path that is not there or of no known kind; `key` names its setting."""
    if not path.exists():
        raise UserError(f"{key}: {path} does not exist; check {key}{hub_hint(path)}")
    if path.is_dir():
        if (path / "dataset_dict.json").exists():
            splits = sorted(entry.name for entry in path.iterdir() if (entry / "state.json").exists())
            raise UserError(
                f"{key}: {path} holds several splits {splits}; "
                f"name one, such as {path / (splits or ['train'])[0]}"
            )
        if not (path / "state.json").exists():
            raise UserError(f"{key}: {path} was not written by datasets.save_to_disk (no state.json in it)")
    elif path.suffix not in (*_JSON_LINES, ".parquet"):
        raise UserError(
            f"{key}: expected .jsonl, .parquet or a directory of datasets.save_to_disk, got {path}"
        )


def read_rows(path: Path, *, on_refused: OnRefused | None = None) -> Iterator[SourceRow]:
    """Rows of one source in the order of the file, one at a time; `on_refused` is given lines that are none.

    Raises:
        UserError: the source is of no known kind, or a row cannot be read; the message names file and line.
    """
    check_source(path)
    if path.is_dir():
        yield from _read_saved_dataset(path)
    elif path.suffix == ".parquet":
        yield from _read_parquet(path)
    else:
        yield from _read_json_lines(path, on_refused)


def _read_json_lines(path: Path, on_refused: OnRefused | None) -> Iterator[SourceRow]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                values = _read_json_line(line, describe_row(path, number))
            except UserError as error:
                if on_refused is None:
                    raise
                on_refused(number, error)
            else:
                yield SourceRow(values=values, number=number)


def _read_json_line(line: bytes, source: str) -> dict[str, object]:
    try:
        # json.loads would let halves of a pair through that stand in the bytes themselves.
        text = line.decode(json.detect_encoding(line))
        values = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{source}: not JSON ({error}); expected one JSON object on each line") from error
    if not isinstance(values, dict):
        raise UserError(f"{source}: expected a JSON object, got {type(values).__name__}")
    if _ESCAPED_SURROGATE.search(text) and (place := _surrogate(values)) is not None:
        raise UserError(
            f"{source}: {place} holds half of a surrogate pair, which is no character (a text cut in the "
            "middle of one, say); repair or remove the row"
        )
    return values


def _read_parquet(path: Path) -> Iterator[SourceRow]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for values in _rows_of_batch(batch):
                    yield SourceRow(values=values, number=number)
                    number += 1
    except UnicodeDecodeError as error:
        raise UserError(f"{describe_row(path, number)}: {_NOT_UTF8} ({error})") from error
    except (pyarrow.ArrowException, OSError) as error:
        where = describe_row(path, number)
        raise error_of(f"{where}: cannot be read as Parquet: {error}", error) from error


def _read_saved_dataset(path: Path) -> Iterator[SourceRow]:
    import datasets

    try:
        rows: Any = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise error_of(f"data: {path} cannot be read by datasets.load_from_disk: {error}", error) from error
    number = 0
    try:
        for values in rows:
            yield SourceRow(values=dict(values), number=number)
            number += 1
    except UnicodeDecodeError as error:
        raise UserError(f"{describe_row(path, number)}: {_NOT_UTF8} ({error})") from error


def _rows_of_batch(batch: Any) -> Iterable[dict[str, object]]:
    """Rows of a record batch; where one of them cannot be read, those before it come first."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        return (batch.slice(number, 1).to_pylist()[0] for number in range(batch.num_rows))


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
