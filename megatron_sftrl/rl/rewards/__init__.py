"""Rewards of responses: what they are given and return, their registry, one reward per file, and the workers.

Importing this folder registers the rewards below; it loads neither torch nor a verifier's library.
"""

from megatron_sftrl.rl.rewards import choice, math, reasoning_gym, text
from megatron_sftrl.rl.rewards.checks import (
    OwnRow,
    check_canaries,
    check_own_rows,
    constant_answers,
    spread,
    unearned_marks,
)
from megatron_sftrl.rl.rewards.pool import RewardPool, Scoring
from megatron_sftrl.rl.rewards.registry import (
    Canary,
    Part,
    Reward,
    RewardConfig,
    RewardInputs,
    RewardOutput,
    Scored,
    build_rewards,
    describe_failures,
    failed_everywhere,
    register_reward,
    reward_metrics,
)

BUILT_IN = (choice, math, reasoning_gym, text)

__all__ = [
    "BUILT_IN",
    "Canary",
    "OwnRow",
    "Part",
    "Reward",
    "RewardConfig",
    "RewardInputs",
    "RewardOutput",
    "RewardPool",
    "Scored",
    "Scoring",
    "build_rewards",
    "check_canaries",
    "check_own_rows",
    "constant_answers",
    "describe_failures",
    "failed_everywhere",
    "register_reward",
    "reward_metrics",
    "spread",
    "unearned_marks",
]
