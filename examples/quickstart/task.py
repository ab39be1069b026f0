"""The task of the quick start: sums such as `7 - 4 + 9`, answered in several styles, and their verifier.

reasoning-gym makes the problems and judges the answers; the texts of the answers are written here. grpo.yaml
names this file among its `modules`: the reward at the end is the verdict that the report counts.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

import reasoning_gym

from megatron_sftrl import Canary, RewardConfig, RewardInputs, RewardOutput, register_reward

DATASET = "chain_sum"
SETTINGS = {"min_terms": 4, "max_terms": 4, "min_digits": 1, "max_digits": 1}
STRICT_FORMAT = re.compile(r"(?:\d.*\n|-\d.*\n)*<answer>(-?\d+)</answer>")

# reasoning-gym draws problem i of seed s from the random stream s + i: seeds must lie far apart, or two
# seeds give the same problems shifted by a few places.
_SEED_DISTANCE = 10**9
_SLIP_SHARE = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A question and what is known about it.

    Args:
        question: the text that reasoning-gym wrote, `... arithmetic problem: 7 - 4 + 9 =`.
        expression: the sum inside it, `7 - 4 + 9`.
        answer: the right result.
    """

    question: str
    expression: str
    answer: str


def problems(seed: int) -> Iterator[Problem]:
    """Problems without end, none of them twice."""
    dataset = reasoning_gym.create_dataset(
        DATASET, seed=seed * _SEED_DISTANCE, size=_SEED_DISTANCE, **SETTINGS
    )
    seen: set[str] = set()
    for entry in dataset:
        if entry["question"] not in seen:
            seen.add(entry["question"])
            expression = entry["metadata"]["expression"]
            yield Problem(question=entry["question"], expression=expression, answer=entry["answer"])


def demonstration(problem: Problem) -> str:
    """The answer that fine-tuning teaches: one correct step a line, then the result in tags."""
    return _worked(problem.expression, random.Random(0), slip_share=0.0)


def base_text(problem: Problem, draw: random.Random) -> str:
    """What a base model finds in the wild: bare results, some prose, some working, slips now and then."""
    style = draw.random()
    if style < 0.5:
        return f"<answer>{problem.answer}</answer>"
    if style < 0.6:
        return f"The answer is {problem.answer}."
    return _worked(problem.expression, draw, slip_share=_SLIP_SHARE)


def is_correct(response: str, answer: str, *, is_strict: bool) -> bool:
    """Whether reasoning-gym's verifier accepts the response.

    Args:
        response: text without the end token.
        answer: the right result.
        is_strict: the response must be steps and then the result in tags, and nothing else. Otherwise the
            last number of the response is taken, in whatever format.
    """
    if is_strict:
        match = STRICT_FORMAT.fullmatch(response)
        found = match[1] if match else None
    else:
        numbers = re.findall(r"-?\d+", response)
        found = numbers[-1] if numbers else None
    # Less than 1 is reasoning-gym's partial credit for an answer that contains the right one.
    verifier = reasoning_gym.create_dataset(DATASET, size=1)
    return verifier.score_answer(found, {"answer": answer}) == 1.0


@register_reward(
    "sum_with_steps",
    needs=("answer",),
    canaries=lambda config: (
        Canary(response="3+4=7\n<answer>7</answer>", row={"answer": "7"}, is_right=True),
        Canary(response="3+4=8\n<answer>8</answer>", row={"answer": "7"}, is_right=False),
    ),
)
def sum_with_steps(inputs: RewardInputs, config: RewardConfig) -> RewardOutput:
    """1 for a correct response, else 0; the library's partial credit would pay for `-5` where 5 is right."""
    answer = str(inputs.row["answer"])
    strict, lenient = (is_correct(inputs.response, answer, is_strict=strict) for strict in (True, False))
    return RewardOutput(reward=float(strict), lenient=float(lenient))


def _worked(expression: str, draw: random.Random, *, slip_share: float) -> str:
    first, *rest = expression.split()
    total, lines = int(first), []
    for operator, term in zip(rest[::2], rest[1::2], strict=True):
        result = total + int(term) if operator == "+" else total - int(term)
        if draw.random() < slip_share:
            result += draw.choice((-2, -1, 1, 2))
        lines.append(f"{total}{operator}{term}={result}")
        total = result
    return "\n".join([*lines, f"<answer>{total}</answer>"])
