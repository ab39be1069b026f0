"""The check before a run that its rewards can read its own rows: the rows' answers are scored as responses.

A reward that fails on every row, and a row whose answer its verifier cannot read, train nothing and look like
a hard task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_sftrl.errors import UserError
from megatron_sftrl.rl.rewards.api import Json, RewardInputs
from megatron_sftrl.rl.rewards.pool import RewardPool
from megatron_sftrl.rl.rewards.registry import Reward
from megatron_sftrl.rl.rewards.scored import Part

FULL_CREDIT = 1 - 1e-6
"""What a row's own answer must get: 1, less the rounding of a verifier's arithmetic."""

_LONGEST_SHOWN = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnRow:
    """A row of the run's data.

    Args:
        source: where it stands, such as `train.jsonl:17`.
        prompt: as rewards see it.
        values: the row.
    """

    source: str
    prompt: str
    values: Mapping[str, Json]


def spread(num_rows: int, count: int) -> list[int]:
    """At most `count` places, evenly over `num_rows` rows, the first one among them."""
    count = min(num_rows, count)
    return [place * num_rows // count for place in range(count)]


def check_own_rows(pool: RewardPool, rows: Sequence[OwnRow]) -> list[str]:
    """Score the rows' own answers in the workers.

    A reward that says how a solution is written must give it full credit in every row. Of any other it is not
    known what a right response looks like: the text of the answer, or the prompt's where a row has none, must
    be judged in some row, whatever the verdict.

    Returns:
        One line for each row that a reward of the second kind failed on.
    Raises:
        UserError: names row and reward.
    """
    notes: list[str] = []
    for index, reward in enumerate(pool.rewards):
        solutions = [reward.solution(row.values) for row in rows]
        texts = [
            _any_text(row) if solution is None else solution
            for row, solution in zip(rows, solutions, strict=True)
        ]
        parts = pool.score_with(index, [_answered(row, text) for row, text in zip(rows, texts, strict=True)])
        failed: list[str] = []
        for row, text, solution, part in zip(rows, texts, solutions, parts, strict=True):
            said = (
                f"{row.source}: reward {reward.name!r} failed on {_shown(text)}: "
                f"{part.outcome}: {part.detail}"
            )
            if solution is not None:
                _check_solution(reward, row, text, part, said)
            elif part.outcome != "ok":
                failed.append(said)
        if failed and len(failed) == len(rows):
            raise UserError(
                f"{failed[0]}; it failed on all {len(rows)} rows that were tried, so that nothing could be "
                "trained. Correct the reward or its options; for a response that it cannot read it returns 0"
            )
        notes += failed
    return notes


def _check_solution(reward: Reward, row: OwnRow, text: str, part: Part, said: str) -> None:
    if part.outcome != "ok":
        raise UserError(
            f"{said}; the text is the row's own answer. Correct the row, or raise reward_workers.seconds"
        )
    if part.reward < FULL_CREDIT:
        raise UserError(
            f"{row.source}: expected reward {reward.name!r} to give 1 to the row's own answer, written as "
            f"{_shown(text)}, got {part.reward:g}: no response could ever be right. Correct the row, or "
            "choose the reward that reads its answers"
        )


def _any_text(row: OwnRow) -> str:
    answer = row.values.get("answer")
    return row.prompt if answer is None or isinstance(answer, list | dict) else str(answer)


def _answered(row: OwnRow, response: str) -> RewardInputs:
    return RewardInputs(
        prompt=row.prompt, response=response, row=row.values, num_response_tokens=1, is_finished=True
    )


def _shown(text: str) -> str:
    return repr(text) if len(text) <= _LONGEST_SHOWN else repr(text[: _LONGEST_SHOWN - 3] + "...")
