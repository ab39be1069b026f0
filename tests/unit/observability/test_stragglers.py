"""Who is slow, beside whom, and when it is worth a line."""

from __future__ import annotations

import pytest

from megatron_sftrl.observability.watch import STEPS, Place, StragglerWatch


def watch_of(*stages: int) -> StragglerWatch:
    return StragglerWatch([Place(host=f"node{rank}", stage=stage) for rank, stage in enumerate(stages)])


def test_the_slowest_is_measured_against_the_median_of_the_others() -> None:
    slowest, warning = watch_of(0, 0, 0, 0).note([1.0, 4.0, 2.0, 3.0])
    assert slowest is not None
    assert (slowest.rank, slowest.seconds, slowest.slowdown) == (1, 4.0, 2.0)
    assert warning is None


def test_stages_of_a_pipeline_are_not_compared_with_each_other() -> None:
    slowest, _ = watch_of(0, 0, 1, 1).note([9.0, 9.0, 1.0, 1.2])
    assert slowest is not None
    assert slowest.rank == 3
    assert slowest.slowdown == pytest.approx(1.2)


@pytest.mark.parametrize(("stages", "seconds"), [((0,), [1.0]), ((0, 1), [1.0, 5.0]), ((0, 0), [0.0, 0.0])])
def test_nobody_is_slow_without_a_peer_or_without_a_step(stages: tuple, seconds: list) -> None:
    assert watch_of(*stages).note(seconds) == (None, None)


def test_the_same_rank_for_some_steps_is_named_once_with_its_host() -> None:
    watch = watch_of(0, 0, 0)
    lines = [watch.note([1.0, 1.1, 2.0])[1] for _ in range(STEPS + 3)]
    assert [number for number, line in enumerate(lines, start=1) if line] == [STEPS]
    assert "rank 2 on node2" in lines[STEPS - 1]  # type: ignore[operator]
    assert "took 2 s, 1.9 times" in lines[STEPS - 1]  # type: ignore[operator]


def test_a_rank_that_recovers_or_takes_turns_is_not_named_and_one_that_relapses_is_again() -> None:
    watch, slow, even = watch_of(0, 0, 0), [1.0, 1.0, 2.0], [1.0, 1.0, 1.4]
    assert not any(watch.note(each)[1] for each in ([slow] * (STEPS - 1) + [even]) * 3)
    turns = [[2.0, 1.0, 1.0], [1.0, 2.0, 1.0], slow]
    assert not any(watch.note(each)[1] for each in turns * STEPS)
    watch.note(even)
    for _ in range(2):
        assert [bool(watch.note(slow)[1]) for _ in range(STEPS)] == [False] * (STEPS - 1) + [True]
        watch.note(even)
