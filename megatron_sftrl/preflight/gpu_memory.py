"""The model's state against the memory of a GPU: what can never fit is told before anything is built."""

from __future__ import annotations

import torch

from megatron_sftrl.config.schema import TrainingConfig
from megatron_sftrl.models.architecture import Architecture
from megatron_sftrl.planning.grid import grid_of
from megatron_sftrl.planning.model_state import model_state


def own_gpu_bytes() -> int | None:
    """Memory of this node's first GPU; None without one."""
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def memory_problem(
    config: TrainingConfig, architecture: Architecture, *, world_size: int, gpu_bytes: int | None
) -> tuple[str, str | None]:
    """(what was seen, what is wrong): a lower bound, without activations, which `sftrl plan` estimates.

    Args:
        config: of a run that its own checks have accepted.
        architecture: of its model.
        world_size: processes, one a GPU.
        gpu_bytes: of the GPU that this process has; None on the CPU.
    """
    grid = grid_of(config.parallel, world_size)
    is_offloaded = config.reference is not None and config.reference.placement == "offload"
    needed = 0
    for stage in range(grid.pp):
        state = model_state(architecture, config, grid, stage=stage)
        reference = 0 if is_offloaded else state.reference
        needed = max(needed, state.parameters + state.gradients + state.optimizer + reference)
    detail = f"weights, gradients and optimizer state take {needed / 1e9:.2f} GB a process"
    if gpu_bytes is None or needed < gpu_bytes:
        return detail, None
    return detail, (
        f"{detail}, its GPU has {gpu_bytes / 1e9:.2f} GB: take more GPUs, or cut the model further "
        "(parallel.tp, parallel.pp, parallel.distributed_optimizer); sftrl plan --search finds layouts"
    )
