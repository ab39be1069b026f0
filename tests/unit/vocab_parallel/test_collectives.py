"""How many collectives a loss may cost under tensor parallelism."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_sftrl import LossInputs, TokenBatch, TokenDistribution, build_loss
from megatron_sftrl.vocab_parallel import OutputLayer
from megatron_sftrl.vocab_parallel.one_pass import one_pass
from tests.ranks import run_ranks
from tests.unit.vocab_parallel.dense import LABELS, T, V, distribution, logits, shard, world

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


@contextlib.contextmanager
def counting() -> Iterator[Counter[str]]:
    """Collectives by kind, while it lasts."""
    counts: Counter[str] = Counter()
    all_reduce, all_gather = dist.all_reduce, dist.all_gather

    def counting_reduce(tensor, op, group, async_op):
        counts["MAX" if op == dist.ReduceOp.MAX else "SUM"] += 1
        return all_reduce(tensor, op, group, async_op)

    def counting_gather(tensors, tensor, group):
        counts["gather"] += 1
        return all_gather(tensors, tensor, group)

    with (
        mock.patch.object(dist, "all_reduce", counting_reduce),
        mock.patch.object(dist, "all_gather", counting_gather),
    ):
        yield counts


def counted(name: str, options: dict, trained: bool) -> dict[str, int]:
    """Collectives of one loss forward with the policy's entropy, and of its backward."""
    with counting() as counts, torch.set_grad_enabled(trained):
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


CHUNKS = 3


def counted_fused(name: str, options: dict, is_one_pass: bool) -> dict[str, int]:
    """The same with the output layer, three chunks of tokens."""
    where = {"vocab_size": V, "group": world()[0]}
    columns = shard(torch.eye(V, dtype=torch.float64), padding=0.0)[0].t().contiguous()
    options_of_layer = {"weight": columns, "chunk_bytes": T // CHUNKS * columns.shape[0] * 8}
    policy = OutputLayer(hidden=logits(1).requires_grad_(), **options_of_layer)
    reference = OutputLayer(hidden=logits(2), **options_of_layer)
    loss = build_loss(name, options)

    def of_tokens(policy: TokenDistribution, prior: TokenDistribution | None, batch: TokenBatch):
        inputs = LossInputs(policy=policy, reference=prior, batch=batch, is_part=is_one_pass)
        token_loss = loss(inputs).token_loss
        policy.entropy()
        return token_loss, {}

    with counting() as counts:
        if is_one_pass:
            to_distribution = partial(TokenDistribution.from_logits, is_scratch=True, **where)
            one_pass(of_tokens, policy, reference, BATCH, to_distribution).total.backward()
        else:
            ours, prior = (TokenDistribution.from_output_layer(x, **where) for x in (policy, reference))
            of_tokens(ours, prior, BATCH)[0].mul(BATCH.token_weight).sum().backward()
    return dict(counts)


@pytest.mark.parametrize(
    ("name", "gathers"), [("sft", 0), ("gift", 0), ("entropy", 0), ("curiosft", 1), ("pear", 0)]
)
def test_a_fused_loss_costs_one_max_and_one_sum_a_chunk_or_for_all_chunks(name: str, gathers: int):
    for is_one_pass in (True, False) if name != "pear" else (False,):
        times = CHUNKS if is_one_pass else 1
        expected = {"MAX": times, "SUM": times} | ({"gather": gathers * times} if gathers else {})
        assert run_ranks(2, counted_fused, name, {}, is_one_pass) == [expected, expected]


def entropy_first() -> dict[str, int]:
    """A loss that asks for the entropy before the log-probabilities."""
    reduced: list[object] = []
    all_reduce = dist.all_reduce

    def recording_reduce(tensor, op, group, async_op):
        reduced.append(op)
        return all_reduce(tensor, op, group, async_op)

    with mock.patch.object(dist, "all_reduce", recording_reduce):
        inputs = LossInputs(policy=distribution(shard(logits(1))[0].requires_grad_()), batch=BATCH)
        for _ in range(2):
            inputs.policy.entropy()
            inputs.policy.logprobs(BATCH.labels)
            inputs.policy.detach().logprobs(BATCH.labels)
    return dict(Counter("MAX" if op == dist.ReduceOp.MAX else "SUM" for op in reduced))


def test_asking_in_another_order_or_again_costs_nothing_more():
    assert run_ranks(2, entropy_first) == [TWO, TWO]
