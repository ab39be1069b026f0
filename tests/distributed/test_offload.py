"""A training state that leaves between two steps changes no bit of the run, and leaves nothing behind."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from megatron_sftrl.models.architecture import from_section
from tests.distributed.mixture_runs import QWEN3_MOE
from tests.distributed.test_layouts import make_config, step_batches
from tests.grid import cases
from tests.ranks import run_ranks

NUM_STEPS = 4
OVERLAPPED = {"distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}

# Ranks, layout, dtype, model, optimizer.
CASES: dict[str, tuple[int, dict[str, Any], str, dict[str, Any], dict[str, Any]]] = {
    "fp32": (1, {}, "fp32", {}, {}),
    "bf16": (1, {}, "bf16", {}, {}),
    "sgd with momentum": (1, {}, "bf16", {}, {"name": "sgd", "momentum": 0.9}),
    "fp32, dp2, distributed optimizer": (2, OVERLAPPED, "fp32", {}, {}),
    "bf16, dp2, distributed optimizer": (2, OVERLAPPED, "bf16", {}, {}),
    "bf16, tp2 pp2": (4, {"tp": 2, "pp": 2}, "bf16", {}, {}),
    "bf16, experts over two ranks": (2, {"ep": 2}, "bf16", QWEN3_MOE, {}),
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a rank saw.

    Args:
        curve: (loss, gradient norm) of each step.
        weights: bytes of every parameter at the end.
        num_elements: parameters that this rank holds.
        freed: bytes of tensors' memory that were gone while the state was away, after the first step.
        scores: log-probabilities just before the state left, and while it was away.
    """

    curve: list[tuple[float, float]]
    weights: list[bytes]
    num_elements: int
    freed: int
    scores: list[list[list[float]]]


def run(parallel: dict, dtype: str, model: dict, optim: dict, leaves: bool) -> Outcome:
    from megatron.core import parallel_state

    from megatron_sftrl.engine.parallel import initialize_parallel
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.losses.registry import build_loss

    run = make_config(parallel, **model)
    run = run.model_copy(
        update={
            "model": run.model.model_copy(update={"dtype": dtype}),
            "optim": run.optim.model_copy(update=optim),
        }
    )
    assert run.model.architecture is not None
    context = initialize_parallel(run.parallel)
    policy = PolicyEngine(from_section(run.model.architecture), run, context)
    state = policy.training_state
    assert state is not None
    curve, freed, scores = [], 0, []
    for step in range(NUM_STEPS):
        batches = step_batches(
            step, num_groups=context.dp_size, group=context.dp_rank, multiple=1, num_microbatches=2
        )
        report = policy.forward_backward(batches, build_loss("sft", {}))
        curve.append((report.loss, policy.optim_step(step, num_steps=NUM_STEPS).grad_norm))
        if not leaves:
            continue
        policy.gather_parameters()
        scores = [logprobs_of(policy, batches)]
        before = storage_bytes()
        state.leave()
        freed = freed or before - storage_bytes()
        with pytest.raises(AssertionError, match="comes back"):
            policy.zero_gradients()
        scores.append(logprobs_of(policy, batches))
        state.come_back()
        assert storage_bytes() == before
    policy.gather_parameters()
    parameters = [parameter for chunk in policy.chunks for parameter in chunk.parameters()]
    outcome = Outcome(
        curve=curve,
        weights=[
            bytes(each.detach().contiguous().view(torch.uint8).flatten().tolist()) for each in parameters
        ],
        num_elements=sum(each.numel() for each in parameters),
        freed=freed,
        scores=scores,
    )
    parallel_state.destroy_model_parallel()
    return outcome


def logprobs_of(policy: Any, batches: list) -> list[list[float]]:
    with policy.evaluation():
        return [
            each[0].tolist() for each in policy.token_numbers(batches, lambda p, _, ids: [p.logprobs(ids)])
        ]


def storage_bytes() -> int:
    """Memory of all tensors that Python knows, what several share counted once."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    # Tables of the last 32 lengths, those of other tests among them.
    RotaryEmbedding.forward.cache_clear()
    gc.collect()
    storages = (each.untyped_storage() for each in gc.get_objects() if issubclass(type(each), torch.Tensor))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize("name", cases(CASES, rarely=["bf16, tp2 pp2", "fp32, dp2, distributed optimizer"]))
def test_a_run_whose_state_leaves_between_its_steps_is_the_same_run(name: str) -> None:
    world_size, parallel, dtype, model, optim = CASES[name]
    undisturbed, disturbed = (
        run_ranks(world_size, run, parallel, dtype, model, optim, leaves) for leaves in (False, True)
    )
    for ours, truth in zip(disturbed, undisturbed, strict=True):
        assert ours.curve == truth.curve
        assert ours.weights == truth.weights
        assert ours.scores[0] == ours.scores[1]
        # All fp32: gradients; of the rank's share of the elements the moments, and the weights behind bf16.
        num_kinds = (1 if optim else 2) + (dtype == "bf16")
        share = world_size if "distributed_optimizer" in parallel else 1
        assert ours.freed >= 4 * truth.num_elements * (1 + num_kinds * 0.95 / share)
    assert {metric for ours in undisturbed for metric in ours.curve} != {(0.0, 0.0)}
