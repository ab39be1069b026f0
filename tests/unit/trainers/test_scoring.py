"""Log-probabilities that are not finite are refused by every rank, with the one that computed them."""

from __future__ import annotations

import contextlib
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_sftrl.types import TokenBatch
from tests.ranks import run_ranks


def said_of(value: float) -> str:
    """What is said when rank 1 computes `value` for a learned token, and NaN where nothing is learned."""
    import torch.distributed as dist

    from megatron_sftrl.trainers.experience import score_responses

    rank = dist.get_rank()
    numbers = torch.tensor([math.nan, value if rank == 1 else -1.0, -2.0])
    ids = torch.arange(3)
    batch = TokenBatch(
        tokens=ids,
        labels=ids,
        positions=ids,
        loss_mask=torch.tensor([False, True, True]),
        cu_seqlens=torch.tensor([0, 3]),
        token_weight=torch.zeros(3),
    )
    data: Any = SimpleNamespace(batches=[batch], microbatch_rows=[[[rank]], [[rank]]])
    policy: Any = SimpleNamespace(
        parallel=SimpleNamespace(world_size=2, dp_rank=rank),
        evaluation=contextlib.nullcontext,
        token_numbers=lambda batches, ask, reference: [numbers[None]],
    )
    try:
        return str(score_responses(policy, data))
    except FloatingPointError as error:
        return str(error)


@pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf])
def test_a_score_that_is_not_finite_is_refused_on_every_rank_by_the_rank_it_comes_from(value: float) -> None:
    expected = "log-probabilities under the policy are NaN or infinite, on rank 1"
    assert run_ranks(2, said_of, value) == [expected] * 2


def test_what_is_not_learned_may_be_anything() -> None:
    assert run_ranks(2, said_of, -3.0) == ["{0: [-1.0, -2.0], 1: [-3.0, -2.0]}"] * 2
