"""This rank's columns, which no loss should know of: planted defects reach for them as a user might."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from megatron_sftrl import TokenDistribution


def columns_of(distribution: TokenDistribution) -> tuple[Tensor, int, dist.ProcessGroup | None]:
    """[T, V_local] logits with their padding, how many columns are real, and the tensor-parallel group."""
    source = distribution._source
    return source.logits, source.shard.num_columns, source.shard.group
