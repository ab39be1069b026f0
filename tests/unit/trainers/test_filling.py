"""How a step of dynamic sampling fills: enough prompts at once, whole mini-batches, and no prompt lost."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_sftrl.data.prompts import PromptRow, PromptSet
from megatron_sftrl.rl.rewards import Part, Scored
from megatron_sftrl.trainers.experience import Response
from megatron_sftrl.trainers.rollouts import NO_DRAWS, Collected, Draws, RolloutCollector, fill, num_to_draw
from megatron_sftrl.types import Rollout

ROLLOUT = Rollout(prompt_tokens=(1,), response_tokens=(2,), logprobs=(0.0,), is_finished=True)
WANTED = 512


def response(number: int, row: PromptRow, first: float | None, *, second: float | None = 0.0) -> Response:
    values = (first, second)
    parts = tuple(
        Part(name=name, outcome="timeout" if value is None else "ok", reward=value or 0.0)
        for name, value in zip(("math", "judge"), values, strict=True)
    )
    total = None if first is None or second is None else first + second
    return Response(
        group=number, row=row, rollout=ROLLOUT, scored=Scored(reward=total, lenient=total, parts=parts)
    )


class Drawing(RolloutCollector):
    """A collector whose groups are useful with a probability, or as `rewards` says."""

    def __init__(self, share: float, *, wanted: int = WANTED, rounds: int = 4, num_rows: int = 17000) -> None:
        config: Any = SimpleNamespace(
            rollout=SimpleNamespace(prompts_per_step=wanted, demonstrations=0),
            seed=0,
            filters=SimpleNamespace(dynamic_sampling=True, max_rounds=rounds),
            data=SimpleNamespace(shuffle=False),
        )
        rows = tuple(PromptRow(tokens=(1,), values={}, source=f"rows.jsonl:{i}") for i in range(num_rows))
        answers: Any = SimpleNamespace(ask=self.answered)
        super().__init__(config, PromptSet(rows=rows, fingerprint=""), answers)
        self.share, self.draw, self.asked = share, random.Random(1), list[int]()

    def rewards(self, number: int) -> tuple[float | None, ...]:
        return (0.0, float(self.draw.random() < self.share))

    def answered(self, rows: Any, *, copies: int) -> Any:
        self.asked.append(len(rows))
        found = [response(number, row, reward) for number, row in rows for reward in self.rewards(number)]
        return SimpleNamespace(responses=lambda: found, seconds=1.0, close=lambda: None)

    def step(self, *, consumed: int, recent: Draws = NO_DRAWS, **options: Any) -> Collected:
        return self.collect(self.begin(consumed=consumed, recent=recent), **options)


def steps(drawing: Drawing, count: int, **options: Any) -> list[Collected]:
    """Consecutive steps, each told of the draws of the one before."""
    made, consumed, recent = [], 0, NO_DRAWS
    for _ in range(count):
        step = drawing.step(consumed=consumed, recent=recent, **options)
        consumed, recent = consumed + step.num_prompts, step.draws
        made.append(step)
    return made


@pytest.mark.parametrize("share", [0.8, 0.5, 0.2])
def test_steps_are_full_and_after_the_first_mostly_by_one_generation(share: float) -> None:
    drawing = Drawing(share)
    made = steps(drawing, 8)
    assert [len(step.responses) for step in made] == [2 * WANTED] * 8
    # 2048 prompts at once at most, of which 410 are useful at 0.2: a second generation finds the rest.
    usual = 1 if 4 * share > 1.1 else 2
    assert sorted(step.num_rounds for step in made[1:])[:6] == [usual] * 6
    assert max(drawing.asked) <= 4 * WANTED


def test_a_draw_is_what_the_share_asks_for_and_two_standard_deviations() -> None:
    # m = 64, s = 1/4: mean 256, deviation sqrt(64 * 0.75) / 0.25 = 27.7.
    assert num_to_draw(64, seen=Draws(drawn=400, useful=100), wanted=512) == 312  # ceil(256 + 55.4)
    assert num_to_draw(64, seen=Draws(drawn=400, useful=400), wanted=512) == 64
    assert num_to_draw(400, seen=Draws(drawn=400, useful=1), wanted=512) == 4 * 512
    # Nothing known yet, and nothing found yet: no guess is made of that.
    assert num_to_draw(512, seen=NO_DRAWS, wanted=512) == 512
    assert num_to_draw(512, seen=Draws(drawn=512, useful=0), wanted=512) == 512


def test_useful_groups_beyond_a_full_step_are_put_back_and_none_is_lost_or_trained_twice() -> None:
    drawing = Drawing(0.5, wanted=8)
    always = {number: number % 3 != 0 for number in range(10**4)}
    drawing.rewards = lambda number: (0.0, float(always[number]))  # type: ignore[method-assign]
    made = steps(drawing, 20)
    trained = [group for step in made for group in dict.fromkeys(each.group for each in step.responses)]
    assert trained == [number for number in range(10**4) if always[number]][: 20 * 8]
    assert sum(step.draws.drawn for step in made) > sum(step.num_prompts for step in made)


@pytest.mark.parametrize(
    ("found", "trained", "num_prompts"),
    [
        ([2, 3, 5, 8, 9, 11], 4, 7),  # 9 comes again: 2..8 are behind us
        ([2, 3, 5, 8], 4, 12),  # what is left is useless
        ([2, 3, 5], 2, 3),  # two whole pairs would take one more: 5 comes again
        ([2], 0, 12),  # not one pair; the same policy would find the same, so that the search goes on
        ([], 0, 12),
    ],
)
def test_whole_mini_batches_are_trained_and_the_next_useful_prompt_comes_again(
    found: list[int], trained: int, num_prompts: int
) -> None:
    filling = fill(found, first=2, drawn=12, wanted=4, multiple_of=2)
    assert (filling.trained, filling.num_prompts) == (tuple(found[:trained]), num_prompts)


def test_a_search_that_ends_early_trains_no_part_of_a_mini_batch() -> None:
    (step,) = steps(Drawing(0.02, rounds=2), 1, multiple_of=32)
    useful = step.draws.useful
    assert 32 < useful < WANTED, "the step is full or empty: the test is blind"
    assert len(step.responses) == 2 * (useful // 32 * 32)
    left = [
        group for group in dict.fromkeys(each.group for each in step.generated) if group >= step.num_prompts
    ]
    assert left, "the useful rest is put back"


def test_a_group_is_useful_by_the_responses_that_could_be_judged() -> None:
    """As zeros, the failures would make [1, 1, ?] and [1, ?, ?] useful."""
    table = {0: (1.0, 1.0, None), 1: (1.0, None, 0.0), 2: (1.0, None, None), 3: (None, None, None)}
    drawing = Drawing(0, wanted=4, rounds=1)
    drawing.rewards = lambda number: table[number]  # type: ignore[method-assign]
    step = drawing.step(consumed=0)
    assert [each.group for each in step.responses] == [1, 1, 1]
    assert step.draws == Draws(drawn=4, useful=1)


@pytest.mark.parametrize(("consumed", "error"), [(0, ValueError), (512, RuntimeError)])
def test_a_reward_that_judges_nothing_of_a_step_ends_the_run(consumed: int, error: type[Exception]) -> None:
    """In the first step it is the user's to correct; later the job is started again."""

    class Broken(Drawing):
        def answered(self, rows: Any, *, copies: int) -> Any:
            found = [response(number, row, 1.0, second=None) for number, row in rows]
            return SimpleNamespace(responses=lambda: found)

    drawing = Broken(0, wanted=4)
    with pytest.raises(error, match=r"reward 'judge' failed on all 4 responses of a step") as raised:
        drawing.step(consumed=consumed)
    assert isinstance(raised.value, ValueError) == (consumed == 0)
