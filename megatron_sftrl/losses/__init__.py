"""The objectives: what they are given and return, their registry, and one algorithm per file.

Importing this folder registers the algorithms below.
"""

from megatron_sftrl.losses import anchored, curiosft, gift, grpo, likelihood, pear, ts_opsd
from megatron_sftrl.losses.api import LossConfig, LossInputs, LossOptions, LossOutput, token_weights
from megatron_sftrl.losses.registry import Loss, build_loss, register_loss
from megatron_sftrl.vocab_parallel.one_pass import weighted_sum

ALGORITHMS = (anchored, curiosft, gift, grpo, likelihood, pear, ts_opsd)

__all__ = [
    "ALGORITHMS",
    "Loss",
    "LossConfig",
    "LossInputs",
    "LossOptions",
    "LossOutput",
    "build_loss",
    "register_loss",
    "token_weights",
    "weighted_sum",
]
