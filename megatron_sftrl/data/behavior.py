"""Behaviour scores of a row: log-probabilities that travel with the token ids they belong to.

Scores made with another tokenizer or chat template are off by a few tokens and ruin every weight computed
from them without an error, so ids are compared one by one (TRAP: a public PEAR reproduction).
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_sftrl.errors import UserError

LOGPROBS_COLUMN = "behavior_logprobs"
SCORER_COLUMN = "behavior_scorer"
_PACKAGES = ("megatron_sftrl", "torch", "megatron-core")
TOKEN_IDS_COLUMN = "behavior_token_ids"

_RESCORE = (
    "score the rows again with tools/score_behavior_logprobs.py and this tokenizer, template and max_length"
)

# An engine that computes log-softmax in bf16 or fp32 may report a certain token slightly above 0.
_ABOVE_ZERO = 1e-2


def read_behavior_scores(
    values: Mapping[str, object], *, loss_token_ids: NDArray[np.int32], num_kept: int
) -> NDArray[np.float32] | None:
    """The scores of a row, checked against the tokens that we learn.

    A row that is cut on the right may carry scores of all its loss tokens or of those that remain.

    Args:
        values: the row.
        loss_token_ids: [k] ids of the loss tokens before truncation.
        num_kept: how many of them remain after it, from the first on.
    Returns:
        [num_kept] fp32 nats, or None when the row has no scores.
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
    """Who scores a row, for its column behavior_scorer: model, dtype, and versions of the code.

    Args:
        model: which weights.
        dtype: bf16 or fp32.
    """
    return {"model": model, "dtype": dtype, **_versions()}


def read_scorer(values: Mapping[str, object]) -> str:
    """The column behavior_scorer of a row as one text, empty where the row has none."""
    found = values.get(SCORER_COLUMN)
    return "" if found is None else json.dumps(found, sort_keys=True, default=str)


def scorer_warnings(scorers: Sequence[str], *, dtype: str) -> list[str]:
    """What makes the scores of a data set doubtful beside a training run, one line each.

    Args:
        scorers: the different texts of read_scorer() in it.
        dtype: that training computes in; another one rounds the log-probabilities of the same weights to
            other values, and PEAR adds up hundreds of their differences.
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
