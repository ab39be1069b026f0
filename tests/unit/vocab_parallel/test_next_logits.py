"""The next chunk's logits are made during the reductions over this one, and are the same as without."""

from __future__ import annotations

from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sftrl import TokenBatch, TokenDistribution
from megatron_sftrl.vocab_parallel import OutputLayer, collectives, output_layer
from megatron_sftrl.vocab_parallel.one_pass import one_pass
from megatron_sftrl.vocab_parallel.output_layer import NextLogits
from tests.ranks import run_ranks

H, V = 6, 10
CHUNKS = [torch.tensor([3, 9, 1]), torch.tensor([0, 2, 4]), torch.tensor([8])]


def make_layer(num_columns: int = V) -> OutputLayer:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, H, generator=generator).requires_grad_() for n in (V, num_columns))
    return OutputLayer(hidden=hidden, weight=weight)


@pytest.mark.parametrize("num_columns", [1, 2, 9])
@pytest.mark.parametrize("reductions", [(0, 0, 0), (1, 1, 1), (2, 2, 2), (3, 0, 5), (0, 2, 0)])
def test_chunks_are_the_products_however_often_somebody_waited(
    reductions: tuple[int, ...], num_columns: int
) -> None:
    layer = make_layer(num_columns)
    ahead = NextLogits(layer, CHUNKS)
    for tokens, times in zip(CHUNKS, reductions, strict=True):
        logits = ahead.take()
        for _ in range(times):
            ahead.advance()
        expected = layer.hidden.detach()[tokens] @ layer.weight.detach().T
        torch.testing.assert_close(logits, expected)  # still there, with the next chunk's begun
        logits.fill_(torch.nan)  # as a gradient takes the logits' place


def test_without_reductions_there_is_one_buffer() -> None:
    made: list[int] = []
    buffer = OutputLayer.buffer
    with mock.patch.object(OutputLayer, "buffer", lambda self, n: (made.append(n), buffer(self, n))[1]):
        ahead = NextLogits(make_layer(), CHUNKS)
        for _ in CHUNKS:
            ahead.take()
        assert made == [3]
        behind = NextLogits(make_layer(), CHUNKS)
        behind.take()
        behind.advance()
        behind.advance()
        assert made == [3, 3, 3]


class RecordingWork:
    """A reduction whose wait is written down."""

    def __init__(self, work: dist.Work, events: list[str]) -> None:
        self._work, self._events = work, events

    def wait(self) -> None:
        self._events.append("wait")
        self._work.wait()


def order_of_events() -> list[str]:
    """Of two chunks of a loss at tp 2: its products, and where reductions start and are waited for."""
    events: list[str] = []
    all_reduce, write_logits = dist.all_reduce, output_layer.write_logits

    def recording_reduce(tensor: Tensor, op, group, async_op: bool):
        events.append("MAX" if op == dist.ReduceOp.MAX else "SUM")
        return RecordingWork(all_reduce(tensor, op, group, async_op), events)

    def recording_product(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
        events.append(f"{len(hidden)} x {len(weight)}")
        write_logits(hidden, weight, out)

    layer = make_layer(V // 2)
    layer = OutputLayer(hidden=layer.hidden, weight=layer.weight, chunk_bytes=5 * (V // 2) * 4)
    labels = torch.arange(V)
    batch = TokenBatch(
        tokens=labels,
        labels=labels,
        positions=labels,
        loss_mask=torch.ones(V, dtype=torch.bool),
        cu_seqlens=torch.tensor([0, V], dtype=torch.int32),
        token_weight=torch.full((V,), 1 / V),
    )

    def nll(policy: TokenDistribution, reference: object, batch: TokenBatch):
        return -policy.logprobs(batch.labels), {}

    with (
        mock.patch.object(collectives.dist, "all_reduce", recording_reduce),
        mock.patch.object(output_layer, "write_logits", recording_product),
    ):
        to_distribution = partial(
            TokenDistribution.from_logits, vocab_size=V, group=dist.group.WORLD, is_scratch=True
        )
        one_pass(nll, layer, None, batch, to_distribution).total.backward()
    return events


def test_each_reduction_has_a_part_of_the_next_product_to_hide_behind() -> None:
    first = ["5 x 5", "MAX", "5 x 3", "wait", "SUM", "5 x 2", "wait"]
    last = ["MAX", "wait", "SUM", "wait"]
    assert run_ranks(2, order_of_events) == [first + last] * 2
