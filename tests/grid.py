"""What runs always, and what with SFTRL_TEST_FULL=1: whole grids, and the quick start as a user runs it."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from typing import Any

import pytest

HOW_TO_RUN_ALL = "runs with SFTRL_TEST_FULL=1"


def is_full() -> bool:
    """Everything is asked for."""
    return os.environ.get("SFTRL_TEST_FULL") == "1"


def grid(rows: Iterable[Any], columns: Iterable[Any]) -> list[Any]:
    """Every (row, column); every other one, in the pattern of a chess board, only when all is asked for."""
    wanted, columns = is_full(), list(columns)
    return [
        pytest.param(
            row,
            column,
            marks=[] if wanted or (i + j) % 2 == 0 else [pytest.mark.skip(reason=HOW_TO_RUN_ALL)],
        )
        for i, row in enumerate(rows)
        for j, column in enumerate(columns)
    ]


def often(values: dict[str, Any], *, rarely: Collection[str]) -> dict[str, Any]:
    """As `cases`, where a fixture makes all of them at once."""
    if unknown := set(rarely) - values.keys():
        raise ValueError(f"{sorted(unknown)} are none of {list(values)}")
    return {name: value for name, value in values.items() if is_full() or name not in rarely}


def cases(names: Iterable[str], *, rarely: Collection[str]) -> list[Any]:
    """Every name; those of `rarely` only when all is asked for. They ask what others of the list ask, too."""
    names, wanted = list(names), is_full()
    if unknown := set(rarely) - set(names):
        raise ValueError(f"{sorted(unknown)} are none of {names}")
    return [
        pytest.param(
            name, marks=[pytest.mark.skip(reason=HOW_TO_RUN_ALL)] if name in rarely and not wanted else []
        )
        for name in names
    ]
