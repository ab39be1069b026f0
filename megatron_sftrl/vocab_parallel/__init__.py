"""Distributions over a vocabulary split over tensor-parallel ranks, and every collective they need."""

from megatron_sftrl.vocab_parallel.distribution import (
    SmoothedLabels,
    TiltedTarget,
    TokenDistribution,
    logprobs_together,
)
from megatron_sftrl.vocab_parallel.evaluation import TopLogits
from megatron_sftrl.vocab_parallel.output_layer import OutputLayer

__all__ = [
    "OutputLayer",
    "SmoothedLabels",
    "TiltedTarget",
    "TokenDistribution",
    "TopLogits",
    "logprobs_together",
]
