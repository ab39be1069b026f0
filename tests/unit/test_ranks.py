"""The harness itself: a rank that fails or hangs must never pass unnoticed, nor block the session."""

from __future__ import annotations

import os
import time

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankError, run_ranks

_KEPT: list[object] = []


def _sum_of_ranks(scale: float) -> tuple[float, int]:
    value = torch.tensor(scale * (dist.get_rank() + 1))
    dist.all_reduce(value)
    return value.item(), os.getpid()


def _fail_on_one() -> None:
    if dist.get_rank() == 1:
        raise RuntimeError("planted failure")
    dist.barrier()


def _die_on_one() -> None:
    if dist.get_rank() == 1:
        os._exit(7)
    dist.barrier()


def _hang_on_one() -> None:
    if dist.get_rank() == 0:
        time.sleep(60)
    dist.barrier()


def _keep_a_group_in_a_cycle() -> None:
    cycle: list[object] = [dist.new_group()]
    cycle.append(cycle)


def _keep_groups(count: int) -> None:
    _KEPT.extend(dist.new_group() for _ in range(count))


def _num_threads() -> int:
    return psutil.Process().num_threads()


def test_collectives_reach_every_rank_and_results_come_back_in_rank_order():
    assert [value for value, _ in run_ranks(2, _sum_of_ranks, 2.0)] == [6.0, 6.0]


def test_workers_are_reused_from_call_to_call():
    assert run_ranks(2, _sum_of_ranks, 1.0) == run_ranks(2, _sum_of_ranks, 1.0)


def test_the_threads_of_a_calls_groups_end_with_it_even_where_a_cycle_holds_them():
    before = run_ranks(2, _num_threads)
    run_ranks(2, _keep_a_group_in_a_cycle)
    assert run_ranks(2, _num_threads) == before


def test_workers_with_many_threads_that_no_call_needs_are_replaced():
    run_ranks(2, _keep_groups, 5)
    first = run_ranks(2, os.getpid)
    assert run_ranks(2, _num_threads)[0] > 15, "the groups ended by themselves: the test is blind"
    run_ranks(2, _keep_groups, 35)
    assert set(run_ranks(2, os.getpid)).isdisjoint(first)
    assert max(run_ranks(2, _num_threads)) < 15


def test_a_failing_rank_is_named_with_its_traceback_while_the_others_wait():
    with pytest.raises(RankError, match=r"rank 1: Traceback(.|\n)*planted failure") as caught:
        run_ranks(2, _fail_on_one, timeout_s=60)
    assert "rank 0 stood here" in str(caught.value)


def test_a_dying_rank_is_reported_with_its_exit_code():
    with pytest.raises(RankError, match=r"rank 1: died with exit code 7"):
        run_ranks(2, _die_on_one, timeout_s=60)


def test_a_hanging_call_reports_the_stack_of_every_rank():
    run_ranks(2, _sum_of_ranks, 1.0)  # the workers are up, so that the timeout measures the hang alone
    with pytest.raises(RankError, match="did not finish within 5 s") as caught:
        run_ranks(2, _hang_on_one, timeout_s=5)
    assert "rank 0 stood here" in str(caught.value)
    assert "rank 1 stood here" in str(caught.value)
    assert str(caught.value).count("_hang_on_one") >= 3  # once in the headline, once in each stack


def test_the_pool_works_again_after_a_failure():
    with pytest.raises(RankError):
        run_ranks(2, _fail_on_one, timeout_s=60)
    assert [value for value, _ in run_ranks(2, _sum_of_ranks, 1.0)] == [3.0, 3.0]
