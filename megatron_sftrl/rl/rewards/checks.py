"""The checks before a run: rewards tell right answers from wrong ones, and can read the rows of the run."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatron_sftrl.errors import UserError
from megatron_sftrl.rl.rewards.pool import RewardPool
from megatron_sftrl.rl.rewards.reasoning_gym import ReasoningGymConfig
from megatron_sftrl.rl.rewards.registry import Canary, Json, Part, Reward, RewardInputs

# Each reward tells its known right answers from its known wrong ones, and tasks that a constant answer solves
# are named. A verifier that gives every response 0 (a library of another version, an answer format that it
# does not read) trains nothing and looks like a hard task.

# Rows per task, and answers tried on each: enough to tell a share above MOST_BY_CONSTANT from a coin's.
NUM_ROWS, NUM_CONSTANTS = 32, 2
MOST_BY_CONSTANT = 0.7


def check_canaries(pool: RewardPool) -> None:
    """Score every reward's examples in the workers.

    Raises:
        UserError: a reward fails on an example, or gives some wrong one as much as some right one; it names
            both.
        RuntimeError: a worker ran out of time on an example, or died of it.
    """
    for index, reward in enumerate(pool.rewards):
        canaries = tuple(reward.entry.canaries(reward.config))
        if canaries:
            _check(reward.name, canaries, pool.score_with(index, [canary.inputs for canary in canaries]))


def constant_answers(pool: RewardPool, rows: Iterable[Mapping[str, Json]]) -> str | None:
    """One line naming the tasks of reasoning_gym that one answer solves in most of the run's own rows.

    Of each task the first 32 rows are tried with the two answers most frequent among them. The line has the
    answer and its share, where it solves more than 70 %; None where there are none.
    """
    (index, config), *_ = *_tasks_of(pool), (-1, None)
    if config is None:
        return None
    by_task: dict[str, list[Mapping[str, Json]]] = defaultdict(list)
    for row in rows:
        metadata = row.get("metadata")
        task = str(metadata.get("source_dataset")) if isinstance(metadata, dict) else ""
        if len(by_task[task]) < NUM_ROWS:
            by_task[task].append(row)
    write = "<answer>%s</answer>" if config.extraction == "tags" else "%s"
    tried = [
        (task, answer, row)
        for task, of_task in by_task.items()
        if len(of_task) > 1
        for answer, _ in Counter(str(row["answer"]) for row in of_task if row.get("answer")).most_common(
            NUM_CONSTANTS
        )
        for row in of_task
    ]
    parts = pool.score_with(index, [_answering(row, write % answer) for _, answer, row in tried])
    shares: dict[tuple[str, str], float] = defaultdict(float)
    for (task, answer, _), part in zip(tried, parts, strict=True):
        shares[task, answer] += part.metrics.get("solved", 0.0) / len(by_task[task])
    named = {
        task: (share, answer) for (task, answer), share in sorted(shares.items(), key=lambda one: one[1])
    }
    lines = [
        f"{task} ({answer if len(answer) <= 20 else answer[:17] + '...'!r} solves {share:.0%})"
        for task, (share, answer) in named.items()
        if share > MOST_BY_CONSTANT
    ]
    return f"reasoning_gym: tasks solved by a constant answer: {', '.join(lines)}" if lines else None


def _tasks_of(pool: RewardPool) -> list[tuple[int, ReasoningGymConfig]]:
    return [
        (index, reward.config)
        for index, reward in enumerate(pool.rewards)
        if isinstance(reward.config, ReasoningGymConfig)
    ]


def _answering(row: Mapping[str, Json], response: str) -> RewardInputs:
    return RewardInputs(prompt="", response=response, row=row, num_response_tokens=1, is_finished=True)


def _check(name: str, canaries: Sequence[Canary], parts: Sequence[Part]) -> None:
    for canary, part in zip(canaries, parts, strict=True):
        if part.outcome != "ok":
            # Out of time, or dead: the machine may have been at fault, and a restart would not meet it again.
            kind = RuntimeError if part.outcome in ("timeout", "crashed") else UserError
            raise kind(
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


# Rewards must be able to read the run's own rows, whose answers are scored as responses. A reward that fails
# on every row, and a row whose answer its verifier cannot read, train nothing and look like a hard task.

FULL_CREDIT = 1 - 1e-6
"""What a row's own answer must get: 1, less the rounding of a verifier's arithmetic."""

_LONGEST_SHOWN = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnRow:
    """A row of the run's data, where it stands (`train.jsonl:17`), and its prompt as rewards see it."""

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
                f"{row.source}: reward {reward.name!r} failed on {_excerpt(text)}: "
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


def unearned_marks(pool: RewardPool, rows: Sequence[OwnRow]) -> list[str]:
    """One line for each reward that gives 1 or more, in all rows, to nothing, to 0 or to the prompt itself.

    What the first row refuses is not tried on the others, so that an ordinary reward is asked five times. 0
    says nothing in a row whose answer it is.
    """
    lines = []
    for index, reward in enumerate(pool.rewards):
        earned: dict[tuple[str, bool], list[float]] = {
            (name, is_bare): []
            for name in ("the empty text", "'0'", "the prompt")
            for is_bare in (True, False)
        }
        for row in rows:
            texts = {}
            for name, is_bare in earned:
                answer = {"the empty text": "", "'0'": "0", "the prompt": row.prompt}[name]
                text = answer if is_bare else reward.written(row.values, answer)
                if text is not None and not (name == "'0'" and _any_text(row).strip() == "0"):
                    texts[name, is_bare] = text
            parts = pool.score_with(index, [_answered(row, text) for text in texts.values()])
            for key, part in zip(texts, parts, strict=True):
                if part.outcome == "ok" and part.reward >= FULL_CREDIT:
                    earned[key].append(part.reward)
                else:
                    del earned[key]
        if names := list(dict.fromkeys(name for (name, _), scores in earned.items() if scores)):
            lowest = min(min(scores) for scores in earned.values() if scores)
            told = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
            lines.append(
                f"reward {reward.name!r} gives {lowest:g} or more to {told} in all {len(rows)} rows that "
                "were tried, and a policy may learn that in place of the answers"
            )
    return lines


def _check_solution(reward: Reward, row: OwnRow, text: str, part: Part, said: str) -> None:
    if part.outcome != "ok":
        raise UserError(
            f"{said}; the text is the row's own answer. Correct the row, or raise reward_workers.seconds"
        )
    if part.reward < FULL_CREDIT:
        raise UserError(
            f"{row.source}: expected reward {reward.name!r} to give 1 to the row's own answer, written as "
            f"{_excerpt(text)}, got {part.reward:g}: no response could ever be right. Correct the row, or "
            "choose the reward that reads its answers"
        )


def _any_text(row: OwnRow) -> str:
    answer = row.values.get("answer")
    return row.prompt if answer is None or isinstance(answer, list | dict) else str(answer)


def _answered(row: OwnRow, response: str) -> RewardInputs:
    return RewardInputs(
        prompt=row.prompt, response=response, row=row.values, num_response_tokens=1, is_finished=True
    )


def _excerpt(text: str) -> str:
    return repr(text) if len(text) <= _LONGEST_SHOWN else repr(text[: _LONGEST_SHOWN - 3] + "...")
