"""Log-probabilities of learned tokens under the policy, collected from all ranks."""

from __future__ import annotations

import math

import torch.distributed as dist

from megatron_sftrl.data.loader import StepData
from megatron_sftrl.engine.policy import PolicyEngine


def score_responses(
    policy: PolicyEngine, data: StepData, *, temperature: float = 1.0
) -> dict[int, list[float]]:
    """Score the learned tokens of every sequence of a step; every rank calls it and gets all of them.

    Args:
        policy: the model.
        data: this rank's micro-batches.
        temperature: logits are divided by it.
    Returns:
        By row of the step: nats of each learned token, in order.
    Raises:
        FloatingPointError: on every rank: some that are NaN or infinite.
    """
    parallel = policy.parallel
    mine: dict[int, list[float]] = {}
    with policy.evaluation():
        logprobs = policy.logprobs(data.batches, temperature=temperature)
    # Empty on all but the last pipeline stage.
    if logprobs:
        for values, batch, rows in zip(
            logprobs, data.batches, data.microbatch_rows[parallel.dp_rank], strict=True
        ):
            starts = batch.cu_seqlens.tolist()
            whole, mask = values.cpu(), batch.loss_mask
            for row, start, stop in zip(rows, starts, starts[1:], strict=False):
                mine[row] = whole[start:stop][mask[start:stop]].tolist()
    shares: list[dict[int, list[float]] | None] = [None] * parallel.world_size
    dist.all_gather_object(shares, mine)
    bad = [rank for rank, share in enumerate(shares) if not all(map(_is_finite, (share or {}).values()))]
    if bad:
        raise FloatingPointError(
            f"log-probabilities under the policy are NaN or infinite, on rank {', '.join(map(str, bad))}"
        )
    return {row: values for share in shares if share for row, values in share.items()}


def _is_finite(values: list[float]) -> bool:
    return all(map(math.isfinite, values))
