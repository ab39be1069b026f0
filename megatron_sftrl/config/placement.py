"""Where and with what a run generates: the engine that rollout.engine: auto is, and what generators run."""

from __future__ import annotations

from megatron_sftrl.config.schema import GrpoConfig, ParallelSection
from megatron_sftrl.errors import UserError


def with_engine(
    config: GrpoConfig, *, is_cuda: bool, has_vllm: bool, place: str = "here"
) -> tuple[GrpoConfig, str]:
    """The run with the engine that it generates with on such a machine, and why ("" where the run says it).

    `place` is how messages call the machine.

    Raises:
        UserError: rollout.engine is auto, and a setting of the engine that it is not is written.
    """
    rollout = config.rollout
    if rollout.engine != "auto":
        return config, ""
    if is_cuda and has_vllm and not config.train.deterministic:
        engine, idle, why = "vllm", "max_concurrent", "CUDA and vLLM are there"
    else:
        engine, idle = "in_process", "vllm"
        why = "vLLM is not installed" if is_cuda else "there is no CUDA device"
        if is_cuda and has_vllm:
            why = "train.deterministic does not cover vLLM"
    if idle in rollout.model_fields_set:
        raise UserError(
            f"rollout.{idle} has no effect: rollout.engine is auto, and that is {engine} {place}, since "
            f"{why}; write the engine that you want, or remove it (rollout.{idle}=null on the command line)"
        )
    chosen = rollout.model_copy(update={"engine": engine})
    return config.model_copy(update={"rollout": chosen}), why


def generators_config(config: GrpoConfig, *, is_mixture: bool) -> GrpoConfig:
    """The run as the processes of rollout.devices see it: a layout of their own, and whole weights alone."""
    tp = config.rollout.tp
    layout = ParallelSection(tp=tp, sequence_parallel=tp > 1 and is_mixture)
    return config.model_copy(update={"parallel": layout, "lora": None, "reference": None})
