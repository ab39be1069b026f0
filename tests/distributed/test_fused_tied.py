"""The tied weight's two gradients, fused and under sequence parallelism: every shard and every copy of it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sftrl.models.architecture import padded_vocab_size
from megatron_sftrl.vocab_parallel import output_layer
from tests.distributed.memory_runs import policy_and_reference
from tests.distributed.mixture_runs import Place, main_gradients
from tests.distributed.test_layouts import LOSSES, VOCAB_SIZE, make_config, step_batches
from tests.ranks import run_ranks

EMBEDDING = "embedding.word_embeddings.weight"
SP = {"tp": 2, "sequence_parallel": True}
LAYOUTS = {"sp": (2, SP), "sp pp2": (4, {**SP, "pp": 2})}


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a rank saw of one step; gradients of all shards it holds, before clipping."""

    loss: float
    grad_norm: float
    gradients: list[tuple[Place, Tensor]]


def step(parallel: dict[str, Any], loss_name: str, fused: str) -> Step:
    """Two micro-batches through a tied model, in chunks of 7 tokens; on every rank."""
    from megatron.core import parallel_state

    from megatron_sftrl.engine.parallel import initialize_parallel
    from megatron_sftrl.losses.registry import build_loss

    loss = build_loss(loss_name, LOSSES[loss_name])
    section = {"kind": "frozen"} if "reference" in loss.needs else None
    run = make_config(parallel, loss=loss_name, fused=fused, reference=section, tie_embeddings=True)
    context = initialize_parallel(run.parallel)
    policy, reference = policy_and_reference(run, context)
    batches = step_batches(0, num_groups=1, group=0, multiple=2 * context.tp_size, num_microbatches=2)
    with pytest.MonkeyPatch.context() as patch:
        columns = padded_vocab_size(VOCAB_SIZE, run.parallel.tp) // run.parallel.tp
        patch.setattr(output_layer, "CPU_LOGITS_BYTES", 7 * 4 * columns)
        report = policy.forward_backward(batches, loss, reference)
    gradients = main_gradients(policy.chunks, all_copies=True)
    update = policy.optim_step(0, num_steps=1)
    parallel_state.destroy_model_parallel()
    return Step(loss=report.loss, grad_norm=update.grad_norm, gradients=gradients)


@functools.cache
def one_process(loss_name: str) -> tuple[Step, dict[str, Tensor]]:
    """With all logits in memory; its gradients by key, layers stacked."""
    (truth,) = run_ranks(1, step, {}, loss_name, "off")
    whole: dict[str, Tensor] = {}
    for (key, shape, offset), gradient in truth.gradients:
        target = whole.setdefault(key, torch.full(shape, torch.nan))
        target[box_of(offset, gradient)] = gradient.view(target[box_of(offset, gradient)].shape)
    return truth, whole


def box_of(offset: tuple[int, ...], shard: Tensor) -> tuple[slice, ...]:
    """Where a shard lies in its whole tensor; stacked axes come first."""
    shape = (1,) * (len(offset) - shard.dim()) + tuple(shard.shape)
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


# gift takes one pass, and its reference is tied and cut in the same way; pear takes two passes.
@pytest.mark.parametrize("loss_name", ["gift", "pear"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_tied_weight_gets_both_of_its_gradients(layout: str, loss_name: str) -> None:
    world_size, parallel = LAYOUTS[layout]
    truth, whole = one_process(loss_name)
    holders = 0
    for ours in run_ranks(world_size, step, parallel, loss_name, "on"):
        assert ours.loss == pytest.approx(truth.loss, rel=1e-6)
        assert ours.grad_norm == pytest.approx(truth.grad_norm, rel=1e-5)
        for (key, shape, offset), gradient in ours.gradients:
            expected = torch.zeros(shape)  # rows that fill the vocabulary up have no gradient
            expected[tuple(slice(size) for size in whole[key].shape)] = whole[key]
            expected = expected[box_of(offset, gradient)].view(gradient.shape)
            difference = float((gradient - expected).abs().max())
            assert difference <= 1e-5 * float(whole[key].abs().max()), f"{key} at {offset}: {difference}"
            holders += key == EMBEDDING
    # On the last stage the same key is the output layer's copy.
    assert holders == world_size
