"""Samples that are scored while others are being made: beside, to the same rewards, and to their end."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_sftrl.errors import UserError
from megatron_sftrl.rl.rewards import RewardInputs, RewardPool, Scored, Scoring
from tests.unit.rl.rewards.samples import sample
from tests.unit.rl.rewards.test_pool import pool_of

LONG = 60.0


def wait_until(holds: Callable[[], bool]) -> None:
    """While "others are generated": nothing but the thread makes it hold."""
    limit = time.monotonic() + LONG
    while not holds():
        assert time.monotonic() < limit, "the samples wait for results()"
        time.sleep(0.01)


def verdicts(scored: list[Scored]) -> list[tuple]:
    """All but the seconds."""
    return [
        (one.reward, one.lenient, [(part.outcome, part.detail, part.is_retried) for part in one.parts])
        for one in scored
    ]


def scored_beside(pool: RewardPool, samples: list[RewardInputs]) -> list[Scored]:
    with Scoring(pool) as scoring:
        for each in samples:
            scoring.add(lambda each=each: each)
        return scoring.results()


def test_rewards_are_those_of_the_order_one_after_the_other_failures_too() -> None:
    samples = [sample(text) for text in ("1", "exit", "2.5", "raise", "nan", "3")]
    with pool_of("hostile", num_workers=2) as pool:
        assert verdicts(scored_beside(pool, samples)) == verdicts(pool.score(samples))
        assert scored_beside(pool, []) == []


def test_a_verifier_that_never_ends_meets_its_deadline_while_others_are_generated_and_holds_up_none() -> None:
    with pool_of("hostile", num_workers=2) as pool, Scoring(pool) as scoring:
        scoring.add(lambda: sample("hang"))
        scoring.add(lambda: sample("1"))
        wait_until(lambda: scoring.num_judged == 2)  # neither is asked for
        scoring.add(lambda: sample("2"))
        wait_until(lambda: scoring.num_judged == 3)
        hanging, *others = scoring.results()
    assert (hanging.outcome, hanging.parts[0].is_retried) == ("timeout", True)
    assert [one.reward for one in others] == [1.0, 2.0]


def test_what_moves_is_told_while_results_are_waited_for(tmp_path: Path) -> None:
    told: list[float] = []
    with pool_of("late_at_first") as pool, Scoring(pool) as scoring:
        scoring.add(lambda: sample("", file=str(tmp_path / "been_here")))
        assert scoring.results(lambda: told.append(0))[0].reward == 1.0
    assert told


def test_what_is_wrong_with_a_sample_is_raised_at_the_end_and_not_where_it_is_made() -> None:
    def broken() -> RewardInputs:
        raise UserError("no such text")

    with pool_of("hostile") as pool, Scoring(pool) as scoring:
        scoring.add(lambda: sample("1"))
        scoring.add(broken)
        scoring.add(lambda: sample("2"))
        with pytest.raises(UserError, match="no such text"):
            scoring.results()


def test_a_module_that_does_not_load_is_raised_at_the_end(tmp_path: Path) -> None:
    with pool_of("hostile") as pool:
        pool._setup["rewards"] = "nothing of the kind"
        with Scoring(pool) as scoring:
            scoring.add(lambda: sample("1"))
            with pytest.raises((UserError, RuntimeError), match="worker"):
                scoring.results()


def test_what_is_given_up_leaves_no_worker_to_the_next_samples() -> None:
    with pool_of("hostile", seconds=LONG) as pool:
        with Scoring(pool) as scoring:
            scoring.add(lambda: sample("sleep"))  # the engine fails, say: nothing asks for results
        assert not pool._workers
        (one,) = scored_beside(pool, [sample("3")])
        assert one.reward == 3.0
