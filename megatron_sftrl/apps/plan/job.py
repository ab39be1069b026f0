"""What a plan is made for: the machine, and the work of one step."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields

from megatron_sftrl.apps.plan.activations import Kernels
from megatron_sftrl.apps.plan.model_state import Grid
from megatron_sftrl.config.schema import TrainingConfig
from megatron_sftrl.errors import UserError
from megatron_sftrl.models.architecture import (
    DELTA_CHUNK,
    Architecture,
    delta_net_matrices,
    latent_matrices,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One step of `sftrl sft`, or one step of `sftrl grpo` with all its updates.

    Args:
        length: tokens of a sequence, of all of them in an estimate.
        num_microbatches: of one rank in one optimizer step.
        microbatch_tokens: filled, over the context-parallel ranks.
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
        per_microbatch = max(1, int(batch.max_tokens / _computed_tokens(config, length)))
    wave = grid.dp * (grid.pp if grid.vp > 1 else 1)
    groups = _round_up(math.ceil(batch.global_size / per_microbatch), wave)
    responses = updates = 0
    if (grpo := config.grpo) is not None:
        responses = grpo.rollout.prompts_per_step * grpo.rollout.group_size
        updates = responses // batch.global_size * grpo.rollout.passes
    return Workload(
        length=length,
        num_microbatches=groups // grid.dp,
        microbatch_tokens=math.ceil(per_microbatch * _computed_tokens(config, length)),
        num_updates=updates or 1,
        num_responses=responses,
    )


def _computed_tokens(config: TrainingConfig, length: int) -> float:
    """Of a sequence of so many in an update: of a shared prompt, in proportion to its longest, a G-th."""
    grpo = config.grpo
    if grpo is None or not grpo.rollout.share_prompts:
        return length
    prompt = length * grpo.data.max_prompt_length / grpo.max_length
    return length - prompt * (1 - 1 / grpo.rollout.group_size)


def block_flops(architecture: Architecture, *, tokens: int, length: int) -> float:
    """Operations of one block's forward over its ranks: attention, and 2 for a weight that a token meets.

    The mean over the blocks, where they are of several kinds.
    """
    a = architecture
    query, keys = a.num_attention_heads * a.head_dim, a.num_query_groups * a.head_dim
    matrices = a.hidden_size * ((2 + a.has_output_gate) * query + 2 * keys)
    if a.latent is not None:
        matrices = latent_matrices(a, a.latent)
    elif a.delta_net is not None:
        attending = a.share_attending
        matrices = attending * matrices + (1 - attending) * delta_net_matrices(a, a.delta_net)
    return (
        tokens * 2.0 * matrices
        + attention_flops(a, tokens=tokens, length=length)
        + mlp_flops(a, tokens=tokens)
    )


def attention_flops(architecture: Architecture, *, tokens: int, length: int) -> float:
    """Of scores and their sums over values; a query meets half of its sequence's keys on average. Of a hybrid
    the mean with its gated delta nets.
    """
    a = architecture
    scores = float(tokens * length * a.num_attention_heads * (a.head_dim + a.value_dim))
    if (net := a.delta_net) is None:
        return scores
    # Of a token with its matrix: read, corrected, asked; and with the chunk that it is in.
    each = 2 * net.key_dim * net.value_dim * 3 + 2 * DELTA_CHUNK * (2 * net.key_dim + net.value_dim)
    return a.share_attending * scores + (1 - a.share_attending) * tokens * float(net.num_value_heads * each)


def mlp_flops(architecture: Architecture, *, tokens: int) -> float:
    """Of the MLP, or of the router and the experts that a token visits; the mean over the blocks."""
    a = architecture
    if (mixture := a.mixture) is None:
        return tokens * 6.0 * a.hidden_size * a.ffn_hidden_size
    width = mixture.experts_per_token * 3 * a.ffn_hidden_size + mixture.num_experts
    if mixture.shared_width:
        width += 3 * mixture.shared_width + mixture.shared_is_gated
    dense = a.num_dense_layers / a.num_layers
    return tokens * 2.0 * a.hidden_size * ((1 - dense) * width + dense * 3 * mixture.dense_width)


def head_flops(architecture: Architecture, *, tokens: int) -> float:
    """Operations of the forward of the output layer."""
    return 2.0 * tokens * architecture.vocab_size * architecture.hidden_size


def model_flops(architecture: Architecture, *, tokens: int, length: int, has_frozen_matrices: bool) -> float:
    """Forward and backward of the policy without recomputation: what a utilisation counts.

    A frozen matrix has no gradient: two products of its three.
    """
    forward = architecture.num_layers * block_flops(architecture, tokens=tokens, length=length)
    forward += head_flops(architecture, tokens=tokens)
    attention = architecture.num_layers * attention_flops(architecture, tokens=tokens, length=length)
    return 3.0 * forward - (forward - attention if has_frozen_matrices else 0.0)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


_UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """GPUs in nodes at stated rates, none looked up; the defaults: H100 SXM with one 400 Gbit/s port a GPU.

    Args:
        gpu_memory: bytes of one GPU.
        reserve: of them for CUDA, cuBLAS and NCCL, and for what the allocator cannot use, bytes.
        gpus_per_node: joined by NVLink.
        peak_flops, fp8_flops: of one GPU on dense matrices of bf16 and of eight bits, per second.
        nvlink, network, host_link: bytes per second of one GPU in one direction: inside the node, between
            nodes, to the memory of the host.
        memory_bandwidth, host_memory: of the GPU, and of the host for each GPU, bytes per second.
        efficiency: share of these that kernels reach.
        link_efficiency: share of the links' rates that collectives reach.
        kernels: whose layers run.
    Raises:
        UserError: a rate or size that is not positive, an efficiency above 1.
    """

    gpu_memory: float
    reserve: float = 6e9
    gpus_per_node: int = 8
    peak_flops: float = 989e12
    fp8_flops: float = 1979e12
    nvlink: float = 450e9
    network: float = 50e9
    host_link: float = 10e9
    host_memory: float = 75e9
    memory_bandwidth: float = 3.35e12
    efficiency: float = 0.6
    link_efficiency: float = 0.8
    kernels: Kernels = "transformer_engine"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "kernels":
                continue
            most = 1.0 if "efficiency" in field.name else math.inf
            if not 0 < value <= most:
                limits = "between 0 and 1" if most == 1 else "above 0"
                raise UserError(f"{field.name.replace('_', ' ')}: expected a number {limits}, got {value}")

    def link(self, *, stride: int, size: int) -> float:
        """Bytes per second in a group of `size` ranks that stand `stride` apart: of its slowest link."""
        is_inside = stride * size <= self.gpus_per_node
        return (self.nvlink if is_inside else self.network) * self.link_efficiency


def parse_bytes(text: str) -> float:
    """Bytes of "80GB" (10^9 each) or "80GiB" (2^30 each); UserError without a number and a unit."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]i?B)", text.strip())
    if match is None or float(match[1]) == 0:
        raise UserError(f"expected a size such as 80GB or 80GiB, got {text!r}")
    return float(match[1]) * _UNITS[match[2]]
