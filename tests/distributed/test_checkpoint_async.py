"""A save beside the training writes what a save that waits writes, and its end is every rank's end."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pickle
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed.checkpoint_runs import Span, engines, open_store
from tests.distributed.test_layouts import step_batches
from tests.e2e.curves import contents
from tests.ranks import run_ranks

SHARDED = Span(
    parallel={"distributed_optimizer": True, "overlap_param_gather": True, "overlap_grad_reduce": True},
    dtype="bf16",
    reference="moving_average",
)


def save_both_ways(directory: str, span: Span) -> tuple[int, int, float]:
    """One state, saved by waiting and beside steps that change every tensor; bytes of both, seconds."""
    from megatron_sftrl.engine.checkpoint import TrainerState
    from megatron_sftrl.losses.registry import build_loss

    with engines(span) as (parallel, policy, reference):
        loss = build_loss("sft", {})

        def step() -> None:
            batches = step_batches(
                0, num_groups=parallel.dp_size, group=parallel.dp_rank, multiple=2, num_microbatches=2
            )
            policy.forward_backward(batches, loss)
            policy.optim_step(0, num_steps=6)
            if reference is not None:
                policy.gather_parameters()
                reference.follow(policy.chunks)

        waiting = open_store(f"{directory}/halted", parallel, span)
        beside = open_store(f"{directory}/beside", parallel, dataclasses.replace(span, async_save=True))
        # The second save uses the memory of the first again.
        for number in (1, 2):
            step()
            waiting.save(TrainerState(step=number), policy, reference)
            beside.save(TrainerState(step=number), policy, reference)
            # At once: the writer of so small a model is ahead of a step's update.
            change_everything(policy, reference)
            while (written := beside.written()) is None:
                step()
            waited = waiting.written()
        assert waited is not None
        assert waiting.written() is None
        assert beside.written() is None
        return waited.num_bytes, written.num_bytes, written.seconds


@torch.no_grad()
def change_everything(policy, reference) -> None:
    """Every tensor that a checkpoint holds, in place."""
    from megatron_sftrl.engine.checkpoint.tensors import optimizer_shares

    models = [policy, reference] if reference is not None else [policy]
    tensors = [parameter for model in models for chunk in model.chunks for parameter in chunk.parameters()]
    for share in optimizer_shares(policy.optimizer):
        tensors += share.tensors.values()
    for tensor in tensors:
        tensor.mul_(1.5)


@pytest.mark.parametrize("span", [SHARDED, Span(parallel={"pp": 2})])
def test_both_ways_of_saving_write_the_same_bytes(span: Span, tmp_path: Path) -> None:
    for waited, beside, seconds in run_ranks(2, save_both_ways, str(tmp_path), span):
        assert waited == beside > 10_000
        assert seconds > 0
    assert_same_files(tmp_path / "halted", tmp_path / "beside", num_steps=2)
    first, second = (contents(tmp_path / "beside" / f"step-0000000{step}") for step in (1, 2))
    assert first["__1_0.distcp"] != second["__1_0.distcp"], "nothing was trained: the comparison is blind"


def assert_same_files(ours: Path, theirs: Path, *, num_steps: int) -> None:
    found, expected = contents(ours), contents(theirs)
    assert found.keys() == expected.keys()
    assert len([name for name in found if name.endswith("checkpoint.json")]) == num_steps
    for name, content in found.items():
        if name.endswith(".metadata"):  # torch puts the path, of one length here, and a random number in it
            assert index_of(content) == index_of(expected[name]), name
        elif name.endswith("checkpoint.json"):
            assert record_of(content) == record_of(expected[name]), name
        else:
            assert content == expected[name], name


def index_of(content: bytes) -> tuple[object, object]:
    index = pickle.loads(content)
    return index.state_dict_metadata, index.storage_data


def record_of(content: bytes) -> dict:
    record = json.loads(content)
    del record["files"][".metadata"]["sha256"]
    return record


def one_rank_fails(raise_on_every: bool) -> tuple[str, str]:
    """What taking an action says that rank 1 fails while rank 0 waits, and what a next one gives."""
    from megatron_sftrl.engine.checkpoint.background import BackgroundAction
    from megatron_sftrl.engine.together import on_every_rank

    with engines(Span(parallel={})) as (parallel, _, _):
        background = BackgroundAction[str](parallel)
        released = threading.Event()

        def fail() -> str:
            if parallel.rank == 1:
                raise RuntimeError("rank 1 broke")
            return "fine"

        def alone() -> str:
            if parallel.rank == 0:
                released.wait()
            return fail()

        background.start(lambda: on_every_rank(fail, background.group) if raise_on_every else alone())
        said = failure_of(lambda: background.take(wait=True))
        released.set()
        background.start(lambda: on_every_rank(lambda: f"rank {parallel.rank}", background.group))
        return said, str(background.take(wait=True))


def failure_of(action: Callable[[], object]) -> str:
    try:
        return f"no failure: {action()}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def test_a_failure_on_one_rank_is_told_on_every_rank_also_where_the_action_cannot_end() -> None:
    together = [("RuntimeError: RuntimeError: rank 1 broke", f"rank {rank}") for rank in (0, 1)]
    assert run_ranks(2, one_rank_fails, True) == together
    (waiting, after), (broken, _) = run_ranks(2, one_rank_fails, False)
    assert waiting == "RuntimeError: another rank failed; its message says why"
    assert broken == "RuntimeError: rank 1 broke"
    assert after == "rank 0"


def end_at_different_times() -> list[str | None]:
    """What looking gives before and after the slower rank has ended."""
    from megatron_sftrl.engine.checkpoint.background import BackgroundAction

    with engines(Span(parallel={})) as (parallel, _, _):
        background = BackgroundAction[str](parallel)
        seen = [background.take(wait=True)]
        goes_on = threading.Event()
        background.start(lambda: "ended" if parallel.rank == 0 or goes_on.wait(60) else "stuck")
        seen += [background.take(wait=False) for _ in range(3)]
        dist.barrier()
        goes_on.set()
        return [*seen, background.take(wait=True), background.take(wait=False)]


def test_an_action_has_ended_when_it_has_on_every_rank() -> None:
    expected = [None, None, None, None, "ended", None]
    assert run_ranks(2, end_at_different_times) == [expected, expected]


def fail_beside_a_save(directory: str) -> list[str]:
    """What is there when rank 1 has left with an error, while rank 0 stands in a collective."""
    from megatron_sftrl.engine.checkpoint import TrainerState

    span = Span(parallel={"tp": 2}, async_save=True)
    with engines(span) as (parallel, policy, reference):
        store = open_store(directory, parallel, span)
        with contextlib.ExitStack() as ending:
            if parallel.rank == 1:
                ending.enter_context(contextlib.suppress(KeyError))
                ending.enter_context(store)
            store.save(TrainerState(step=1), policy, reference)
            if parallel.rank == 1:
                raise KeyError("of the test")
        dist.barrier()
        return sorted(path.name for path in Path(directory).iterdir())


def test_a_rank_that_fails_lets_the_save_under_way_end_and_asks_nobody(tmp_path: Path) -> None:
    assert run_ranks(2, fail_beside_a_save, str(tmp_path)) == [["step-00000001"]] * 2
