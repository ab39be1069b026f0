"""The prompts of a GRPO run, held against its rewards and its length before anything is built."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import cast

from megatron_sftrl.config.schema import GrpoConfig
from megatron_sftrl.data.loader import num_training_steps
from megatron_sftrl.data.prompts import PromptSet, read_prompt_set
from megatron_sftrl.data.tokenizer import Tokenizer
from megatron_sftrl.errors import UserError
from megatron_sftrl.rl.rewards import OwnRow, Reward, RewardPool, check_own_rows, spread
from megatron_sftrl.rl.rewards.registry import Json
from megatron_sftrl.trainers.plan import RunPlan

_NUM_TRIED = 8
"""Rows of each set of prompts whose own answers are scored before a run."""


def open_prompts(plan: RunPlan[GrpoConfig]) -> tuple[PromptSet, PromptSet | None]:
    """Prompts to train on, and held-out ones where the run has some.

    Raises:
        UserError: as read_prompt_set, or epochs that do not fill a step.
    """
    data = plan.config.data
    limit = data.max_prompt_length
    train = read_prompt_set(data.train, plan.tokenizer, max_prompt_length=limit)
    num_rollout_steps(plan.config, train)
    if not data.valid:
        return train, None
    return train, read_prompt_set(data.valid, plan.tokenizer, max_prompt_length=limit, key="data.valid")


def num_rollout_steps(config: GrpoConfig, prompts: PromptSet) -> int:
    """Steps of the whole run; under dynamic sampling an epoch counts the prompts of full groups.

    Raises:
        UserError: epochs that do not fill a step.
    """
    return num_training_steps(
        steps=config.train.steps,
        epochs=config.train.epochs,
        num_rows=len(prompts.rows),
        global_size=config.rollout.prompts_per_step,
        size_key="rollout.prompts_per_step",
    )


def check_rows(rewards: Sequence[Reward], *prompts: PromptSet) -> None:
    """Every row holds what the rewards look at, in a form that they can read.

    Raises:
        UserError: names the first row that does not.
    """
    for row in (row for each in prompts for row in each.rows):
        for reward in rewards:
            try:
                reward.check_row(cast(dict[str, Json], row.values))
            except ValueError as error:
                raise UserError(f"{row.source}: {error}") from error


def try_own_answers(rewards: RewardPool, tokenizer: Tokenizer, *prompts: PromptSet) -> None:
    """Score the answers of a few rows of each set as responses; on stderr, the rows on which a reward failed.

    Raises:
        UserError: as check_own_rows.
    """
    rows = [
        OwnRow(
            source=each.rows[place].source,
            prompt=tokenizer.decode(each.rows[place].tokens),
            values=cast(dict[str, Json], each.rows[place].values),
        )
        for each in prompts
        for place in spread(len(each.rows), _NUM_TRIED)
    ]
    for note in check_own_rows(rewards, rows):
        print(f"note: {note}", file=sys.stderr, flush=True)
