"""Comparisons of runs by what they left in metrics.jsonl and in their checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.checkpoint_runs import stored_tensors
from tests.e2e.project import Metrics, without_timing


def assert_same_curves(
    ours: Metrics, truth: Metrics, *, tolerance: float, except_for: tuple[str, ...] = ()
) -> None:
    """Every step, every number but the timing ones and `except_for`: absolute or relative difference."""
    ours, truth = without_timing(ours), without_timing(truth)
    assert [row["step"] for row in ours] == [row["step"] for row in truth]
    for mine, theirs in zip(ours, truth, strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine.keys() - set(except_for):
            expected = pytest.approx(theirs[name], rel=tolerance, abs=tolerance)
            assert mine[name] == expected, f"{name} of step {mine['step']}"


def unequal_tensors(ours: Path, theirs: Path) -> list[str]:
    """Tensors of two checkpoints that differ in a bit, by name; all of them when the names differ."""
    mine, other = stored_tensors(ours), stored_tensors(theirs)
    if mine.keys() != other.keys():
        return sorted(mine.keys() ^ other.keys())
    # Bytes, not values: -0.0 equals 0.0 and NaN does not equal itself.
    return [name for name in mine if mine[name].numpy().tobytes() != other[name].numpy().tobytes()]


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}
