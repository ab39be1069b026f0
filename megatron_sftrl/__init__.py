"""SFT that prepares for RL, on Megatron-Core.

The names below are the interface for code outside of the package: write a loss, build one, call it.
"""

from megatron_sftrl.losses import LossConfig, LossInputs, LossOutput, build_loss, register_loss
from megatron_sftrl.types import TokenBatch
from megatron_sftrl.vocab_parallel import TokenDistribution

__version__ = "0.1.0"

__all__ = [
    "LossConfig",
    "LossInputs",
    "LossOutput",
    "TokenBatch",
    "TokenDistribution",
    "__version__",
    "build_loss",
    "register_loss",
]
