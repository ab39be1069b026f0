"""Distributions over a vocabulary split over tensor-parallel ranks, and every collective they need."""

from megatron_sftrl.vocab_parallel.distribution import TokenDistribution, logprobs_together
from megatron_sftrl.vocab_parallel.output_layer import OutputLayer
from megatron_sftrl.vocab_parallel.targets import SmoothedLabels, TiltedTarget
from megatron_sftrl.vocab_parallel.top_k import TopLogits

__all__ = [
    "OutputLayer",
    "SmoothedLabels",
    "TiltedTarget",
    "TokenDistribution",
    "TopLogits",
    "logprobs_together",
]
