"""The rank workers of the test session: the pool of megatron_sftrl/apps/doctor/ranks.py, kept until the end.

assert run_ranks(2, total, 3) == [6, 6]           # total: a module-level function, see the pool
"""

from __future__ import annotations

import atexit
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_sftrl.apps.doctor.ranks import RankError, RankPool, free_port

__all__ = ["LATE_IMPORTS", "POOL", "ROOT", "RankError", "close_ranks", "end_groups", "free_port", "run_ranks"]

ROOT = Path(__file__).resolve().parents[1]
# What the first tokenizer and the first optimizer of a process import: seconds of every worker.
LATE_IMPORTS = ("torch._dynamo", "transformers.tokenization_utils_tokenizers")
POOL = RankPool(imports=LATE_IMPORTS)
atexit.register(POOL.close)


def run_ranks(
    world_size: int, function: Callable, *args: Any, timeout_s: float = 300, group: bool = True
) -> list[Any]:
    """`RankPool.run` on the session's workers; the limit only ends what hangs, on a busy machine."""
    return POOL.run(world_size, function, *args, timeout_s=timeout_s, group=group)


def close_ranks() -> None:
    """Kill the workers; the next `run_ranks` starts new ones."""
    POOL.close()


def end_groups() -> None:
    """Between two models of one call, on every rank: Megatron's groups end, and the threads that poll."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    dist.barrier()  # a rank that ended one early would break the connections of the others
    parallel_state.destroy_model_parallel()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    gc.collect()
