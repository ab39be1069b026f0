"""What a step has to work through: micro-batches of one rank, tokens, operations."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_sftrl.config.schema import GrpoConfig, TrainingConfig
from megatron_sftrl.models.architecture import Architecture
from megatron_sftrl.planning.grid import Grid


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One step of `sftrl sft`, or one step of `sftrl grpo` with all its updates.

    Args:
        length: tokens of a sequence, of all of them in an estimate.
        num_microbatches: of one rank in one update.
        microbatch_tokens: filled, over the context-parallel ranks.
        num_updates: optimizer steps.
        num_responses: generated in the step; 0 without rollouts.
    """

    length: int
    num_microbatches: int
    microbatch_tokens: int
    num_updates: int
    num_responses: int


def workload_of(config: TrainingConfig, grid: Grid, *, mean_length: int | None = None) -> Workload:
    """The work of a step when every sequence has `mean_length` tokens, the longest allowed when not given."""
    length = min(mean_length or config.max_length, config.max_length)
    batch = config.batch
    per_microbatch = batch.micro_size
    if batch.max_tokens is not None:
        per_microbatch = max(1, batch.max_tokens // length)
    wave = grid.dp * (grid.pp if grid.vp > 1 else 1)
    groups = _round_up(math.ceil(batch.global_size / per_microbatch), wave)
    responses = updates = 0
    if isinstance(config, GrpoConfig):
        responses = config.rollout.prompts_per_step * config.rollout.group_size
        updates = responses // batch.global_size * config.rollout.passes
    return Workload(
        length=length,
        num_microbatches=groups // grid.dp,
        microbatch_tokens=per_microbatch * length,
        num_updates=updates or 1,
        num_responses=responses,
    )


def block_flops(architecture: Architecture, *, tokens: int, length: int) -> float:
    """Operations of one block's forward, over its tensor and expert ranks: 2 for a weight that a token meets.

    A query meets half of its sequence's keys on average.
    """
    a = architecture
    query, keys = a.num_attention_heads * a.head_dim, a.num_query_groups * a.head_dim
    weights = a.hidden_size * (2 * query + 2 * keys)
    visits = a.mixture.experts_per_token if a.mixture else 1
    weights += visits * 3 * a.hidden_size * a.ffn_hidden_size
    weights += a.hidden_size * a.mixture.num_experts if a.mixture else 0
    return tokens * (2.0 * weights + 2.0 * length * query)


def head_flops(architecture: Architecture, *, tokens: int) -> float:
    """Operations of the forward of the output layer."""
    return 2.0 * tokens * architecture.vocab_size * architecture.hidden_size


def model_flops(architecture: Architecture, *, tokens: int, length: int) -> float:
    """Forward and backward of the policy without recomputation: what a utilisation counts."""
    blocks = architecture.num_layers * block_flops(architecture, tokens=tokens, length=length)
    return 3.0 * (blocks + head_flops(architecture, tokens=tokens))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
