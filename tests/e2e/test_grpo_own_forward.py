"""The first update finds its old log-probabilities by itself: the run is that which has looked ahead."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from unittest import mock

import pytest

from tests.e2e.grpo_project import GrpoProject, changed_weights, samples_of
from tests.e2e.product import Ended, call_main
from tests.e2e.project import metrics_of, without_timing
from tests.grid import cases
from tests.ranks import free_port, run_ranks

RUNS = {
    "one update": (
        "batch.global_size=16",
        "rollout.passes=1",
        "rollout.temperature=0.7",
        "loss={name: grpo, correction: tis}",
    ),
    "two mini-batches, two passes": ("parallel.tp=2",),
    "one update of sequences": (
        "batch={global_size: 16, packing: true, max_tokens: 48}",
        "filters.mask_truncated=true",
        "loss={name: grpo, ratio: sequence, clip_low: 0.001}",
    ),
    "cut into stages": ("parallel={pp: 2, vp: 2}",),
}
LAST = "checkpoints/step-00000002"
FORWARDS = {"one update": 0, "one update of sequences": 0}
"""Forwards for old log-probabilities alone, a step."""


def run(arguments: list[str], port: int, looks_ahead: bool) -> tuple[list[Ended], int]:
    """On every rank: one command line, and how often it looked at tokens without learning them."""
    from megatron_sftrl.trainers import grpo

    trainer = partial(grpo.GrpoTrainer, looks_ahead=looks_ahead)
    with (
        mock.patch.object(grpo, "GrpoTrainer", trainer),
        mock.patch.object(grpo, "look_at_tokens", wraps=grpo.look_at_tokens) as look,
    ):
        ended = call_main([arguments], [port])
    return ended, look.call_count


@pytest.mark.parametrize("name", cases(RUNS, rarely=("one update of sequences", "cut into stages")))
def test_a_run_is_that_which_looked_at_every_mini_batch_ahead(
    name: str, grpo: GrpoProject, tmp_path: Path
) -> None:
    counts = []
    for folder, looks_ahead in (("own", False), ("ahead", True)):
        command = grpo.command(tmp_path / folder, *RUNS[name], "train.steps=2")
        ranks = 1 if name == "one update" else 2
        (ended, count), *_ = run_ranks(ranks, run, command, free_port(), looks_ahead, group=False)
        ended[0].expect(0)
        counts.append(count)
    own, ahead = tmp_path / "own", tmp_path / "ahead"
    rows = metrics_of(own)
    learning = [row for row in rows if row["updates"]]  # a step may have nothing but truncated responses
    num_ahead = FORWARDS.get(name, 1)
    assert learning
    assert counts == [len(learning) * num_ahead, len(learning) * (num_ahead + 1)]
    assert samples_of(own) == samples_of(ahead)
    assert changed_weights(own / LAST, ahead / LAST) == []
    assert without_timing(rows) == without_timing(metrics_of(ahead))
    assert all(row["mismatch/max"] < 5e-6 for row in learning)
