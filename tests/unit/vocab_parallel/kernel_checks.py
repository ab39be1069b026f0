"""The Triton kernels against the PyTorch arithmetic and against float64, on the same logits.

Run by a process whose Triton interprets (test_triton_kernels.py), and on CUDA (tests/gpu/test_kernels.py).
Each check returns errors by name, as `gap` counts them: (against PyTorch, against float64).
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import torch
from torch import Tensor

from megatron_sftrl import LossInputs, TokenBatch, TokenDistribution, build_loss
from megatron_sftrl.losses.registry import DEFAULT_REGISTRY
from megatron_sftrl.vocab_parallel import triton_rows
from megatron_sftrl.vocab_parallel.arithmetic import gradient_of_logits, local_sums
from megatron_sftrl.vocab_parallel.collectives import VocabShard
from megatron_sftrl.vocab_parallel.evaluation import evaluate
from megatron_sftrl.vocab_parallel.one_pass import weighted_sum
from megatron_sftrl.vocab_parallel.statistics import (
    Evaluation,
    Expectation,
    LogSumExp,
    Pick,
    Scratch,
    Source,
    Statistic,
    Total,
)
from tests.grid import is_full

# Two whole blocks of the largest kind and a rest. The first shard is a view, whose rows begin anywhere; the
# other ones and the losses have rows of a multiple of 16.
V = 2 * 4096 + 803
SPLIT, PADDED = 5008, 9008
SHARDS = {"first": (0, SPLIT), "padded": (SPLIT, V - SPLIT), "empty": (V, 0)}  # start, real columns
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROWS = [0, 1, 2, 3, 5, 6]  # of `whole_logits`, without the one whose cross-entropies are infinite
Errors = dict[str, tuple[float, float]]

# These ask nothing of the kernels that another one does not; ts_opsd has no default temperature.
ALIKE = {"aesl", "asft", "chord_phi", "eaft", "idft", "iw_sft", "kd", "psft", "sed", "trsft", "ts_opsd"}
LOSSES = [
    *((name, {}) for name in DEFAULT_REGISTRY.names() if name not in ALIKE),
    ("kd", {"direction": "reverse", "temperature": 2.0, "top_k": 8, "alpha": 0.3}),
    ("ts_opsd", {"tau": 2.0}),
    ("gift", {"beta": 2.0, "smoothing": 0.05}),
    ("curiosft", {"divergence": "forward_kl"}),
    ("curiosft", {"divergence": "reverse_kl"}),
    ("pear", {"base": "entropy"}),
    ("grpo", {"temperature": 0.7, "kl_coefficient": 0.1, "entropy_coefficient": 0.01}),
]


@contextlib.contextmanager
def arithmetic(*, kernels: bool) -> Iterator[None]:
    """Everything inside is computed by the kernels where they cover it, or by PyTorch."""
    with mock.patch.object(triton_rows, "has_kernels", return_value=kernels):
        yield


def gap(found: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the expected number, or to a thousandth of its row's largest.

    Equal infinities and NaN at the same place are no difference.
    """
    found, expected = found.detach().double(), expected.detach().double()
    size = expected.abs().nan_to_num(0.0, posinf=0.0)
    is_same = (found == expected) | (found.isnan() & expected.isnan())
    difference = (found - expected).abs() / torch.maximum(size, 1e-3 * size.amax(dim=-1, keepdim=True))
    return difference.nan_to_num(torch.inf).masked_fill(is_same, 0.0).amax().item()


def gaps(found: Tensor, pytorch: Tensor, truth: Tensor) -> tuple[float, float]:
    return gap(found, pytorch), gap(found, truth)


def whole_logits(seed: int, dtype: torch.dtype) -> Tensor:
    """[7, V]: plain, peaked, +-1e4, -inf in the same or in other columns, -inf in a whole shard, and rising,
    so that the maximum moves in every block."""
    generator = torch.Generator().manual_seed(seed)
    z = 3 * torch.randn(7, V, generator=generator, dtype=torch.float64)
    z[1] *= 10
    z[2] = 1e4 * (torch.rand(V, generator=generator) > 0.5) - 5e3 + z[2]
    z[3, torch.arange(V) % 3 == 0] = -torch.inf
    z[4, torch.rand(V, generator=generator) > 0.5] = -torch.inf
    z[5, SPLIT:] = -torch.inf
    z[6] += torch.linspace(-50, 50, V)
    return z.to(dtype)


def everything(
    z: Tensor, u: Tensor, start: int, num_columns: int, ids: Tensor, scratch: Scratch | None = None
) -> tuple[Evaluation, list[Source]]:
    """Every kind of statistic of p, q and both at other temperatures; these sources."""
    shard = VocabShard(vocab_size=V, start=start, num_columns=num_columns, group=None)
    tau = torch.linspace(0.5, 2.0, z.shape[0], device=z.device)
    p, q = Source(origin=z, shard=shard, scratch=scratch), Source(origin=u, shard=shard)
    hot_p = replace(p, inverse_tau=(1 / tau).to(p.dtype), scratch=None)
    hot_q = replace(q, inverse_tau=tau.to(p.dtype))
    statistics: list[Statistic] = [
        LogSumExp(p), Pick(p, ids), Total(p), Expectation(p, p), Expectation(q, p), LogSumExp(hot_p),
        LogSumExp(q), Expectation(hot_p, q), Expectation(p, hot_p), Expectation(hot_q, hot_q), Total(hot_q),
        Pick(hot_p, ids), Pick(p, ids.flip(0)),
    ]  # fmt: skip
    return Evaluation.of(statistics), [p, hot_p, q, hot_q]


def columns_of(whole: Tensor, start: int, num_columns: int) -> Tensor:
    """A shard's logits: a view of the whole where no padding is needed, else NaN behind the real columns."""
    real = whole[:, start : start + num_columns]
    missing = SPLIT - num_columns if num_columns else 64
    return torch.nn.functional.pad(real, (0, missing), value=torch.nan) if missing else real


def shard_errors(dtype_name: str, shard_name: str, device: str) -> Errors:
    """Sums and gradients on one shard, every statistic at once, all of the gradients given."""
    start, num_columns = SHARDS[shard_name]
    z, u = (whole_logits(seed, DTYPES[dtype_name]).to(device) for seed in (1, 2))
    u[3] = torch.where(z[3] == -torch.inf, z[3], u[3])
    ids = torch.tensor([0, V - 1, 4096, SPLIT - 1, SPLIT, 1, 17], device=device)
    found: dict[str, dict[str, Tensor]] = {}
    for kind in ("kernels", "pytorch", "float64"):
        logits = [x.double() if kind == "float64" else x for x in (z, u)]
        with arithmetic(kernels=False):
            evaluation, _ = everything(logits[0], logits[1], 0, V, ids)
            values = evaluate(evaluation.statistics)
            maxima, partitions, _ = local_sums(evaluation)
        local = [columns_of(x, start, num_columns) for x in logits]
        evaluation, sources = everything(local[0], local[1], start, num_columns, ids)
        grads = list(torch.linspace(-1, 2, len(values) * 7, device=device).to(evaluation.dtype).view(-1, 7))
        with arithmetic(kernels=kind == "kernels"):
            assert triton_rows.covers(evaluation) == (kind == "kernels")
            sums = local_sums(evaluation)
            found[kind] = dict(zip(("maxima", "partitions"), sums, strict=False))
            # A sum for itself: they differ by orders of magnitude.
            found[kind] |= {f"sum {k}": row for k, row in enumerate(sums[2])}
            for name, source in zip(("p", "hot p", "q", "hot q"), sources, strict=True):
                found[kind][f"d {name}"] = _gradient(evaluation, source, grads, values, partitions, maxima)
            buffer = local[0].clone()
            evaluation, sources = everything(
                buffer, local[1], start, num_columns, ids, Scratch(num_readers=1)
            )
            found[kind]["d p in place"] = _gradient(evaluation, sources[0], grads, values, partitions, maxima)
            assert torch.equal(buffer[ROWS], found[kind]["d p in place"]), "not written into the logits"
    return {
        name: gaps(ours, found["pytorch"][name], found["float64"][name])
        for name, ours in found["kernels"].items()
    }


def _gradient(
    evaluation: Evaluation,
    source: Source,
    grads: list[Tensor],
    values: list[Tensor],
    partitions: Tensor,
    maxima: Tensor,
) -> Tensor:
    """[ROWS, width], padding exactly 0."""
    i = evaluation.index(source)
    gradient = gradient_of_logits(evaluation, i, grads, values, partitions, maxima, may_overwrite=True)
    assert gradient is not None
    padding = gradient[:, source.shard.num_columns :]
    assert (padding == 0).all() or padding.numel() == 0, "padding got a gradient"
    return gradient[ROWS]


def check_no_tokens(device: str) -> None:
    """A chunk may have lost all of its tokens to the mask."""
    z = torch.zeros(0, V, device=device)
    evaluation, sources = everything(z, z, 0, V, torch.zeros(0, dtype=torch.int64, device=device))
    with arithmetic(kernels=True):
        maxima, partitions, sums = local_sums(evaluation)
        values = list(sums)
        gradient = gradient_of_logits(
            evaluation, evaluation.index(sources[0]), values, values, partitions, maxima, may_overwrite=False
        )
    assert maxima.shape == partitions.shape == (4, 0)
    assert gradient is not None
    assert gradient.shape == (0, V)


def loss_errors(dtype_name: str, device: str) -> Errors:
    """Value and gradient of each loss over a padded vocabulary of several blocks."""
    dtype, num_tokens = DTYPES[dtype_name], 5
    noise = torch.Generator().manual_seed(3)
    z, u = (4 * torch.randn(num_tokens, PADDED, dtype=torch.float64, generator=noise) for _ in range(2))
    z[:, V:], u[:, V:] = torch.nan, 1e30
    labels = torch.tensor([0, V - 1, 4096, 8192, 77])
    z[torch.arange(num_tokens), labels] += 8
    z, u = z.to(device, dtype), u.to(device, dtype)
    batch = small_batch(labels.to(device))
    errors: Errors = {}
    for name, options in LOSSES:
        loss, found = build_loss(name, options), {}
        for kind in ("kernels", "pytorch", "float64"):
            logits, reference = (x.double() if kind == "float64" else x for x in (z, u))
            logits = logits.clone().requires_grad_()
            with arithmetic(kernels=kind == "kernels"):
                policy = TokenDistribution.from_logits(logits, vocab_size=V)
                prior = TokenDistribution.from_logits(reference, vocab_size=V)
                token_loss = loss(LossInputs(policy=policy, batch=batch, reference=prior)).token_loss
                weighted_sum(token_loss, batch.token_weight).backward()
            assert logits.grad is not None
            found[kind] = (token_loss, logits.grad)
        for place, what in enumerate(("value", "gradient")):
            ours, pytorch, truth = (found[kind][place] for kind in ("kernels", "pytorch", "float64"))
            errors[f"{name} {options} {what}"] = gaps(ours, pytorch, truth)
    return errors


def wide_errors(num_tokens: int, num_columns: int, device: str) -> dict[str, float]:
    """Value and gradient in bf16 of sft and gift over a whole vocabulary, against PyTorch alone."""
    generator = torch.Generator(device).manual_seed(4)
    z, u = (
        4 * torch.randn(num_tokens, num_columns, generator=generator, device=device, dtype=torch.bfloat16)
        for _ in range(2)
    )
    batch = small_batch(torch.arange(num_tokens, device=device) % num_columns)
    errors: dict[str, float] = {}
    for name in ("sft", "gift"):
        found = []
        for kernels in (True, False):
            logits = z.clone().requires_grad_()
            with arithmetic(kernels=kernels):
                policy = TokenDistribution.from_logits(logits, vocab_size=num_columns)
                prior = TokenDistribution.from_logits(u, vocab_size=num_columns)
                token_loss = build_loss(name)(
                    LossInputs(policy=policy, batch=batch, reference=prior)
                ).token_loss
                # Not weighted with 1 / T: bf16 has no digits left there.
                token_loss.sum().backward()
            assert logits.grad is not None
            found.append((token_loss, logits.grad))
        (value, gradient), (expected, truth) = found
        errors[f"{name} value"] = gap(value, expected)
        # In parts: the comparison is in float64.
        parts = zip(gradient.split(256), truth.split(256), strict=True)
        errors[f"{name} gradient"] = max(gap(ours, theirs) for ours, theirs in parts)
    return errors


def small_batch(labels: Tensor) -> TokenBatch:
    """Two sequences (of one token: one), with whatever a loss may need."""
    num_tokens = labels.numel()
    ends = [0, 2, num_tokens] if num_tokens > 2 else [0, num_tokens]
    return TokenBatch(
        tokens=labels,
        labels=labels,
        positions=torch.arange(num_tokens, device=labels.device),
        loss_mask=torch.ones_like(labels, dtype=torch.bool),
        cu_seqlens=torch.tensor(ends, dtype=torch.int32, device=labels.device),
        token_weight=torch.full_like(labels, 1 / num_tokens, dtype=torch.float32),
        behavior_logprobs=torch.linspace(-6, -4, num_tokens, device=labels.device),
        old_logprobs=torch.linspace(-3, -2, num_tokens, device=labels.device),
        rollout_logprobs=torch.linspace(-3, -2, num_tokens, device=labels.device),
        advantages=torch.linspace(-1, 2, num_tokens, device=labels.device),
    )


def main() -> None:
    """Every check on the CPU, as JSON on the last line; Triton has to interpret."""
    from tests.unit.losses.test_golden import errors

    check_no_tokens("cpu")
    found: dict[str, object] = {}
    for dtype_name in ("bf16", "fp32"):
        if dtype_name == "bf16" or is_full():
            found[f"losses {dtype_name}"] = loss_errors(dtype_name, "cpu")
        for shard_name in SHARDS:
            found[f"{shard_name} {dtype_name}"] = shard_errors(dtype_name, shard_name, "cpu")
    found["padded fp16"] = shard_errors("fp16", "padded", "cpu")
    for num_tokens in (1, 7):
        found[f"wide {num_tokens}"] = wide_errors(num_tokens, V, "cpu")
    with arithmetic(kernels=True):
        found["golden"] = errors("float32", "one_pass")
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
