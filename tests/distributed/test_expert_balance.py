"""The load-balancing loss of mixtures: gradients against the formula, every layout against one process."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.mixture_runs import (
    QWEN3_MOE,
    BalanceGradients,
    MixtureRun,
    balance_gradients,
    run_mixture,
    whole_gradients,
)
from tests.distributed.test_layouts import assert_same_curve
from tests.grid import cases
from tests.ranks import run_ranks

SPLIT = {"tp": 2, "sequence_parallel": True}
# As strong as the loss itself, or an error in it would hide behind the loss.
COEFFICIENT = 1.0
balanced = functools.partial(run_mixture, aux_loss_coeff=COEFFICIENT)


@functools.cache
def truth() -> MixtureRun:
    """One process, two micro-batches: every second sequence each."""
    return run_ranks(1, balanced, {}, QWEN3_MOE)[0]


@functools.cache
def alone() -> BalanceGradients:
    return run_ranks(1, balance_gradients, COEFFICIENT)[0]


def formula(hidden: Tensor, router: Tensor, is_padding: Tensor) -> Tensor:
    """E sum_i f_i P_i over the real tokens, two experts each, float64."""
    probabilities = torch.softmax(hidden[~is_padding] @ router.T, dim=1)
    num_tokens, num_experts = probabilities.shape
    chosen = probabilities.topk(2, dim=1).indices
    choices = torch.bincount(chosen.flatten(), minlength=num_experts)
    return num_experts * (choices / (2 * num_tokens) * probabilities.mean(dim=0)).sum()


def test_the_loss_of_a_micro_batch_and_the_gradient_of_the_last_router_are_the_formulas() -> None:
    found = alone()
    values = []
    for hidden, router in zip(found.router_inputs, found.routers, strict=True):
        last = router.double().requires_grad_()
        value = formula(hidden.double(), last, found.is_padding)
        values.append(float(value.detach()))
        value.backward()
    assert found.balance == pytest.approx(sum(values) / len(values), rel=1e-6)
    assert last.grad is not None
    # A difference of two fp32 gradients, each of order 1.
    assert (found.router_gradient - COEFFICIENT * last.grad).norm() <= 2e-6
    assert last.grad.norm() > 1e-2


def test_the_gradient_of_all_weights_is_the_slope_of_the_loss() -> None:
    """Through hidden states into earlier layers: central difference along the gradient itself."""
    found = alone()
    # fp32 rounding of a loss of order 1, over the step, is 1e-4 of this slope. At thrice the step some
    # token's choice changes, and with it the slope.
    assert found.slope == pytest.approx(found.gradient_norm, rel=1e-3)


LAYOUTS: dict[str, tuple[int, dict[str, Any], int]] = {
    "dp2": (2, {}, 1),
    "ep2": (2, {"ep": 2, "distributed_optimizer": True}, 1),
    "tp2 etp1 ep2": (2, {**SPLIT, "etp": 1, "ep": 2}, 2),
    "cp2": (2, {"cp": 2}, 2),
    "tp2 pp2": (4, {**SPLIT, "pp": 2}, 2),
}


@pytest.mark.parametrize("layout", cases(LAYOUTS, rarely=["dp2", "tp2 etp1 ep2"]))
def test_every_layout_with_the_same_micro_batches_follows_one_process(layout: str) -> None:
    assert truth().smallest_gap > 1e-4, "a token is close to a tie, see test_mixtures.py: another coefficient"
    world_size, parallel, num_microbatches = LAYOUTS[layout]
    run = functools.partial(balanced, num_microbatches=num_microbatches)
    runs = run_ranks(world_size, run, parallel, QWEN3_MOE)
    for each in runs:
        assert_same_curve(each.curve, truth().curve)
        assert each.balance == pytest.approx(truth().balance, rel=1e-5)
    ours, theirs = whole_gradients(runs), whole_gradients([truth()])
    for key in ours:
        rows = slice(101) if "embedding" in key or "output_layer" in key else slice(None)
        # As in test_mixtures.py.
        assert (ours[key][rows] - theirs[key][rows]).norm() <= 1e-5 * theirs[key][rows].norm(), key


def test_the_balance_is_learned_and_recomputation_counts_it_once() -> None:
    # On the same sequences, nine steps apart; with a coefficient of 0.05 it falls by 0.002.
    assert truth().balance[-1] < truth().balance[2] - 0.03
    recomputed = run_ranks(1, functools.partial(balanced, recompute="full"), {}, QWEN3_MOE)[0]
    assert (recomputed.curve, recomputed.balance) == (truth().curve, truth().balance)


def test_a_micro_batch_of_padding_alone_changes_nothing() -> None:
    """As a replica without sequences runs it."""
    eight, nine = (
        run_ranks(1, functools.partial(balanced, num_microbatches=number), {}, QWEN3_MOE)[0]
        for number in (8, 9)
    )
    assert_same_curve(nine.curve, eight.curve)
    assert nine.balance == pytest.approx(eight.balance, rel=1e-6)
    assert eight.balance[0] > truth().balance[0] + 0.01  # smaller micro-batches are less balanced
