"""reasoning_gym: the score that the task's own verifier gives (github.com/open-thought/reasoning-gym).

    reward  = score(text in the last <answer>...</answer>), 0 without one
    lenient = score(the same, or the whole response without one)

Scores are those of the library, from 0 to 1, with the partial credit that a task gives. The row is an entry
of the library as JSON: question, answer, and metadata with source_dataset, the task's name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal

from megatron_sftrl.errors import UserError
from megatron_sftrl.rl.rewards.api import Canary, Json, RewardConfig, RewardInputs, RewardOutput
from megatron_sftrl.rl.rewards.registry import register_reward

# These compare grids of numbers, which are tuples in the library and lists once they went through JSON: the
# right answer would get 0.05.
TUPLE_TASKS = ("arc_agi", "rearc")


class ReasoningGymConfig(RewardConfig):
    extraction: Literal["tags", "whole"] = "tags"
    """What the strict reading takes for the answer: the text in the last <answer> tags, or the whole
    response."""


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


@register_reward(
    "reasoning_gym",
    config=ReasoningGymConfig,
    needs=("answer", "metadata"),
    canaries=examples,
    imports=("reasoning_gym",),
)
def reasoning_gym(inputs: RewardInputs, config: ReasoningGymConfig) -> RewardOutput:
    """What the task's verifier gives for the answer, in [0, 1]."""
    # Late, here and below: the trainer, which registers rewards as well, does not need the library.
    from reasoning_gym.utils import extract_answer

    metadata = inputs.row["metadata"]
    if not isinstance(metadata, dict) or "source_dataset" not in metadata:
        raise UserError("reasoning_gym: expected row.metadata.source_dataset to name the task")
    task = str(metadata["source_dataset"])
    entry = {"question": inputs.prompt, **inputs.row}
    if task in TUPLE_TASKS:
        entry["metadata"] = {key: _as_tuples(value) for key, value in metadata.items()}
    score = _verifier(task)
    tagged = extract_answer(inputs.response)
    whole = inputs.response.strip()
    answer = tagged if config.extraction == "tags" else whole
    forgiven = whole if tagged is None else tagged
    reward = 0.0 if answer is None else float(score(answer=answer, entry=entry))
    return RewardOutput(
        reward=reward,
        lenient=reward if answer == forgiven else max(reward, float(score(answer=forgiven, entry=entry))),
        metrics={"solved": float(reward >= 1), "answered": float(bool(answer))},
    )


@cache
def _verifier(task: str) -> Callable[..., float]:
    """A task's verifier, made once per worker: some of them read word lists or puzzles of megabytes first."""
    import reasoning_gym

    return reasoning_gym.get_score_answer_fn(task)


def _as_tuples(value: Json) -> object:
    return tuple(_as_tuples(item) for item in value) if isinstance(value, list) else value
