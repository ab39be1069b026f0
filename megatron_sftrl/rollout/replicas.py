"""Prompts dealt to engines that generate side by side, and their responses brought together again."""

from __future__ import annotations

import torch.distributed as dist

from megatron_sftrl.models.engine_shards import EngineLayout
from megatron_sftrl.types import Rollout


def share_of(num_prompts: int, layout: EngineLayout, rank: int) -> range:
    """Numbers of the prompts that the replica of `rank` continues: every num_replicas-th."""
    return range(layout.replica(rank), num_prompts, layout.num_replicas)


def all_rollouts(
    mine: list[Rollout], layout: EngineLayout, rank: int, *, num_prompts: int, size: int
) -> list[tuple[Rollout, ...]]:
    """The groups of all prompts, in order, on every rank; collective over the whole job.

    Args:
        mine: this rank's, `size` for each prompt of share_of(); the ranks of a replica have the same.
        layout: of the engines.
        rank: in the job.
        num_prompts: of all replicas.
        size: rollouts of a prompt.
    """
    is_first = layout.tp_rank(rank) == 0
    drawn = hash(tuple(rollout.response_tokens for rollout in mine))
    everyone: list[tuple[int, list[Rollout]]] = [None] * layout.world_size  # type: ignore[list-item]
    dist.all_gather_object(everyone, (drawn, mine if is_first else []))
    groups: dict[int, tuple[Rollout, ...]] = {}
    for replica in range(layout.num_replicas):
        ranks = layout.replica_ranks(replica)
        tokens = {everyone[each][0] for each in ranks}
        assert len(tokens) == 1, f"ranks {ranks} are one engine and drew different tokens"
        rollouts = everyone[ranks[0]][1]
        for index, prompt in enumerate(share_of(num_prompts, layout, ranks[0])):
            groups[prompt] = tuple(rollouts[index * size : (index + 1) * size])
    return [groups[prompt] for prompt in range(num_prompts)]
