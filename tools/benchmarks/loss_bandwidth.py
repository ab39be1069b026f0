"""How much of the machine a loss uses.

Of the memory's bandwidth on logits that exist, the elementwise part alone; with the output layer, of the rate
of a matrix product.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from megatron_sftrl import LossInputs, TokenBatch, TokenDistribution, build_loss
from megatron_sftrl.vocab_parallel.one_pass import weighted_sum
from tools.benchmarks.loss_contenders import LOSSES, Sizes, make_batch, num_products

# [T, V] arrays read or written, forward and backward, when each is touched once: the policy's logits twice
# and their gradient; those of the reference twice, since the gradient is policy - target.
PASSES = {"sft": 3, "entropy": 3, "pear": 3, "gift": 5}


def bandwidth_fractions(sizes: Sizes, device: torch.device, repeats: int = 5) -> dict[str, float]:
    """For each loss: bytes it has to move, over its time, relative to a copy of an array of that size.

    Args:
        sizes: [T, V_local] logits; few tokens measure the launches of what is done on [T] vectors.
        device: where; bf16 on CUDA, else fp32.
        repeats: of which the fastest counts.
    """
    sizes = replace(sizes, vocab_size=sizes.columns, tp=1)  # one rank's columns are all there is
    dtype = _dtype(device)
    generator = torch.Generator(device).manual_seed(0)
    logits, reference = (
        3 * torch.randn(sizes.tokens, sizes.columns, generator=generator, device=device, dtype=dtype)
        for _ in range(2)
    )
    batch = make_batch(sizes, device)
    copied = _seconds(functools.partial(torch.empty_like(logits).copy_, logits), device, repeats)
    rate = 2 * logits.nbytes / copied
    fractions = {}
    for name, passes in PASSES.items():
        step = functools.partial(_forward_and_backward, name, logits, reference, batch)
        fractions[name] = passes * logits.nbytes / _seconds(step, device, repeats) / rate
    return {"copy, bytes per second": rate, **fractions}


def matmul_fractions(
    seconds: Mapping[str, float], sizes: Sizes, device: torch.device, repeats: int = 5
) -> dict[str, float]:
    """For each contender: the arithmetic that it cannot do without, over its time, relative to one product.

    Args:
        seconds: forward and backward of each, output layer included.
        sizes: of one rank.
        device: where; bf16 on CUDA, else fp32.
        repeats: of the product alone, of which the fastest counts.
    """
    dtype = _dtype(device)
    hidden, weight = (
        torch.randn(rows, sizes.hidden, device=device, dtype=dtype) for rows in (sizes.tokens, sizes.columns)
    )
    logits = torch.empty(sizes.tokens, sizes.columns, device=device, dtype=dtype)
    operations = 2 * sizes.tokens * sizes.columns * sizes.hidden
    rate = operations / _seconds(functools.partial(torch.mm, hidden, weight.t(), out=logits), device, repeats)
    fractions = {name: num_products(name) * operations / taken / rate for name, taken in seconds.items()}
    return {"one product, operations per second": rate, **fractions}


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _forward_and_backward(name: str, logits: Tensor, reference: Tensor, batch: TokenBatch) -> None:
    columns = logits.shape[1]
    mine = logits.detach().requires_grad_()
    inputs = LossInputs(
        policy=TokenDistribution.from_logits(mine, vocab_size=columns),
        batch=batch,
        reference=TokenDistribution.from_logits(reference, vocab_size=columns),
    )
    weighted_sum(build_loss(name, LOSSES[name])(inputs).token_loss, batch.token_weight).backward()


def _seconds(step: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The fastest of some calls, after one that compiles."""
    times = []
    for _ in range(repeats + 1):
        _synchronize(device)
        start = time.perf_counter()
        step()
        _synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
