"""Rewards of responses: what they are given and return, their registry, one reward per file, and the workers.

Importing this folder registers the rewards below; it loads neither torch nor a verifier's library.
"""

from megatron_sftrl.rl.rewards import exact_match, format, length, math, reasoning_gym
from megatron_sftrl.rl.rewards.api import Canary, RewardConfig, RewardInputs, RewardOutput
from megatron_sftrl.rl.rewards.canary import check_canaries, constant_answers
from megatron_sftrl.rl.rewards.own_rows import OwnRow, check_own_rows, spread
from megatron_sftrl.rl.rewards.pool import RewardPool
from megatron_sftrl.rl.rewards.registry import Reward, build_rewards, register_reward
from megatron_sftrl.rl.rewards.scored import (
    Part,
    Scored,
    describe_failures,
    failed_everywhere,
    reward_metrics,
)

BUILT_IN = (exact_match, format, length, math, reasoning_gym)

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
    "build_rewards",
    "check_canaries",
    "check_own_rows",
    "constant_answers",
    "describe_failures",
    "failed_everywhere",
    "register_reward",
    "reward_metrics",
    "spread",
]
