"""The order of samples: a permutation an epoch, a pure function of seed and position."""

from __future__ import annotations

import pytest

from megatron_sftrl.data.loader import SampleOrder, num_training_steps
from megatron_sftrl.data.mixture import permutation


def test_each_epoch_visits_every_row_once_in_an_order_of_its_own() -> None:
    order = SampleOrder(97, seed=7, shuffle=True)
    epochs = [order.rows(97 * epoch, 97) for epoch in range(3)]
    for rows in epochs:
        assert sorted(rows) == list(range(97))
    assert len({tuple(rows) for rows in epochs}) == 3
    assert SampleOrder(97, seed=8, shuffle=True).rows(0, 97) != epochs[0]


def test_a_resumed_order_continues_at_the_exact_sample_across_epochs() -> None:
    whole = SampleOrder(10, seed=3, shuffle=True).rows(0, 64)
    for consumed in (0, 1, 9, 10, 11, 37):
        resumed = SampleOrder(10, seed=3, shuffle=True)
        assert resumed.rows(consumed, 64 - consumed) == whole[consumed:]
    back_and_forth = SampleOrder(10, seed=3, shuffle=True)
    assert [back_and_forth.row(p) for p in (25, 3, 25)] == [whole[25], whole[3], whole[25]]


def test_without_shuffling_the_order_is_that_of_the_files() -> None:
    assert SampleOrder(3, seed=1, shuffle=False).rows(2, 5) == [2, 0, 1, 2, 0]


def test_the_permutation_is_pinned_so_that_an_upgrade_cannot_change_a_running_order() -> None:
    assert permutation(8, 1234, 0).tolist() == [7, 3, 0, 1, 4, 2, 5, 6]


def test_steps_come_from_steps_or_from_whole_batches_of_the_epochs() -> None:
    assert num_training_steps(steps=5, epochs=None, num_rows=3, global_size=4) == 5
    assert num_training_steps(steps=None, epochs=3, num_rows=10, global_size=4) == 7
    with pytest.raises(ValueError, match=r"batch\.global_size = 31"):
        num_training_steps(steps=None, epochs=3, num_rows=10, global_size=31)
    with pytest.raises(ValueError, match="exactly one"):
        num_training_steps(steps=1, epochs=1, num_rows=10, global_size=1)


def test_an_order_over_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="num_rows >= 1"):
        SampleOrder(0, seed=1, shuffle=True)
