"""The check before a run: each reward tells its known right answers from its known wrong ones.

A verifier that gives everybody 0 (a library of another version, an answer format that it does not read)
trains nothing and looks like a hard task.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_sftrl.errors import UserError
from megatron_sftrl.rl.rewards.api import Canary
from megatron_sftrl.rl.rewards.pool import RewardPool
from megatron_sftrl.rl.rewards.scored import Part


def check_canaries(pool: RewardPool) -> None:
    """Score every reward's examples in the workers.

    Raises:
        UserError: a reward fails on an example, or gives some wrong one as much as some right one; it names
            both.
    """
    for index, reward in enumerate(pool.rewards):
        canaries = tuple(reward.entry.canaries(reward.config))
        if canaries:
            _check(reward.name, canaries, pool.score_with(index, [canary.inputs for canary in canaries]))


def _check(name: str, canaries: Sequence[Canary], parts: Sequence[Part]) -> None:
    for canary, part in zip(canaries, parts, strict=True):
        if part.outcome != "ok":
            raise UserError(
                f"reward {name!r} failed on its own example {_shown(canary)}: {part.outcome}: {part.detail}; "
                "the run would train on zeros"
            )
    scores = [(part.reward, canary) for canary, part in zip(canaries, parts, strict=True)]
    right = [pair for pair in scores if pair[1].is_right]
    wrong = [pair for pair in scores if not pair[1].is_right]
    if not right or not wrong:
        raise UserError(f"reward {name!r}: expected right and wrong examples, got one kind; add the other")
    lowest = min(right, key=lambda pair: pair[0])
    highest = max(wrong, key=lambda pair: pair[0])
    if lowest[0] <= highest[0]:
        raise UserError(
            f"reward {name!r} does not tell right from wrong: it gave {lowest[0]:g} to the right example "
            f"{_shown(lowest[1])} and {highest[0]:g} to the wrong example {_shown(highest[1])}; expected "
            "more for every right one. Correct the reward, its options or its examples"
        )


def _shown(canary: Canary) -> str:
    text = repr(canary.response)
    text = text if len(text) <= 80 else text[:77] + "..."
    return f"{text} (row {dict(canary.row)})" if canary.row else text
