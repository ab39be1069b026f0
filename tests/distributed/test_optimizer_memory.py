"""Optimizers that keep less on the GPU: in two memories, or with moments in bf16, they train and resume."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.checkpoint_runs import NUM_STEPS, Outcome, Span, engines, run_span, stored_tensors
from tests.distributed.optimizer_stand_ins import gpu_optimizers
from tests.distributed.test_layouts import step_batches
from tests.ranks import run_ranks

HALF = NUM_STEPS // 2
DISTRIBUTED = {"distributed_optimizer": True}
OVERLAPPED = {"distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
LOW = {"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}
CASES: dict[str, tuple[int, Span]] = {
    "half on the CPU": (1, Span(parallel=DISTRIBUTED, dtype="bf16", optim={"cpu_offload": 0.5})),
    "all on the CPU, dp2": (2, Span(parallel=OVERLAPPED, dtype="bf16", optim={"cpu_offload": 1.0})),
    "bf16 moments": (1, Span(parallel=DISTRIBUTED, dtype="bf16", optim=LOW)),
    "a bf16 second moment, dp2": (
        2,
        Span(parallel=OVERLAPPED, dtype="bf16", optim={"exp_avg_sq_dtype": "bf16"}),
    ),
}


def run_on_gpu(span: Span) -> Outcome:
    with gpu_optimizers():
        return run_span(span)


def state_after_steps(span: Span, num_steps: int, leaves: bool = False) -> dict[str, Any]:
    """Of one rank: where tensors are, and fp32 weights and moments, by number of the parameter."""
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

    from megatron_sftrl.engine.checkpoint.tensors import optimizer_shares, optimizer_step
    from megatron_sftrl.engine.optimizer import leaves as leaves_of
    from megatron_sftrl.losses.registry import build_loss

    with gpu_optimizers(), engines(span) as (parallel, policy, _):
        assert policy.optimizer is not None
        assert policy.training_state is not None
        norms = []
        for step in range(num_steps):
            batches = step_batches(
                step, num_groups=parallel.dp_size, group=parallel.dp_rank, multiple=1, num_microbatches=2
            )
            policy.forward_backward(batches, build_loss("sft", {}))
            norms.append(policy.optim_step(step, num_steps=NUM_STEPS).grad_norm)
            if leaves:
                policy.training_state.leave()
                policy.training_state.come_back()
        shares = optimizer_shares(policy.optimizer)
        hybrids = [
            leaf.optimizer
            for leaf in leaves_of(policy.optimizer)
            if isinstance(leaf.optimizer, HybridDeviceOptimizer)
        ]
        return {
            "norms": norms,
            "step": optimizer_step(policy.optimizer),
            "tensors": [
                {kind: value.detach().clone() for kind, value in share.tensors.items()} for share in shares
            ],
            "offloaded": sum(len(each.cpu_copys_map_gpu_param) for each in hybrids),
            "hybrids": len(hybrids),
        }


def close(ours: list[dict[str, Tensor]], theirs: list[dict[str, Tensor]], *, rtol: float) -> None:
    assert len(ours) == len(theirs) > 10
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys() == {"exp_avg", "exp_avg_sq", "main_param"}
        for kind in mine:
            torch.testing.assert_close(
                mine[kind].float(), other[kind].float(), rtol=rtol, atol=1e-9, msg=kind
            )


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_step_in_two_memories_is_the_step_of_one(share: float) -> None:
    plain = Span(parallel=DISTRIBUTED, dtype="bf16")
    offloaded = dataclasses.replace(plain, optim={"cpu_offload": share})
    (expected,), (found,) = (run_ranks(1, state_after_steps, span, 1) for span in (plain, offloaded))
    assert expected["hybrids"] == 0
    assert found["hybrids"] == 1
    total = len(found["tensors"])
    assert (0 < found["offloaded"] < total) if share < 1 else found["offloaded"] == total
    assert found["norms"] == expected["norms"]
    # Two implementations of AdamW in fp32: rounding.
    close(found["tensors"], expected["tensors"], rtol=1e-5)


def test_a_step_with_bf16_moments_rounds_the_moments_alone() -> None:
    plain = Span(parallel=DISTRIBUTED, dtype="bf16")
    (expected,), (found,) = (
        run_ranks(1, state_after_steps, span, 1) for span in (plain, dataclasses.replace(plain, optim=LOW))
    )
    assert {each["exp_avg"].dtype for each in found["tensors"]} == {torch.bfloat16}
    assert {each["main_param"].dtype for each in found["tensors"]} == {torch.float32}
    assert found["norms"] == expected["norms"]
    close(found["tensors"], expected["tensors"], rtol=2**-8)
    for mine, other in zip(found["tensors"], expected["tensors"], strict=True):
        torch.testing.assert_close(mine["main_param"], other["main_param"], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_a_clipped_gradient_is_clipped_there_too(name: str) -> None:
    """The gradients lie elsewhere than in .grad: an optimizer of which none is clipped moves the same way."""
    _, span = CASES[name]
    span = dataclasses.replace(span, optim={**span.optim, "clip_grad": 0.01, "betas": (0.9, 0.95)})
    (found,) = run_ranks(1, state_after_steps, span, 1)
    total = sum(float(each["exp_avg"].float().square().sum()) for each in found["tensors"])
    assert found["norms"][0] > 0.1
    assert total**0.5 == pytest.approx(0.01 * (1 - 0.9), rel=1e-2)


@pytest.mark.parametrize("name", CASES)
def test_resuming_is_bitwise(name: str, tmp_path: Path) -> None:
    num_ranks, span = CASES[name]
    whole = run_ranks(num_ranks, run_on_gpu, span)
    run_ranks(num_ranks, run_on_gpu, dataclasses.replace(span, last=HALF, save=str(tmp_path)))
    resumed = run_ranks(num_ranks, run_on_gpu, dataclasses.replace(span, load=str(tmp_path)))
    for ours, theirs in zip(resumed, whole, strict=True):
        assert ours.step == HALF
        assert ours.metrics == theirs.metrics[HALF:]
        assert [name for name in theirs.state if name.startswith("policy.")]
        for key, value in theirs.state.items():
            assert torch.equal(ours.state[key], value), key


@pytest.mark.parametrize("name", CASES)
def test_a_state_that_leaves_the_device_comes_back(name: str) -> None:
    num_ranks, span = CASES[name]
    undisturbed, disturbed = (
        run_ranks(num_ranks, state_after_steps, span, 3, leaves) for leaves in (False, True)
    )
    for ours, theirs in zip(disturbed, undisturbed, strict=True):
        assert ours["norms"] == theirs["norms"]
        assert ours["step"] == theirs["step"] == 3
        for mine, other in zip(ours["tensors"], theirs["tensors"], strict=True):
            assert all(torch.equal(mine[kind], other[kind]) for kind in other)


@pytest.mark.parametrize("name", ["half on the CPU", "bf16 moments"])
def test_a_plain_optimizer_goes_on_from_there_and_back(name: str, tmp_path: Path) -> None:
    """Checkpoints do not say where the state was: each kind reads the other's."""
    _, special = CASES[name]
    plain = dataclasses.replace(special, optim={})
    for first, second in ((special, plain), (plain, special)):
        directory = str(tmp_path / ("there" if first is special else "back"))
        run_ranks(1, run_on_gpu, dataclasses.replace(first, last=HALF, save=directory))
        stored = stored_tensors(next(Path(directory).iterdir()))
        span = dataclasses.replace(second, first=HALF, last=HALF, load=directory, save=f"{directory} again")
        run_ranks(1, run_on_gpu, span)
        again = stored_tensors(next(Path(f"{directory} again").iterdir()))
        assert stored.keys() == again.keys()
        for key, value in stored.items():
            torch.testing.assert_close(again[key].float(), value.float(), rtol=2**-8, atol=0, msg=key)


def how_weights_move() -> set[tuple[str, bool]]:
    """Class of each inner optimizer, and whether a weight is read and written once."""
    from megatron_sftrl.engine.optimizer import inner_optimizers
    from megatron_sftrl.engine.optimizer import leaves as leaves_of

    with engines(Span(parallel={})) as (_, policy, _):
        assert policy.optimizer is not None
        inner = [each for leaf in leaves_of(policy.optimizer) for each in inner_optimizers(leaf)]
        return {(type(each).__name__, group["fused"]) for each in inner for group in each.param_groups}


def test_torchs_adamw_moves_a_weight_in_one_pass() -> None:
    assert run_ranks(1, how_weights_move) == [{("AdamW", True)}]


def test_that_pass_moves_a_part_of_a_tensor_as_the_whole() -> None:
    """Or the distributed optimizer, which cuts anywhere, would train another model."""
    torch.manual_seed(0)
    weights, gradients = torch.randn(10_007), torch.randn(4, 10_007)

    def moved(part: slice) -> Tensor:
        weight = torch.nn.Parameter(weights[part].clone())
        optimizer = torch.optim.AdamW([weight], lr=1e-3, weight_decay=0.1, fused=True)
        for gradient in gradients:
            weight.grad = gradient[part].clone()
            optimizer.step()
        return weight.detach()

    whole = moved(slice(None))
    for part in (slice(0, 1), slice(3, 5001), slice(5001, 10_007)):
        assert torch.equal(moved(part), whole[part])
