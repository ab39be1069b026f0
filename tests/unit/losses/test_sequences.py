"""Sums along sequences against loops, and their gradients, whole and spread over context-parallel ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sftrl.losses.sequences import Sequences, sequences_of
from tests.ranks import run_ranks
from tests.unit.losses.test_pear import TOTAL, data, zigzag

EXACT = 1e-12  # float64 sums of a dozen terms
UPSTREAM = torch.linspace(-1, 1, TOTAL, dtype=torch.float64)
DIFFERENTIABLE = ("sum", "mean", "suffix", "suffix by 3", "prefix")
QUESTIONS = (*DIFFERENTIABLE, "minimum", "maximum", "count", "index")


def values() -> Tensor:
    """[T] with NaN where there is no loss: it may reach nothing."""
    x = torch.randn(TOTAL, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    return x.masked_fill(~data()[1].loss_mask, torch.nan)


def ask(sequences: Sequences, x: Tensor) -> dict[str, Tensor]:
    """Every answer that Sequences gives about x."""
    return {
        "sum": sequences.sum(x),
        "mean": sequences.mean(x),
        "suffix": sequences.suffix_sum(x),
        "suffix by 3": sequences.suffix_sum(x, 3),
        "prefix": sequences.prefix_mean(x),
        "minimum": sequences.minimum(x),
        "maximum": sequences.maximum(x),
        "count": sequences.count(),
        "index": sequences.index(),
    }


def loops(x: Tensor) -> dict[str, Tensor]:
    """The same with a loop over sequences and tokens, differentiable."""
    batch = data()[1]
    rows: dict[str, list[Tensor]] = {name: [] for name in QUESTIONS}
    for start, stop in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
        mask = batch.loss_mask[start:stop]
        y = x[start:stop][mask]
        nothing = torch.zeros((), dtype=torch.float64)
        for t in range(stop - start):
            index = int(mask[:t].sum())
            rows["sum"].append(y.sum() if len(y) else nothing)
            rows["mean"].append(y.mean() if len(y) else nothing)
            rows["suffix"].append(y[index + 1 :].sum() if len(y) else nothing)
            rows["suffix by 3"].append(y[(index // 3 + 1) * 3 :].sum() if len(y) else nothing)
            until = y[: index + int(mask[t])]
            rows["prefix"].append(until.mean() if len(until) else nothing)
            rows["minimum"].append(y.min().detach() if len(y) else nothing)
            rows["maximum"].append(y.max().detach() if len(y) else nothing)
            rows["count"].append(mask.sum())
            rows["index"].append(torch.tensor(index))
    return {name: torch.stack(row) for name, row in rows.items()}


def loss_of(found: dict[str, Tensor], upstream: Tensor) -> Tensor:
    """A scalar that touches every differentiable answer at its loss tokens."""
    total = sum(found[name] * (i + 1) for i, name in enumerate(DIFFERENTIABLE))
    assert isinstance(total, Tensor)
    return (total * upstream).sum()


def part() -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Places, answers and gradient of this context-parallel rank (the whole, outside of any)."""
    batch = data()[1]
    is_split = dist.is_initialized()
    here = zigzag(dist.get_world_size(), dist.get_rank()) if is_split else torch.arange(TOTAL)
    sequences = sequences_of(
        cu_seqlens=batch.cu_seqlens // (dist.get_world_size() if is_split else 1),
        positions=batch.positions[here],
        loss_mask=batch.loss_mask[here],
        cp_group=dist.group.WORLD if is_split else None,
    )
    x = values()[here].requires_grad_()
    found = ask(sequences, x)
    loss_of(found, UPSTREAM[here] * batch.loss_mask[here]).backward()
    assert x.grad is not None
    return here, {name: value.detach() for name, value in found.items()}, x.grad


@pytest.mark.parametrize("cp", [1, 2])
def test_every_sum_and_its_gradient_equals_a_loop(cp: int):
    x = values().requires_grad_()
    expected = loops(x)
    mask = data()[1].loss_mask
    (gradient,) = torch.autograd.grad(loss_of(expected, UPSTREAM * mask), x)
    for here, found, part_gradient in run_ranks(cp, part) if cp > 1 else [part()]:
        for name in QUESTIONS:
            compared = mask[here] if "suffix" in name else torch.ones_like(mask[here])
            truth = expected[name].detach()[here]
            torch.testing.assert_close(
                found[name][compared], truth[compared], rtol=EXACT, atol=EXACT, msg=name
            )
        torch.testing.assert_close(part_gradient, gradient[here], rtol=EXACT, atol=EXACT)


def test_a_vector_of_another_length_is_refused():
    batch = data()[1]
    sequences = sequences_of(
        cu_seqlens=batch.cu_seqlens, positions=batch.positions, loss_mask=batch.loss_mask
    )
    with pytest.raises(ValueError, match=r"expected \[T\] = \[28\], got \[3\]"):
        sequences.sum(torch.zeros(3))
    with pytest.raises(ValueError, match="block_size >= 1"):
        sequences.suffix_sum(values(), 0)
