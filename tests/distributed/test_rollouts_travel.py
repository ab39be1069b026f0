"""Every rank gets the rollouts of every replica, each of them once, however long those of others are."""

from __future__ import annotations

import pickle
from itertools import chain
from typing import Any

import numpy as np
import pytest
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_sftrl.types import Rollout
from tests.ranks import RankError, run_ranks

TP, WORLD_SIZE, NUM_PROMPTS, SIZE = 2, 4, 5, 3


class ReceivedBytes(TorchDispatchMode):
    """Bytes of all tensors that collectives write to."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.total += sum(each.nbytes for each in tree_leaves(args[0]))
        return func(*args, **(kwargs or {}))


def rollouts_to(prompt: int) -> tuple[Rollout, ...]:
    """The first replica's are a hundred times as long as the second's."""
    length = 2_000 if prompt % (WORLD_SIZE // TP) == 0 else 20
    return tuple(
        Rollout(
            prompt_tokens=(prompt,),
            response_tokens=tuple(range(sample, sample + length)),
            logprobs=(-0.5 - sample,) * length,
            is_finished=True,
            experts=np.full((length, 3, 2), (prompt + sample) % 256, np.uint8),
        )
        for sample in range(SIZE)
    )


def gather(disturbed_rank: int) -> tuple[list[tuple[Rollout, ...]], int]:
    import torch.distributed as dist

    from megatron_sftrl.models.engine_shards import EngineLayout
    from megatron_sftrl.rollout.vllm import all_rollouts, share_of

    rank, layout = dist.get_rank(), EngineLayout(tp=TP, world_size=WORLD_SIZE)
    mine = [each for prompt in share_of(NUM_PROMPTS, layout, rank) for each in rollouts_to(prompt)]
    if rank == disturbed_rank:
        mine.reverse()
    with ReceivedBytes() as received:
        groups = all_rollouts(mine, layout, rank, num_prompts=NUM_PROMPTS, size=SIZE)
    return groups, received.total


def test_every_rank_gets_all_rollouts_and_the_bytes_of_each_once() -> None:
    expected = [rollouts_to(prompt) for prompt in range(NUM_PROMPTS)]
    size = len(pickle.dumps(expected))
    for groups, received in run_ranks(WORLD_SIZE, gather, -1):
        assert groups == expected
        for ours, theirs in zip(chain(*groups), chain(*expected), strict=True):
            np.testing.assert_array_equal(ours.experts, theirs.experts, strict=True)
        assert received < 1.5 * size


def test_ranks_of_an_engine_that_drew_different_tokens_are_found() -> None:
    with pytest.raises(RankError, match=r"ranks \(2, 3\) are one engine and drew different tokens"):
        run_ranks(WORLD_SIZE, gather, 3)
