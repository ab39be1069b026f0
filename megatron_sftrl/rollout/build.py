"""From a run's rollout section to its engine."""

from __future__ import annotations

from megatron_sftrl.config.grpo import GrpoConfig
from megatron_sftrl.engine.policy import PolicyEngine
from megatron_sftrl.rollout.api import RolloutEngine
from megatron_sftrl.rollout.in_process import InProcessEngine
from megatron_sftrl.rollout.vllm_colocated import VllmEngine
from megatron_sftrl.rollout.vllm_settings import VllmSettings


def build_engine(config: GrpoConfig, policy: PolicyEngine) -> RolloutEngine:
    """The engine that rollout.engine names; every rank calls it.

    Raises:
        ValueError: on every rank: an engine that is not installed, or does not fit ranks, model or memory.
    """
    rollout = config.rollout
    if rollout.engine == "in_process":
        return InProcessEngine(policy.parallel, max_responses=rollout.max_concurrent)
    return VllmEngine(
        policy,
        VllmSettings(
            tp=rollout.vllm.tp,
            max_model_len=config.max_length,
            max_num_seqs=rollout.vllm.max_num_seqs,
            gpu_memory_utilization=rollout.vllm.gpu_memory_utilization,
            enforce_eager=rollout.vllm.enforce_eager,
            bucket_bytes=rollout.vllm.bucket_mb * 2**20,
            has_checksums=rollout.vllm.checksums,
        ),
    )
