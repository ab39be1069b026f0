"""The rank that the others wait for is found, although all of them end a step together."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from tests.distributed.checkpoint_runs import Span, engines
from tests.distributed.test_layouts import step_batches
from tests.ranks import run_ranks


def slowed_steps(slow: int) -> list[dict[str, float]]:
    """Numbers of two steps in which one rank waits until the other has its gradients, and a little longer."""
    from megatron_sftrl.losses.registry import build_loss
    from megatron_sftrl.trainers.run import Stragglers

    with engines(Span(parallel={})) as (parallel, policy, _):
        stragglers, store = Stragglers(policy, parallel), dist.distributed_c10d._get_default_store()
        loss, stop, found = build_loss("sft", {}), policy.clock.stop, []

        def stop_and_tell() -> None:
            stop()
            store.add(f"stopped-{step}-{parallel.rank}", 1)

        policy.clock.stop = stop_and_tell
        hook = policy.chunks[0].register_full_backward_hook(lambda *_: wait())

        def wait() -> None:
            if parallel.rank == slow:
                store.wait([f"stopped-{step}-{1 - slow}"])
                time.sleep(0.2)

        for step in range(2):
            batches = step_batches(step, num_groups=2, group=parallel.dp_rank, multiple=2, num_microbatches=1)
            dist.barrier()
            policy.forward_backward(batches, loss)
            policy.optim_step(step, num_steps=6)
            found.append(stragglers.numbers())
        hook.remove()
        return found


def test_the_rank_that_others_wait_for_is_named_in_every_step() -> None:
    for slow in (0, 1):
        ours, theirs = run_ranks(2, slowed_steps, slow)
        assert ours == theirs, "every rank sees the same"
        assert [each["ranks/slowest"] for each in ours] == [slow, slow]
        assert all(each["ranks/slowdown"] > 1 and each["ranks/slowest_seconds"] > 0.2 for each in ours)


def test_one_process_has_nobody_to_compare_with() -> None:
    assert run_ranks(1, numbers_of_one) == [{}]


def numbers_of_one() -> dict[str, float]:
    from megatron_sftrl.trainers.run import Stragglers

    with engines(Span(parallel={})) as (parallel, policy, _), torch.no_grad():
        return Stragglers(policy, parallel).numbers()
