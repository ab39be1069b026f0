"""Ranks that wait for slower ones see them move; nothing fails earlier or later than the run's own limit."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from tests.ranks import run_ranks


def share(mark: Path, fails: bool) -> tuple[int, str]:
    """Rank 0 has nothing to do; rank 1 goes on until rank 0 has seen it move for the third time."""
    from megatron.core import parallel_state

    from megatron_sftrl.config.schema import ParallelSection
    from megatron_sftrl.engine.parallel import initialize_parallel
    from megatron_sftrl.engine.together import SharedProgress

    parallel = initialize_parallel(ParallelSection())
    num_moves = 0

    def on_move() -> None:
        nonlocal num_moves
        num_moves += 1
        if parallel.rank == 0 and num_moves == 4:  # the first is its own
            mark.touch()

    progress = SharedProgress(parallel, on_move, seconds=0.01)

    def work() -> None:
        while parallel.rank == 1 and not mark.exists():
            progress.moved()
        if fails and parallel.rank == 1:
            raise RuntimeError("this share is lost")

    said = ""
    try:
        progress.together(work)
    except RuntimeError as error:
        said = str(error)
    for _ in range(3):  # phases that nothing is done in
        progress.everyone()
    parallel_state.destroy_model_parallel()
    return num_moves, said


@pytest.mark.parametrize("fails", [False, True])
def test_a_rank_that_waits_sees_another_one_move(fails: bool, tmp_path: Path) -> None:
    (moves, said), (_, other) = run_ranks(2, share, tmp_path / "mark", fails)
    assert moves >= 4
    assert (said, other) == ("", "this share is lost" if fails else "")


def timeouts(hang_minutes: float) -> set[timedelta]:
    """Of every group: the default one, Megatron's and those made later."""
    import torch
    import torch.distributed as dist

    from megatron_sftrl.config.schema import ParallelSection
    from megatron_sftrl.engine.checkpoint.background import BackgroundAction
    from megatron_sftrl.engine.parallel import parallel_context

    with parallel_context(ParallelSection(), hang_minutes=hang_minutes) as parallel:
        later = BackgroundAction[None](parallel).group
        groups = list(dist.distributed_c10d._world.pg_map)
        assert {parallel.tp_group, parallel.dp_group, parallel.ep_group, later} <= set(groups)
        found = {group._get_backend(torch.device("cpu")).options._timeout for group in groups}
        return {*found, parallel.timeout}


@pytest.mark.parametrize(
    ("minutes", "seconds"), [(30.0, 1830), (0.25, 45), (1440.0, 86430), (0.0, 3650 * 86400)]
)
def test_collectives_wait_half_a_minute_longer_than_the_watch(minutes: float, seconds: float) -> None:
    assert run_ranks(1, timeouts, minutes, group=False) == [{timedelta(seconds=seconds)}]


def microbatches_of_each_verb() -> dict[str, int]:
    from megatron.core import parallel_state

    from megatron_sftrl.engine.parallel import initialize_parallel
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.losses.registry import build_loss
    from megatron_sftrl.models import architecture_of
    from tests.distributed.test_layouts import make_config, step_batches

    config = make_config({})
    policy = PolicyEngine(architecture_of(config.model), config, initialize_parallel(config.parallel))
    begun: list[None] = []
    policy.on_microbatch = lambda: begun.append(None)
    batches = step_batches(0, num_groups=1, group=0, multiple=1, num_microbatches=2)
    loss, counts = build_loss("sft", {}), {"batches": len(batches)}
    for name, verb in {
        "train": lambda: policy.forward_backward(batches, loss),
        "evaluate": lambda: policy.evaluate(batches, loss),
        "score": lambda: policy.token_numbers(batches, lambda p, _, ids: [p.logprobs(ids)]),
    }.items():
        begun.clear()
        verb()
        counts[name] = len(begun)
    parallel_state.destroy_model_parallel()
    return counts


def test_every_micro_batch_of_training_evaluation_and_scoring_is_a_movement() -> None:
    counts = run_ranks(1, microbatches_of_each_verb)[0]
    assert set(counts.values()) == {counts["batches"]}
    assert counts["batches"] > 1
