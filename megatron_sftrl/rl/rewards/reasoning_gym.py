"""reasoning_gym: the score that the task's own verifier gives (github.com/open-thought/reasoning-gym).

    reward  = score(text in the last <answer>...</answer>), 0 without one
    lenient = score(the same, or the whole response without one)

The row is an entry of the library as JSON: question, answer, and metadata with source_dataset, the task's
name. The answer may be null, as it is in tasks that many answers solve: their verifiers read the metadata.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Literal

from megatron_sftrl.errors import UserError
from megatron_sftrl.rl.rewards.registry import (
    Canary,
    Json,
    RewardConfig,
    RewardInputs,
    RewardOutput,
    register_reward,
)

# These compare grids of numbers, which are tuples in the library and lists once they went through JSON: the
# right answer would get 0.05.
TUPLE_TASKS = ("arc_agi", "rearc")
# Their entries have no answer of their own: many are right, and the metadata tells.
TASKS_WITHOUT_ANSWER = ("boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour")
# Below 1 by less than rounding in a verifier's own arithmetic.
SOLVED = 1 - 1e-6


class ReasoningGymConfig(RewardConfig):
    extraction: Literal["tags", "whole"] = "tags"
    """What the strict reading takes for the answer: the text in the last <answer> tags, or the whole
    response."""
    score: Literal["solved", "graded"] = "solved"
    """solved: 1 where the library's score is 1, else 0. graded: the library's own number, from 0 to 1, which
    holds a floor of 0.01 to 0.05 in most tasks for any text at all. Solved is the default because advantages
    are divided by the group's spread: among wrong answers, one that earned 0.01 for being readable would be
    reinforced as strongly as a right one."""


def examples(config: ReasoningGymConfig) -> Sequence[Canary]:
    """A sum, answered right and wrong."""
    row: dict[str, Json] = {
        "question": "3 + 4 =",
        "answer": "7",
        "metadata": {"source_dataset": "chain_sum"},
    }
    write = "3 + 4 is <answer>%s</answer>" if config.extraction == "tags" else "%s"
    return [
        Canary(response=write % "7", row=row, is_right=True),
        Canary(response=write % "8", row=row, is_right=False),
        Canary(response="", row=row, is_right=False),
    ]


def check_row(row: Mapping[str, Json], config: ReasoningGymConfig) -> None:
    """Raise UserError for metadata that is no object, an unknown task, an answer that is no text."""
    metadata, answer = row["metadata"], row.get("answer")
    if not isinstance(metadata, dict):
        raise UserError(
            f"expected `metadata` to be an object, got {type(metadata).__name__}: "
            f"{str(metadata)[:60]!r}; parse it (json.loads) when the data is written"
        )
    task = metadata.get("source_dataset")
    if not isinstance(task, str) or task not in _tasks():
        near = difflib.get_close_matches(task, _tasks(), n=1) if isinstance(task, str) else []
        meant = f" (did you mean {near[0]!r}?)" if near else ""
        raise UserError(
            f"expected `metadata.source_dataset` to name a task of reasoning_gym, got {task!r}{meant}; "
            "correct it, or remove the row"
        )
    if answer is None and task in TASKS_WITHOUT_ANSWER:
        return
    if not isinstance(answer, str):
        raise UserError(
            f"expected `answer` of task {task!r} to be text, as the library writes it, got {answer!r}; write "
            "it as text"
        )


def solution(row: Mapping[str, Json], config: ReasoningGymConfig) -> str | None:
    """The row's answer in the form that is read; None for a task without one."""
    answer = row.get("answer")
    write = "<answer>%s</answer>" if config.extraction == "tags" else "%s"
    return None if answer is None else write % answer


@register_reward(
    "reasoning_gym",
    config=ReasoningGymConfig,
    needs=("metadata",),
    canaries=examples,
    imports=("reasoning_gym",),
    check_row=check_row,
    solution=solution,
)
def reasoning_gym(inputs: RewardInputs, config: ReasoningGymConfig) -> RewardOutput:
    """1 for an answer that the task's verifier takes for right, or what it gives for it, in [0, 1]."""
    # Late, here and below: the trainer, which registers rewards as well, does not need the library.
    from reasoning_gym.utils import extract_answer

    metadata = inputs.row["metadata"]
    assert isinstance(metadata, dict), "check_row comes first"
    task = str(metadata["source_dataset"])
    entry = {"question": inputs.prompt, "answer": None, **inputs.row}
    if task in TUPLE_TASKS:
        entry["metadata"] = {key: _as_tuples(value) for key, value in metadata.items()}
    tagged = extract_answer(inputs.response)
    whole = inputs.response.strip()
    answer = tagged if config.extraction == "tags" else whole
    forgiven = whole if tagged is None else tagged
    grade = 0.0 if answer is None else _grade(task, answer, entry)
    forgiven_grade = grade if answer == forgiven else max(grade, _grade(task, forgiven, entry))
    is_graded = config.score == "graded"
    return RewardOutput(
        reward=grade if is_graded else float(grade >= SOLVED),
        lenient=forgiven_grade if is_graded else float(forgiven_grade >= SOLVED),
        metrics={"solved": float(grade >= SOLVED), "grade": grade, "answered": float(bool(answer))},
        answer=None if answer is None else " ".join(answer.split()),
    )


def _grade(task: str, answer: str, entry: Mapping[str, object]) -> float:
    """The library's score; 0 for an answer on which its verifier breaks though it can read the row."""
    score = _verifier(task)
    try:
        return float(score(answer=answer, entry=entry))
    except MemoryError:
        raise
    except Exception:
        # A response must not become unjudged by being unreadable; a row that is wrong must.
        score(answer="{}" if entry["answer"] is None else entry["answer"], entry=entry)
        return 0.0


@cache
def _tasks() -> tuple[str, ...]:
    """Names of the library's tasks."""
    from reasoning_gym.factory import DATASETS

    return tuple(sorted(DATASETS))


@cache
def _verifier(task: str) -> Callable[..., float]:
    """A task's verifier, made once per worker: some of them read word lists or puzzles of megabytes first."""
    import reasoning_gym

    return reasoning_gym.get_score_answer_fn(task)


def _as_tuples(value: Json) -> object:
    return tuple(_as_tuples(item) for item in value) if isinstance(value, list) else value
