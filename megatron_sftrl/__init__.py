"""SFT that prepares for RL, on Megatron-Core.

The names below are the interface for code outside of the package: write a loss or a reward, build a loss,
call it.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_sftrl.losses import (
        LossConfig,
        LossInputs,
        LossOptions,
        LossOutput,
        build_loss,
        register_loss,
    )
    from megatron_sftrl.rl.rewards import Canary, RewardConfig, RewardInputs, RewardOutput, register_reward
    from megatron_sftrl.types import TokenBatch
    from megatron_sftrl.vocab_parallel import TokenDistribution

__version__ = "0.1.0"

__all__ = [
    "Canary",
    "LossConfig",
    "LossInputs",
    "LossOptions",
    "LossOutput",
    "RewardConfig",
    "RewardInputs",
    "RewardOutput",
    "TokenBatch",
    "TokenDistribution",
    "__version__",
    "build_loss",
    "register_loss",
    "register_reward",
]

_HOMES = {
    "losses": ("LossConfig", "LossInputs", "LossOptions", "LossOutput", "build_loss", "register_loss"),
    "rl.rewards": ("Canary", "RewardConfig", "RewardInputs", "RewardOutput", "register_reward"),
    "types": ("TokenBatch",),
    "vocab_parallel": ("TokenDistribution",),
}


def __getattr__(name: str) -> object:
    # On first use, not on import (PEP 562): reward workers import this package and must stay without torch,
    # whose libraries take a second to load and gigabytes of address space.
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"megatron_sftrl.{home}"), name)
    raise AttributeError(f"module 'megatron_sftrl' has no attribute {name!r}")
