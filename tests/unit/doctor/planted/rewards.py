"""Rewards with one defect each, and one without."""

from __future__ import annotations

import os
import time

from megatron_sftrl.rl.rewards.registry import (
    Json,
    RewardConfig,
    RewardInputs,
    RewardOutput,
    register_reward,
)


@register_reward("sound", needs=("answer",))
def sound(inputs: RewardInputs, config: RewardConfig) -> RewardOutput:
    """The answer in a box, and nothing of a solution in its registration."""
    return RewardOutput(reward=float(rf"\boxed{{{inputs.row['answer']}}}" in inputs.response))


@register_reward("starts", needs=("answer",))
def starts(inputs: RewardInputs, config: RewardConfig) -> RewardOutput:
    """Hole: every text begins with the empty one."""
    return RewardOutput(reward=float(str(inputs.row["answer"]).startswith(inputs.response)))


@register_reward("undeclared")
def undeclared(inputs: RewardInputs, config: RewardConfig) -> RewardOutput:
    """As starts, from a reward that does not say what it looks at."""
    return starts(inputs, config)


@register_reward("generous", needs=("answer",))
def generous(inputs: RewardInputs, config: RewardConfig) -> RewardOutput:
    """Hole: half the marks for the right answer, and for any that is a number."""
    is_number = inputs.response.strip().isdecimal()
    return RewardOutput(reward=0.5 if is_number or inputs.response == inputs.row["answer"] else 0.0)


@register_reward("pleased")
def pleased(inputs: RewardInputs, config: RewardConfig) -> RewardOutput:
    """1 for everything."""
    return RewardOutput(reward=1.0)


@register_reward("longer")
def longer(inputs: RewardInputs, config: RewardConfig) -> RewardOutput:
    """Does not look at the row: now a row's own answer earns more, now another's."""
    return RewardOutput(reward=min(len(inputs.response), 90) / 100)


@register_reward("never", needs=("answer",))
def never(inputs: RewardInputs, config: RewardConfig) -> RewardOutput:
    """Nothing is ever right."""
    return RewardOutput(reward=0.0)


@register_reward("counts_calls", needs=("answer",))
def counts_calls(inputs: RewardInputs, config: RewardConfig) -> RewardOutput:
    """Depends on what was judged before."""
    _CALLS.append(None)
    is_right = inputs.response == inputs.row["answer"]
    return RewardOutput(reward=float(is_right) + 1e-3 * (len(_CALLS) % 97))


_CALLS: list[None] = []


@register_reward("breaks", needs=("answer",))
def breaks(inputs: RewardInputs, config: RewardConfig) -> RewardOutput:
    """Zero ends its worker, and the question takes for ever."""
    if inputs.response == "0":
        os._exit(3)
    if "?" in inputs.response:
        time.sleep(1000)
    return RewardOutput(reward=float(inputs.response == inputs.row["answer"]))


def elsewhere_solution(row: dict[str, Json], config: RewardConfig) -> str:
    return f"It is {row['label']}"


@register_reward("elsewhere", needs=("label",), solution=elsewhere_solution)
def elsewhere(inputs: RewardInputs, config: RewardConfig) -> RewardOutput:
    """Sound, and its answer stands in another column."""
    return RewardOutput(reward=float(inputs.response == f"It is {inputs.row['label']}"))
