"""The process grid: built once, then handed around; nothing in the package asks a global for its rank."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatron_sftrl.config.schema import ParallelSection, TrainingConfig
from megatron_sftrl.engine import cpu_backend
from megatron_sftrl.engine.determinism import choose_kernels
from megatron_sftrl.engine.device import order_launches, select_device, start_torch_distributed
from megatron_sftrl.errors import UserError

if TYPE_CHECKING:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelContext:
    """This process's place in the tp x cp x dp x pp grid, and in the experts' own grid over the same ranks.

    A mixture's experts are laid out as etp x ep x edp x pp: the tp * cp * dp ranks of a pipeline stage are
    dealt out again, so an ep group spans ranks that hold different tokens (dp, cp, and tp where etp < tp).

    Args:
        rank, world_size: in the whole job, or on this side of it (engine/sides.py).
        dp_cp_group: the ranks that hold different tokens of one step for the same weights.
        ep_group: the ranks among which the experts are spread; it exchanges tokens in every forward, so all
            of its ranks run the same number of micro-batches.
        ep_rank, ep_size: rank r holds experts [r * E / ep, (r + 1) * E / ep).
        edp_group: the ranks that hold the same experts.
        etp_group: the ranks that hold the slices of the same experts, and see the same tokens there.
        etp_rank, etp_size: place of this rank's slice in each of its experts.
        vp_size: model chunks on this pipeline stage.
        timeout: after which a collective that waits for a rank fails; for groups that are made later.
    """

    rank: int
    world_size: int
    device: torch.device
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    dp_cp_group: dist.ProcessGroup
    ep_group: dist.ProcessGroup
    edp_group: dist.ProcessGroup
    etp_group: dist.ProcessGroup
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    vp_size: int
    cp_rank: int
    cp_size: int
    dp_rank: int
    dp_size: int
    ep_rank: int
    ep_size: int
    etp_rank: int
    etp_size: int
    sequence_parallel: bool
    timeout: timedelta

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def last_stage_rank(self) -> int:
        """Global rank of the last stage of this rank's pipeline."""
        return dist.get_global_rank(self.pp_group, self.pp_size - 1)


_HANG_MINUTES = 30.0
_SECONDS_BEHIND_THE_WATCH = 30
_NEVER = timedelta(days=3650)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """Processes that make up one default group: this one's number, how many, and where they meet."""

    rank: int
    world_size: int
    store: dist.Store


def initialize_parallel(
    section: ParallelSection,
    *,
    hang_minutes: float = _HANG_MINUTES,
    deterministic: bool = False,
    ranks: Ranks | None = None,
) -> ParallelContext:
    """Start torch.distributed (NCCL where CUDA is there, else gloo) and Megatron's process groups.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT as torchrun sets them; without them the
    job is this one process.

    Args:
        hang_minutes: train.hang_minutes. Collectives wait a little longer: the watch over the run shows every
            rank's stacks, a collective that fails shows one. 0: they wait for ever.
        deterministic: train.deterministic, for this process.
        ranks: of the job whose half this is; else the environment says them.
    Raises:
        UserError: the world size is not a multiple of tp * pp * cp, or of etp * ep * pp; an environment
            that contradicts `deterministic`.
    """
    order_launches(section)
    cpu_backend.install()
    from megatron.core import parallel_state

    rank = ranks.rank if ranks else int(os.environ.get("RANK", "0"))
    world_size = ranks.world_size if ranks else int(os.environ.get("WORLD_SIZE", "1"))
    _check_world(section, world_size)
    choose_kernels(deterministic=deterministic)
    device = select_device()
    timeout = timedelta(minutes=hang_minutes, seconds=_SECONDS_BEHIND_THE_WATCH) if hang_minutes else _NEVER
    if not dist.is_initialized():
        # One process without torchrun: a store in this process, so that no port is needed.
        is_alone = world_size == 1 and "MASTER_ADDR" not in os.environ
        store = ranks.store if ranks else dist.HashStore() if is_alone else None
        start_torch_distributed(device, rank=rank, world_size=world_size, timeout=timeout, store=store)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=section.tp,
        pipeline_model_parallel_size=section.pp,
        virtual_pipeline_model_parallel_size=section.vp if section.vp > 1 else None,
        context_parallel_size=section.cp,
        expert_model_parallel_size=section.ep,
        expert_tensor_parallel_size=section.etp or section.tp,
        distributed_timeout_minutes=timeout / timedelta(minutes=1),  # type: ignore[arg-type]
        create_gloo_process_groups=False,
    )
    _seed_rng_tracker()
    return ParallelContext(
        rank=rank,
        world_size=world_size,
        device=device,
        tp_group=_group(parallel_state.get_tensor_model_parallel_group()),
        pp_group=_group(parallel_state.get_pipeline_model_parallel_group()),
        cp_group=_group(parallel_state.get_context_parallel_group()),
        dp_group=_group(parallel_state.get_data_parallel_group()),
        dp_cp_group=_group(parallel_state.get_data_parallel_group(with_context_parallel=True)),
        ep_group=_group(parallel_state.get_expert_model_parallel_group()),
        edp_group=_group(parallel_state.get_expert_data_parallel_group()),
        etp_group=_group(parallel_state.get_expert_tensor_parallel_group()),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=section.tp,
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=section.pp,
        vp_size=section.vp,
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=section.cp,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=world_size // (section.tp * section.pp * section.cp),
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        ep_size=section.ep,
        etp_rank=_group(parallel_state.get_expert_tensor_parallel_group()).rank(),
        etp_size=section.etp or section.tp,
        sequence_parallel=section.sequence_parallel,
        timeout=timeout,
    )


def _check_world(section: ParallelSection, world_size: int) -> None:
    model_size = section.tp * section.pp * section.cp
    if world_size % model_size != 0:
        raise UserError(
            f"{world_size} processes cannot hold tp {section.tp} x pp {section.pp} x cp {section.cp}: "
            f"start a multiple of {model_size} processes"
        )
    etp = section.etp or section.tp
    expert_size = etp * section.ep * section.pp
    if world_size % expert_size != 0:
        raise UserError(
            f"{world_size} processes cannot hold experts at etp {etp} x ep {section.ep} x pp {section.pp}: "
            f"start a multiple of {math.lcm(model_size, expert_size)} processes"
        )


@contextlib.contextmanager
def parallel_context(
    section: ParallelSection,
    *,
    hang_minutes: float = _HANG_MINUTES,
    deterministic: bool = False,
    ranks: Ranks | None = None,
) -> Iterator[ParallelContext]:
    """initialize_parallel, and its end when the block ends well.

    A rank that fails leaves at once instead: its peers may stand in a collective, and torchrun ends them.
    """
    context = initialize_parallel(
        section, hang_minutes=hang_minutes, deterministic=deterministic, ranks=ranks
    )
    try:
        yield context
    except BaseException:
        if context.world_size == 1:
            destroy_parallel()
        raise
    destroy_parallel()


def run_context(
    config: TrainingConfig, ranks: Ranks | None = None
) -> contextlib.AbstractContextManager[ParallelContext]:
    """parallel_context of a run."""
    train = config.train
    return parallel_context(
        config.parallel, hang_minutes=train.hang_minutes, deterministic=train.deterministic, ranks=ranks
    )


def destroy_parallel() -> None:
    """Take down Megatron's groups and torch.distributed; without it gloo may hang at exit."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _group(group: object) -> dist.ProcessGroup:
    """Megatron's getters are typed more loosely than what they return here."""
    assert isinstance(group, dist.ProcessGroup)
    return group


def rng_tracker() -> CudaRNGStatesTracker:
    """Megatron's named streams of random numbers, which recomputation winds back and checkpoints hold."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    tracker = get_cuda_rng_tracker()
    assert tracker is not None
    return tracker


def _seed_rng_tracker() -> None:
    """Megatron forks its RNG tracker in sequence-parallel regions even when nothing draws from it.

    No number depends on the seed: dropout is 0 in every family here, and initialize_weights and adapters
    have their own.
    """
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    model_parallel_cuda_manual_seed(1)
