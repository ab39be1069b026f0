"""Demonstrations in GRPO's groups against LUFFY's equation written out, on every split of the vocabulary.

ts_opsd, which compares the whole vocabulary, and chord_phi are held against theirs on the same ranks.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sftrl import build_loss
from tests.ranks import run_ranks
from tests.unit.losses.batches import batch_of, inputs_for
from tests.unit.losses.test_golden import Columns, V, fused, with_logits
from tests.unit.losses.test_objectives import Dense, chord_phi, drawn, ts_opsd

SHOWN = (1, 3)
"""The sequences that are demonstrations."""
VARIANTS = [
    {"clip_low": 1.0, "clip_high": None},  # the release's
    {"shaping": 0.5, "temperature": 0.7, "entropy_coefficient": 0.05},
    {"shaping": None},
    {"ratio": "sequence", "kl_coefficient": 0.3, "correction": "tis"},
    {"objective": "cispo"},
]


def groups() -> Dense:
    """Policy and start, and responses that have moved; NaN where a demonstration has nothing to read."""
    dense = drawn()
    draw = torch.Generator().manual_seed(9)
    lengths = dense.batch.cu_seqlens.diff().long()
    is_shown = torch.tensor([s in SHOWN for s in range(len(lengths))]).repeat_interleave(lengths)
    noise = 0.4 * torch.randn(2, is_shown.numel(), generator=draw, dtype=torch.float64)
    old = torch.where(is_shown, torch.nan, dense.lp + noise[0])
    advantages = torch.tensor([-0.7, 1.2, 0.4, -0.3], dtype=torch.float64).repeat_interleave(lengths)
    batch = dataclasses.replace(
        dense.batch,
        token_weight=dense.batch.token_weight.double(),
        old_logprobs=old,
        rollout_logprobs=old + noise[1],
        advantages=advantages,
        is_demonstration=is_shown,
    )
    return dataclasses.replace(dense, batch=batch)


def luffy(d: Dense, **options: Any) -> Tensor:
    """[T] -f(pi) A - c H on demonstrations; the loss without any on the other sequences; 0 where masked."""
    batch, gamma = d.batch, options.get("shaping", 0.1)
    assert batch.advantages is not None
    assert batch.is_demonstration is not None
    mask = batch.loss_mask & ~batch.is_demonstration
    own = build_loss("grpo", {name: value for name, value in options.items() if name != "shaping"})
    plain = dataclasses.replace(batch, is_demonstration=None, loss_mask=mask)
    of_others = own(inputs_for(d.z, d.u, plain)).token_loss
    probs = (d.z / options.get("temperature", 1.0)).softmax(1)
    loss = torch.zeros_like(of_others)
    for t in range(len(loss)):
        if batch.is_demonstration[t]:
            pi = probs[t, batch.labels[t]]
            f = pi if gamma is None else pi / (pi + gamma)
            entropy = -(probs[t] * probs[t].log()).sum()
            loss[t] = -f * batch.advantages[t] - options.get("entropy_coefficient", 0.0) * entropy
        else:
            loss[t] = of_others[t]
    return torch.where(batch.loss_mask, loss, 0.0)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_demonstrations_count_with_their_shaped_probability_and_the_others_as_before(options: dict) -> None:
    dense = groups()
    mask, weight = dense.batch.loss_mask, dense.batch.token_weight
    z = dense.z.clone().requires_grad_()
    output = build_loss("grpo", options)(inputs_for(z, dense.u, dense.batch))
    (gradient,) = torch.autograd.grad((output.token_loss * weight).sum(), z)
    other = dense.z.clone().requires_grad_()
    truth = luffy(dataclasses.replace(dense, z=other), **options)
    (expected,) = torch.autograd.grad((truth * weight).sum(), other)
    torch.testing.assert_close(output.token_loss[mask], truth[mask], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)
    assert all(value[mask].isfinite().all() for value in output.metrics.values())


def test_metrics_tell_demonstrations_from_responses() -> None:
    dense = groups()
    mask, is_shown = dense.batch.loss_mask, dense.batch.is_demonstration
    assert is_shown is not None
    metrics = build_loss("grpo")(inputs_for(dense.z, dense.u, dense.batch)).metrics
    pi = dense.lp.exp()
    shown = mask & is_shown
    assert torch.equal(metrics["grpo/demonstration_share"][mask], is_shown.double()[mask])
    torch.testing.assert_close(metrics["grpo/demonstration_ratio"][shown], pi[shown])
    torch.testing.assert_close(metrics["grpo/demonstration_shaped"][shown], (pi / (pi + 0.1))[shown])
    for name, neutral in (("ratio", 1.0), ("kl_old_k2", 0.0)):
        assert metrics[f"grpo/{name}"][shown].eq(neutral).all(), name
        assert metrics[f"grpo/{name}"][mask & ~is_shown].ne(neutral).all(), f"{name}: nothing has moved"


def test_an_unlikely_token_of_a_demonstration_is_pulled_harder_than_without_shaping() -> None:
    """d f(pi) / d ln pi = gamma pi / (pi + gamma)^2 against pi: near 1 / gamma times as much."""
    z = torch.log(torch.tensor([[1e-4, 1 - 1e-4]], dtype=torch.float64)).requires_grad_()
    one = torch.ones(1, dtype=torch.float64)
    batch = dataclasses.replace(
        batch_of(torch.tensor([0])),
        advantages=one,
        old_logprobs=one,
        is_demonstration=torch.tensor([True]),
    )
    pulls = []
    for shaping in (0.1, None):
        loss = build_loss("grpo", {"shaping": shaping})(inputs_for(z, batch=batch)).token_loss.sum()
        pulls.append(-torch.autograd.grad(loss, z)[0][0, 0].item())
    assert pulls[1] == pytest.approx(1e-4 * (1 - 1e-4), rel=1e-9)
    assert pulls[0] / pulls[1] == pytest.approx(0.1 / (1e-4 + 0.1) ** 2, rel=1e-9)


def test_ts_opsd_at_its_own_start_is_a_way_to_more_entropy() -> None:
    dense = drawn()
    z = dense.z.clone().requires_grad_()
    output = build_loss("ts_opsd", {"tau": 2.0})(inputs_for(z, dense.z, dense.batch))
    own = -(dense.z.softmax(1) * dense.z.log_softmax(1)).sum(1)
    assert (output.metrics["ts_opsd/teacher_entropy"] > own).all()
    (gradient,) = torch.autograd.grad(output.token_loss.mean(), z)
    moved = (dense.z - 0.1 * gradient / gradient.abs().max()).log_softmax(1)
    assert -(moved.exp() * moved).sum(1).mean() > own.mean()


# The same on every split of the vocabulary, and fused with the output layer.

ON_RANKS = [
    (luffy, "grpo", {"clip_low": 1.0, "clip_high": None, "entropy_coefficient": 0.01}),
    (ts_opsd, "ts_opsd", {"tau": 2.0}),
    (ts_opsd, "ts_opsd", {"tau": 2.0, "direction": "forward"}),
    (chord_phi, "chord_phi", {}),
]


def largest_errors() -> dict[str, tuple[float, float]]:
    """On this rank, of each loss on each path: errors of value and gradient, over the truth's scale."""
    size, rank = dist.get_world_size(), dist.get_rank()
    width = -(-V // size)
    stop = min((rank + 1) * width, V)
    columns = Columns(group=dist.group.WORLD, start=rank * width, stop=stop, width=width)
    dense = groups()
    batch, mask, found = dense.batch, dense.batch.loss_mask, {}
    for equation, name, options in ON_RANKS:
        z = dense.z.clone().requires_grad_()
        truth = torch.where(mask, equation(dataclasses.replace(dense, z=z), **options), 0.0)
        (gradient,) = torch.autograd.grad((truth * batch.token_weight).sum(), z)
        loss, ours = build_loss(name, options), (dense.z, dense.u, batch, columns)
        assert loss.is_token_local
        paths = {
            "logits": with_logits(loss, *ours),
            "two passes": fused(loss, *ours, in_one_pass=False),
            "one pass": fused(loss, *ours, in_one_pass=True),
        }
        for path, mine in paths.items():
            error = (mine.token_loss.detach() - truth.detach())[mask].abs().max() / truth.abs().max()
            apart = (mine.gradient - gradient[:, columns.start : columns.stop]).abs().max()
            found[f"{name} {options}, {path}"] = (error.item(), (apart / gradient.abs().max()).item())
    return found


@pytest.mark.parametrize("tp", [1, 2, 3])
def test_every_split_of_the_vocabulary_gives_the_same_value_and_gradient(tp: int) -> None:
    for found in run_ranks(tp, largest_errors):
        assert len(found) == 3 * len(ON_RANKS)
        assert {case: errors for case, errors in found.items() if not max(errors) < 1e-10} == {}
