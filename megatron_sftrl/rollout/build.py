"""From a run's rollout section to its engine."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from typing import Any

import torch

from megatron_sftrl.config.placement import with_engine
from megatron_sftrl.config.schema import GrpoConfig
from megatron_sftrl.engine.live_weights import live_weights
from megatron_sftrl.engine.parallel import ParallelContext
from megatron_sftrl.engine.policy import PolicyEngine
from megatron_sftrl.engine.sides import Bridge
from megatron_sftrl.engine.together import SharedProgress
from megatron_sftrl.errors import UserError
from megatron_sftrl.models.architecture import Architecture
from megatron_sftrl.models.engine_shards import EngineLayout, engine_regions
from megatron_sftrl.rollout.api import Decode, RolloutEngine
from megatron_sftrl.rollout.in_process import InProcessEngine
from megatron_sftrl.rollout.reshard import Resharder, ReshardReport, wanted_by
from megatron_sftrl.rollout.separate import RemoteEngine, serve
from megatron_sftrl.rollout.vllm import VllmEngine, beside_trainer
from megatron_sftrl.rollout.vllm_settings import VllmSettings, check_on_cpu, check_vllm

LOGGER = logging.getLogger(__name__)


def engine_here(config: GrpoConfig) -> GrpoConfig:
    """The run with the engine that it generates with on this machine, which the log says.

    Raises:
        UserError: on every rank: rollout.engine is auto, and a setting of the other engine is written.
    """
    has_vllm = importlib.util.find_spec("vllm") is not None
    chosen, why = with_engine(config, is_cuda=torch.cuda.is_available(), has_vllm=has_vllm)
    LOGGER.info("rollout.engine: %s%s", chosen.rollout.engine, f", which auto is here: {why}" if why else "")
    return chosen


def check_engine(
    config: GrpoConfig, architecture: Architecture, device: torch.device, *, world_size: int
) -> None:
    """Refuse an engine that cannot run here, before any model is built; `config` is engine_here's.

    Args:
        world_size: of the job; the engine has rollout.devices of it, where the run says any.
    Raises:
        UserError: on every rank: an engine that is not installed or does not fit ranks or model, or an
            offload without a GPU.
    """
    if config.rollout.offload and device.type != "cuda":
        raise UserError(
            "rollout.offload takes gradients and optimizer state off the GPU while responses are generated, "
            "and this run has no GPU: remove it, or rollout.offload=null on the command line"
        )
    assert config.rollout.engine != "auto", "engine_here() comes first"
    if config.rollout.engine == "vllm":
        _check_router_replay(config, device)
        size = config.rollout.devices or world_size
        check_vllm(_vllm_settings(config), architecture, world_size=size)
        if device.type == "cpu":
            check_on_cpu(architecture, _dtype(config))


def _check_router_replay(config: GrpoConfig, device: torch.device) -> None:
    """Refuse what vLLM cannot tell of its experts."""
    if not config.rollout.router_replay:
        return
    if device.type == "cpu":
        raise UserError(
            "rollout.router_replay: vLLM 0.32 returns the experts of its tokens on GPUs alone (on the CPU it "
            "says: Model Runner V2 requires Triton): use rollout.engine: in_process here"
        )
    if config.rollout.stop:
        raise UserError(
            "rollout.router_replay: vLLM tells the experts of a response at an end token or its last length, "
            "not where a text of rollout.stop ends it: remove rollout.stop, give its tokens as "
            "rollout.stop_ids, or use rollout.engine: in_process"
        )


def remote_engine(
    config: GrpoConfig, policy: PolicyEngine, progress: SharedProgress, bridge: Bridge
) -> RemoteEngine:
    """The generators of rollout.devices, as their trainers see them; collective over the whole job."""
    return RemoteEngine(policy, bridge, progress.moved, **_messages(config))


def serve_trainers(
    config: GrpoConfig,
    architecture: Architecture,
    parallel: ParallelContext,
    decode: Decode,
    progress: SharedProgress,
    bridge: Bridge,
) -> bool:
    """The life of a generator, with an engine of its own; `config` is generators_config's. As serve().

    Raises:
        UserError: on every generator: what check_engine refuses, or not enough memory.
    """
    if config.rollout.engine == "vllm":
        settings = _vllm_settings(config)
        tp_rank = EngineLayout(tp=settings.tp, world_size=parallel.world_size).tp_rank(parallel.rank)
        wanted = engine_regions(architecture, tp=settings.tp, tp_rank=tp_rank)
        resharder = Resharder(None, architecture, wanted, bridge, parallel.device, **_messages(config))
        engine = VllmEngine(architecture, parallel, _dtype(config), resharder, settings, decode, progress)

        def update(version: int) -> ReshardReport | None:
            engine.update(None, version=version)
            return resharder.last_report

    else:
        policy = PolicyEngine(architecture, config, parallel, with_optimizer=False)
        engine = build_engine(config, policy, decode, progress)
        shards = live_weights(policy.chunks, architecture)
        wanted = wanted_by(shards, architecture)
        resharder = Resharder(None, architecture, wanted, bridge, parallel.device, **_messages(config))

        def update(version: int) -> ReshardReport | None:
            resharder.fill(shards)
            engine.update(policy, version=version)
            return resharder.last_report

    with contextlib.closing(engine):
        return serve(bridge, engine, update, progress.moved)


def build_engine(
    config: GrpoConfig, policy: PolicyEngine, decode: Decode, progress: SharedProgress | None = None
) -> RolloutEngine:
    """The engine that rollout.engine names, asleep; every rank calls it. `progress` is told of every token.

    Raises:
        UserError: on every rank: what check_engine refuses, or not enough memory.
    """
    rollout = config.rollout
    if rollout.engine == "in_process":
        # An evaluation of many prompts keeps to the memory that training steps have, and that `plan` counts.
        num_responses, num_prompts = rollout.in_flight(policy.parallel.dp_size)
        return InProcessEngine(
            policy.parallel,
            max_responses=num_responses,
            max_prompts=num_prompts,
            decode=decode,
            progress=progress,
        )
    # vLLM measures what it may take: what will leave while it generates must not be in its way now.
    with policy.lent_memory(offload=rollout.offload):
        return beside_trainer(policy, _vllm_settings(config), decode, progress)


def _vllm_settings(config: GrpoConfig) -> VllmSettings:
    vllm = config.rollout.vllm
    return VllmSettings(
        tp=vllm.tp,
        max_model_len=config.max_length,
        max_num_seqs=vllm.max_num_seqs,
        gpu_memory_utilization=vllm.gpu_memory_utilization,
        enforce_eager=vllm.enforce_eager,
        returns_experts=config.rollout.router_replay,
        bucket_bytes=vllm.bucket_mb * 2**20,
        has_checksums=vllm.checksums,
    )


def _dtype(config: GrpoConfig) -> torch.dtype:
    """Of the weights that engines get."""
    return torch.bfloat16 if config.model.dtype == "bf16" else torch.float32


def _messages(config: GrpoConfig) -> dict[str, Any]:
    """Of weights on their way to generators."""
    vllm = config.rollout.vllm
    return {"bucket_bytes": vllm.bucket_mb * 2**20, "has_checksums": vllm.checksums}
