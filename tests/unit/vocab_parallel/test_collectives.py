"""How many collectives a loss may cost under tensor parallelism."""

from __future__ import annotations

from collections import Counter
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_sftrl import LossInputs, TokenBatch, build_loss
from tests.ranks import run_ranks
from tests.unit.vocab_parallel.dense import LABELS, T, distribution, logits, shard

BATCH = TokenBatch(
    tokens=LABELS,
    labels=LABELS,
    positions=torch.arange(T),
    loss_mask=torch.ones(T, dtype=torch.bool),
    cu_seqlens=torch.tensor([0, 2, T], dtype=torch.int32),
    token_weight=torch.full((T,), 1 / T),
    behavior_logprobs=torch.full((T,), -4.0),
)
TWO = {"MAX": 1, "SUM": 1}
CASES = [
    ("sft", {}, TWO),
    ("gift", {}, TWO),
    ("gift", {"eps": 0.0, "smoothing": 0.1}, TWO),
    ("pear", {}, TWO),
    ("pear", {"variant": "block", "center": "sequence", "normalize": "mean_one"}, TWO),
    ("pear", {"variant": "sequence", "base": "dft"}, TWO),
    ("pear", {"base": "entropy"}, TWO),
    ("dft", {}, TWO),
    ("entropy", {}, TWO),
    ("label_smoothing", {}, TWO),
    ("curiosft", {}, {**TWO, "gather": 1}),
    ("curiosft", {"temperature": "fixed"}, {**TWO, "gather": 1}),
    ("curiosft", {"divergence": "forward_kl"}, {**TWO, "gather": 1}),
    ("curiosft", {"divergence": "reverse_kl"}, {**TWO, "gather": 1}),
]


def counted(name: str, options: dict, trained: bool) -> dict[str, int]:
    """Collectives of one loss forward with the policy's entropy, and of its backward."""
    counts: Counter[str] = Counter()
    all_reduce, all_gather = dist.all_reduce, dist.all_gather

    def counting_reduce(tensor, op, group):
        counts["MAX" if op == dist.ReduceOp.MAX else "SUM"] += 1
        return all_reduce(tensor, op, group)

    def counting_gather(tensors, tensor, group):
        counts["gather"] += 1
        return all_gather(tensors, tensor, group)

    with (
        mock.patch.object(dist, "all_reduce", counting_reduce),
        mock.patch.object(dist, "all_gather", counting_gather),
        torch.set_grad_enabled(trained),
    ):
        inputs = LossInputs(
            policy=distribution(shard(logits(1))[0].requires_grad_(trained)),
            batch=BATCH,
            reference=distribution(shard(logits(2))[0]),
        )
        loss = build_loss(name, options)(inputs).token_loss
        inputs.policy.entropy()
        if trained:
            loss.sum().backward()
    return dict(counts)


@pytest.mark.parametrize("trained", [True, False], ids=["training", "evaluating"])
@pytest.mark.parametrize(("name", "options", "expected"), CASES)
def test_a_loss_with_its_entropy_costs_one_max_and_one_sum(
    name: str, options: dict, expected: dict[str, int], trained: bool
):
    assert run_ranks(2, counted, name, options, trained) == [expected, expected]


def entropy_first() -> dict[str, int]:
    """A loss that asks for the entropy before the log-probabilities."""
    reduced: list[object] = []
    all_reduce = dist.all_reduce
    with mock.patch.object(dist, "all_reduce", lambda t, op, g: (reduced.append(op), all_reduce(t, op, g))):
        inputs = LossInputs(policy=distribution(shard(logits(1))[0].requires_grad_()), batch=BATCH)
        for _ in range(2):
            inputs.policy.entropy()
            inputs.policy.logprobs(BATCH.labels)
            inputs.policy.detach().logprobs(BATCH.labels)
    return dict(Counter("MAX" if op == dist.ReduceOp.MAX else "SUM" for op in reduced))


def test_asking_in_another_order_or_again_costs_nothing_more():
    assert run_ranks(2, entropy_first) == [TWO, TWO]
