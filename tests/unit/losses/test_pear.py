"""PEAR's weights against loops over tokens; packing and context parallelism must not change them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sftrl import LossInputs, TokenBatch, TokenDistribution, build_loss
from tests.ranks import run_ranks
from tests.unit.losses.batches import batch_of, inputs_for

V = 23
LENGTHS = [8, 4, 12, 4]  # multiples of 2 * cp for cp = 2
TOTAL = sum(LENGTHS)
VARIANTS = [
    {},
    {"variant": "block", "block_size": 3},
    {"variant": "sequence"},
    {"variant": "block", "base": "entropy", "base_options": {"coef": 0.3}},
    {"center": "sequence", "normalize": "mean_one"},
    {"gamma": 0.5, "clip_log_weight": (-2.0, 0.5)},
]
EXACT = 1e-12  # float64 sums of a dozen terms


def data() -> tuple[Tensor, TokenBatch]:
    """Logits [T, V] and a packed batch with holes in its masks, one sequence of a single loss token."""
    source = torch.Generator().manual_seed(5)
    z = torch.randn(TOTAL, V, dtype=torch.float64, generator=source)
    labels = torch.randint(V, (TOTAL,), generator=source)
    mask = torch.rand(TOTAL, generator=source) < 0.7
    mask[8:12] = torch.tensor([False, False, True, False])
    mask[-4:] = False  # a sequence that trains nothing
    return z, batch_of(labels, lengths=LENGTHS, mask=mask)


def slow_weights(lp: list[float], b: list[float], options: dict) -> list[float]:
    """G of the loss tokens of one sequence: METHODS section 3 with loops."""
    lo, hi = options.get("clip_ratio", (-0.08, 0.3))
    floor, ceiling = options.get("clip_log_weight", (-10.0, 5.0))
    ratio = [x - y for x, y in zip(lp, b, strict=True)]
    if options.get("center") == "sequence":
        middle = sum(ratio) / len(ratio)
        ratio = [x - middle for x in ratio]
    delta = [min(max(x, lo), hi) for x in ratio]
    num, variant = len(delta), options.get("variant", "token")
    block = {"token": 1, "block": options.get("block_size", 4), "sequence": num}[variant]
    weights = []
    for t in range(1, num + 1):
        end = min(-(-t // block) * block, num)
        log_weight = (num - end) * math.log(options.get("gamma", 0.999)) + sum(delta[end:])
        if variant == "sequence":
            log_weight = sum(delta)
        weights.append(math.exp(min(max(log_weight, floor), ceiling)))
    if options.get("normalize") == "mean_one":
        weights = [w * num / sum(weights) for w in weights]
    return weights


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_packed_weights_equal_loops_over_each_sequence(options: dict):
    z, batch = data()
    z.requires_grad_()
    inputs = inputs_for(z, batch=batch)
    output = build_loss("pear", options)(inputs)
    base = build_loss(options.get("base", "sft"), options.get("base_options"))(inputs).token_loss
    lp = inputs.policy.logprobs(batch.labels).detach()
    assert batch.behavior_logprobs is not None
    expected = torch.zeros_like(lp)
    for start, stop in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
        here = torch.arange(start, stop)[batch.loss_mask[start:stop]]
        if here.numel():
            weights = slow_weights(lp[here].tolist(), batch.behavior_logprobs[here].tolist(), options)
            expected[here] = torch.tensor(weights, dtype=torch.float64)
    mask = batch.loss_mask
    torch.testing.assert_close(output.token_loss[mask], (expected * base)[mask], rtol=EXACT, atol=EXACT)
    (gradient,) = torch.autograd.grad(output.token_loss[mask].sum(), z, retain_graph=True)
    (truth,) = torch.autograd.grad((expected * base)[mask].sum(), z)
    torch.testing.assert_close(gradient, truth, rtol=EXACT, atol=EXACT)
    assert all(value.isfinite().all() for value in output.metrics.values())


def test_metrics_of_one_sequence_are_what_their_names_say():
    z, _ = data()
    z = z[:8]
    inputs = inputs_for(z)
    metrics = build_loss("pear")(inputs).metrics
    lp = inputs.policy.logprobs(inputs.batch.labels)
    assert inputs.batch.behavior_logprobs is not None
    weights = torch.tensor(
        slow_weights(lp.tolist(), inputs.batch.behavior_logprobs.tolist(), {}), dtype=torch.float64
    )
    ratio = lp - inputs.batch.behavior_logprobs
    torch.testing.assert_close(metrics["pear/log_weight"], weights.log(), rtol=0, atol=EXACT)
    assert metrics["pear/log_weight_sequence_min"][0] == metrics["pear/log_weight"].min()
    assert metrics["pear/log_weight_sequence_max"][0] == metrics["pear/log_weight"].max()
    assert metrics["pear/ratio_at_low_clip"].sum() == (ratio <= -0.08).sum()
    assert metrics["pear/ratio_at_high_clip"].sum() == (ratio >= 0.3).sum()
    effective = weights.sum() ** 2 / (8 * (weights**2).sum())
    torch.testing.assert_close(metrics["pear/effective_sample_fraction"][3], effective, rtol=0, atol=EXACT)


def zigzag(cp: int, rank: int) -> Tensor:
    """Places in the whole pack of the tokens that a context-parallel rank holds."""
    places, start = [], 0
    for length in LENGTHS:
        chunks = torch.arange(start, start + length).chunk(2 * cp)
        places += [chunks[rank], chunks[2 * cp - 1 - rank]]
        start += length
    return torch.cat(places)


def pear_of_part(options: dict) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Places, token losses, gradient and metrics of this context-parallel rank."""
    z, whole = data()
    here = zigzag(dist.get_world_size(), dist.get_rank())
    assert whole.behavior_logprobs is not None
    batch = TokenBatch(
        tokens=whole.tokens[here],
        labels=whole.labels[here],
        positions=whole.positions[here],
        loss_mask=whole.loss_mask[here],
        cu_seqlens=whole.cu_seqlens // dist.get_world_size(),
        token_weight=whole.token_weight[here],
        behavior_logprobs=whole.behavior_logprobs[here],
    )
    local = z[here].requires_grad_()
    policy = TokenDistribution.from_logits(local, vocab_size=V)
    output = build_loss("pear", options)(LossInputs(policy=policy, batch=batch, cp_group=dist.group.WORLD))
    output.token_loss[batch.loss_mask].sum().backward()
    assert local.grad is not None
    return here, output.token_loss.detach(), local.grad, output.metrics


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_context_parallel_parts_equal_the_whole_in_value_gradient_and_metrics(options: dict):
    z, batch = data()
    output = build_loss("pear", options)(inputs_for(z.requires_grad_(), batch=batch))
    (gradient,) = torch.autograd.grad(output.token_loss[batch.loss_mask].sum(), z)
    seen = torch.zeros(TOTAL, dtype=torch.bool)
    for here, loss, part_gradient, metrics in run_ranks(2, pear_of_part, options):
        mask = batch.loss_mask[here]
        seen[here] = True
        torch.testing.assert_close(loss[mask], output.token_loss.detach()[here][mask], rtol=EXACT, atol=EXACT)
        torch.testing.assert_close(part_gradient, gradient[here], rtol=EXACT, atol=EXACT)
        for name, value in metrics.items():
            whole = output.metrics[name][here][mask]
            torch.testing.assert_close(value[mask], whole, rtol=EXACT, atol=EXACT, msg=name)
    assert seen.all()
