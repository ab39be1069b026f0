"""Mixtures of experts: every layout of the experts trains the model that one process trains.

The experts that a token visits are a discrete choice: were two router logits equal up to rounding, layouts
could choose differently and part for good. The runs are fp32 and their sizes are chosen so that no token
comes near a tie, which a test below holds them to.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.checkpoint_runs import NUM_STEPS as NUM_SPAN_STEPS
from tests.distributed.checkpoint_runs import Span, run_span
from tests.distributed.memory_runs import policy_and_reference
from tests.distributed.mixture_runs import (
    CLIP_GRAD,
    MIXTRAL,
    QWEN3_MOE,
    MixtureRun,
    clipped_update,
    mixture_layer,
    run_mixture,
    whole_gradients,
)
from tests.distributed.test_checkpoint_resume import DEFAULT_EPS, assert_same_bits, assert_same_stored
from tests.distributed.test_layouts import assert_same_curve, make_config, one_process, step_batches, train
from tests.grid import cases, often
from tests.ranks import RankError, run_ranks

FAMILIES: dict[str, dict[str, Any]] = {"qwen3_moe": QWEN3_MOE, "mixtral": MIXTRAL}
SPLIT = {"tp": 2, "sequence_parallel": True}
SHARDED = {"distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any], int]] = {
    "dp2": (2, {}, 2),
    "ep2": (2, {"ep": 2}, 2),
    "ep2 distributed optimizer": (2, {"ep": 2, **SHARDED}, 2),
    "dp2 distributed optimizer": (2, SHARDED, 2),
    "tp2 etp2": (2, SPLIT, 2),
    "tp2 etp1": (2, {**SPLIT, "etp": 1}, 2),
    "tp2 etp1 ep2": (2, {**SPLIT, "etp": 1, "ep": 2}, 2),
    "tp2 etp1 distributed optimizer": (2, {**SPLIT, "etp": 1, **SHARDED}, 2),
    "pp2": (2, {"pp": 2}, 4),
    "vp2": (2, {"pp": 2, "vp": 2}, 4),
    "cp2": (2, {"cp": 2}, 2),
    "cp2 ep2": (2, {"cp": 2, "ep": 2}, 2),
}
SELDOM = [
    "dp2",
    "tp2 etp1",
    "cp2 ep2",
    "ep2",
    "dp2 distributed optimizer",
    "tp2 etp2",
    "tp2 etp1 distributed optimizer",
    "pp2",
    "vp2",
    "cp2",
]


LAYOUTS_OF_FOUR: dict[str, dict[str, Any]] = {
    "ep2 dp2 distributed optimizer": {"ep": 2, **SHARDED},
    "tp2 etp2 ep2": {**SPLIT, "ep": 2},
    "ep2 pp2": {"ep": 2, "pp": 2},
}


@functools.cache
def truth(family: str) -> MixtureRun:
    """One process, one micro-batch."""
    run = functools.partial(run_mixture, num_microbatches=1)
    return run_ranks(1, run, {}, FAMILIES[family])[0]


def assert_follows(runs: list[MixtureRun], family: str) -> None:
    expected = truth(family)
    for run in runs:
        assert_same_curve(run.curve, expected.curve)
    if not any(run.gradients for run in runs):
        return
    ours, theirs = whole_gradients(runs), whole_gradients([expected])
    assert ours.keys() == theirs.keys()
    for key, gradient in theirs.items():
        # 101 rows of vocabulary, then padding; sums in another order differ by 7e-7 of the norm (measured), a
        # part that is missing or counted twice by 0.5.
        rows = slice(101) if "embedding" in key or "output_layer" in key else slice(None)
        assert (ours[key][rows] - gradient[rows]).norm() <= 1e-5 * gradient[rows].norm(), key


@pytest.mark.parametrize("family", FAMILIES)
def test_no_token_stands_so_close_to_a_tie_that_rounding_could_change_its_experts(family: str) -> None:
    # Layouts move a logit by about 1e-6.
    assert truth(family).smallest_gap > 1e-4, "choose other sizes or another seed for this file"
    first, last = truth(family).curve[0], truth(family).curve[-1]
    assert last[0] < first[0] - 0.5, "nothing is learned: the file is blind"


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        *(("qwen3_moe", layout) for layout in often(LAYOUTS, rarely=SELDOM)),
        # The families share their mixtures' code; they differ in attention, ties and names.
        *(("mixtral", layout) for layout in ("ep2", "vp2")),
    ],
)
def test_every_layout_of_experts_follows_the_one_process_run(family: str, layout: str) -> None:
    world_size, parallel, num_microbatches = LAYOUTS[layout]
    run = functools.partial(run_mixture, num_microbatches=num_microbatches)
    runs = run_ranks(world_size, run, parallel, FAMILIES[family])
    assert_follows(runs, family)
    assert min(run.fewest_tokens for run in runs) == 0, "no expert was ever idle: that case is not covered"


@pytest.mark.parametrize(
    "layout", cases(LAYOUTS_OF_FOUR, rarely=["ep2 pp2", "ep2 dp2 distributed optimizer"])
)
def test_four_ranks_follow_the_one_process_run(layout: str) -> None:
    runs = run_ranks(4, run_mixture, LAYOUTS_OF_FOUR[layout], QWEN3_MOE)
    assert_follows(runs, "qwen3_moe")


@pytest.mark.parametrize("normalizes_weights", [True, False])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_token_gets_the_weighted_sum_of_its_experts(normalizes_weights: bool, dtype: str) -> None:
    run = functools.partial(mixture_layer, normalizes_weights=normalizes_weights, dtype=dtype)
    layer = {name: tensor.float() for name, tensor in run_ranks(1, run)[0].items()}
    hidden = layer["input"]
    logits = hidden @ layer["router"].T
    if dtype == "bf16":
        logits = logits.bfloat16().float()  # as transformers rounds them, before the choice
    weights, chosen = torch.softmax(logits, dim=1).topk(2, dim=1)
    if normalizes_weights:
        weights = weights / weights.sum(dim=1, keepdim=True)
    gate, up = torch.einsum("th,efh->tef", hidden, layer["fc1"]).chunk(2, dim=2)
    outputs = torch.einsum("tef,ehf->teh", torch.nn.functional.silu(gate) * up, layer["fc2"])
    expected = (weights[:, :, None] * outputs.gather(1, chosen[:, :, None].expand(-1, -1, 32))).sum(dim=1)
    # fp32: sums of 32 products in another order. bf16: four roundings at 2^-9 of intermediate values.
    tolerance = 1e-6 if dtype == "fp32" else 1e-2
    assert (layer["output"] - expected).abs().max() <= tolerance * expected.abs().max()


def test_clipping_and_the_learning_rate_reach_the_experts_too() -> None:
    lr, moved = run_ranks(1, clipped_update)[0]
    assert lr == pytest.approx(0.005)  # warming up to 0.01
    # A plain SGD step moves the weights by lr * clip_grad; float32 weights of 0.1 round at 1e-8.
    assert moved == pytest.approx(lr * CLIP_GRAD, rel=1e-3)


def test_a_grid_of_experts_that_the_processes_cannot_form_is_refused() -> None:
    with pytest.raises(
        RankError, match=r"UserError: 2 processes cannot hold experts at etp 2 x ep 2 x pp 1: "
    ):
        run_ranks(2, run_mixture, {**SPLIT, "ep": 2}, QWEN3_MOE)


def is_freed_after_a_step() -> bool:
    from megatron.core import parallel_state

    from megatron_sftrl.engine.parallel import initialize_parallel
    from megatron_sftrl.losses.registry import build_loss

    run = make_config({"ep": 2}, **QWEN3_MOE)
    context = initialize_parallel(run.parallel)
    policy, _ = policy_and_reference(run, context)
    batches = step_batches(0, num_groups=2, group=context.dp_rank, multiple=2, num_microbatches=1)
    policy.forward_backward(batches, build_loss("sft", {}))
    chunk = weakref.ref(policy.chunks[0])
    del policy
    parallel_state.destroy_model_parallel()
    gc.collect()
    return chunk() is None


def test_a_model_that_nobody_holds_is_freed() -> None:
    """Its process groups' threads poll until then."""
    assert run_ranks(2, is_freed_after_a_step) == [True, True]


def test_recomputing_the_activations_changes_no_bit() -> None:
    kept = run_ranks(2, run_mixture, {"ep": 2}, QWEN3_MOE)
    recomputed = run_ranks(2, functools.partial(run_mixture, recompute="full"), {"ep": 2}, QWEN3_MOE)
    assert [run.curve for run in kept] == [run.curve for run in recomputed]


def test_a_moving_reference_sits_beside_the_policy_on_the_experts_layout() -> None:
    curves = run_ranks(2, train, {"ep": 2, **SHARDED}, "curiosft", 2, QWEN3_MOE)
    for curve in curves:
        assert_same_curve(curve, one_process("curiosft", **QWEN3_MOE))


@pytest.mark.parametrize(
    "span",
    [
        Span(parallel={"ep": 2, **SHARDED}, model=QWEN3_MOE, dtype="bf16"),
        Span(parallel={**SPLIT, "etp": 1}, model=MIXTRAL),
    ],
    ids=["ep2 bf16 distributed optimizer", "tp2 etp1"],
)
def test_resuming_a_mixture_on_the_same_layout_is_bitwise(span: Span, tmp_path: Path) -> None:
    span = dataclasses.replace(span, optim=DEFAULT_EPS)
    half = NUM_SPAN_STEPS // 2
    whole = run_ranks(2, run_span, span)
    run_ranks(2, run_span, dataclasses.replace(span, last=half, save=str(tmp_path)))
    resumed = run_ranks(2, run_span, dataclasses.replace(span, load=str(tmp_path)))
    assert resumed[0].step == half
    assert_same_bits(resumed, whole)


CROSSINGS: dict[str, tuple[str, list[tuple[int, dict[str, Any]]]]] = {
    "ep2 -> one -> tp2 etp1": ("fp32", [(2, {"ep": 2}), (1, {}), (2, {**SPLIT, "etp": 1})]),
    "bf16: tp2 etp2 -> ep2 sharded -> tp2 etp1 ep2 sharded -> vp2": (
        "bf16",
        [
            (2, SPLIT),
            (2, {"ep": 2, **SHARDED}),
            (2, {**SPLIT, "etp": 1, "ep": 2, **SHARDED}),
            (2, {"pp": 2, "vp": 2}),
        ],
    ),
}


@pytest.mark.parametrize("crossing", CROSSINGS)
def test_weights_and_moments_of_experts_move_between_layouts_bit_by_bit(
    crossing: str, tmp_path: Path
) -> None:
    dtype, layouts = CROSSINGS[crossing]
    half = NUM_SPAN_STEPS // 2
    folders = [tmp_path / str(i) for i in range(len(layouts))]
    for i, (world_size, parallel) in enumerate(layouts):
        load = str(folders[i - 1]) if i else None
        span = Span(
            parallel=parallel, model=QWEN3_MOE, dtype=dtype, last=half, load=load, save=str(folders[i])
        )
        run_ranks(world_size, run_span, span)
        if i:
            assert_same_stored(folders[0], folders[i], half)


def test_a_mixture_resumed_on_another_layout_goes_on_as_if_never_interrupted(tmp_path: Path) -> None:
    half = NUM_SPAN_STEPS // 2
    source = Span(parallel={"ep": 2, **SHARDED}, model=QWEN3_MOE)
    target = Span(parallel={**SPLIT, "etp": 1}, model=QWEN3_MOE)
    run_ranks(2, run_span, dataclasses.replace(source, last=half, save=str(tmp_path)))
    resumed = run_ranks(2, run_span, dataclasses.replace(target, load=str(tmp_path)))
    whole = run_ranks(2, run_span, target)
    for ours, theirs in zip(resumed, whole, strict=True):
        # The first half was computed on another layout: fp32 sums in another order give 1e-6 here.
        torch.testing.assert_close(
            torch.tensor(ours.metrics), torch.tensor(theirs.metrics[half:]), rtol=2e-5, atol=2e-5
        )
