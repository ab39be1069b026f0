"""Numbers that differ between ranks must not let one of them stop alone: the others would wait for ever."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from tests.e2e.grpo_project import GrpoProject
from tests.e2e.product import Ended, call_main
from tests.e2e.project import metrics_of
from tests.ranks import free_port, run_ranks


def run_with_its_rank_as_memory(arguments: list[str], port: int) -> list[Ended]:
    """On every rank: a command line in which rank r says that it used r bytes."""

    def memory(device: torch.device) -> float:
        return float(dist.get_rank())

    with mock.patch("megatron_sftrl.trainers.run.peak_memory_bytes", memory):
        return call_main([arguments], [port])


def test_a_gate_that_another_rank_alone_would_cross_is_not_crossed(grpo: GrpoProject, tmp_path: Path) -> None:
    gate = "gates=[{metric: peak_memory_bytes, above: 0.5, action: stop}]"
    command = grpo.command(tmp_path / "run", gate, "train.steps=2", "rollout.passes=1")
    # A rank that stops alone would hang here.
    ended = run_ranks(2, run_with_its_rank_as_memory, command, free_port(), timeout_s=120, group=False)
    assert [[each.code for each in rank] for rank in ended] == [[0], [0]]
    assert [row["peak_memory_bytes"] for row in metrics_of(tmp_path / "run")] == [0, 0]
