"""Groups by id, and dynamic sampling."""

from __future__ import annotations

import pytest

from megatron_sftrl.rl.advantages import by_group, informative_groups


def test_responses_find_their_group_by_id_in_whatever_order_they_arrive():
    ids = ["q2", "q1", "q2", "q3", "q1", "q2"]
    assert by_group(ids, [0, 1, 2, 3, 4, 5]) == {"q2": [0, 2, 5], "q1": [1, 4], "q3": [3]}
    with pytest.raises(ValueError, match="expected one value per id, got 2 ids, 1 values"):
        by_group(["a", "b"], [1.0])


def test_groups_without_a_difference_are_dropped_and_a_single_success_is_kept():
    groups = {
        "none": [0.0, 0.0, 0.0, 0.0],
        "one": [1.0, 0.0, 0.0, 0.0],
        "all": [1.0, 1.0, 1.0, 1.0],
        "one failure": [1.0, 1.0, 1.0, 0.0],
        "fractions": [0.3, 0.3, 0.3],
        "in part": [1.0],
    }
    selection = informative_groups(groups)
    assert selection.kept == ("one", "one failure")
    assert selection.dropped == ("none", "all", "fractions", "in part")


def test_a_batch_in_which_nothing_differs_keeps_nothing():
    assert informative_groups({1: [0.0, 0.0], 2: [1.0, 1.0]}).kept == ()
    with pytest.raises(ValueError, match="group 2 has no responses"):
        informative_groups({1: [0.0, 1.0], 2: []})
