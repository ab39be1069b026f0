"""Micro-batches of one step on both sides of the length from which the output layer is fused."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from megatron_sftrl.losses.api import LossInputs, LossOutput
from megatron_sftrl.losses.registry import Loss, build_loss
from megatron_sftrl.types import TokenBatch
from megatron_sftrl.vocab_parallel import output_layer
from tests.distributed.test_layouts import LOSSES, make_config, step_batches
from tests.ranks import run_ranks

LONG, SHORT, THRESHOLD = 24, 12, 16
SHARDED = {"distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a rank has after a step: main gradients, which ways to logits it took, marks left on weights."""

    gradients: dict[str, Tensor]
    ways: set[str]
    num_marks: int


def step(
    parallel: dict, lengths: list[list[int]], fused: str, loss_name: str, *, tied: bool, fails_first: bool
) -> Step:
    """One step of micro-batches of `lengths[dp_rank]` tokens; on every rank."""
    from megatron.core import parallel_state

    from megatron_sftrl.engine.parallel import initialize_parallel
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.models.architecture import from_section

    config = make_config(parallel, loss=loss_name, fused=fused, tie_embeddings=tied)
    assert config.model.architecture is not None
    context = initialize_parallel(config.parallel)
    policy = PolicyEngine(from_section(config.model.architecture), config, context)
    loss = build_loss(loss_name, LOSSES[loss_name])
    batches = [of_length(length, seed) for seed, length in enumerate(lengths[context.dp_rank])]
    ways: set[str] = set()
    model = policy.chunks[-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output_layer, "logits_bytes", lambda row_bytes, _: THRESHOLD * row_bytes)
        for name in ("logits", "output"):
            patch.setattr(model, name, noting(ways, name, getattr(model, name)))
        if fails_first:
            with pytest.raises(RuntimeError, match="a passing fault"):
                policy.forward_backward(batches, failing_at_the_second(loss))
        policy.forward_backward(batches, loss)
    named = dict(model.named_parameters())
    parallel_state.destroy_model_parallel()
    return Step(
        gradients={name: value.main_grad.clone() for name, value in named.items()},  # type: ignore[attr-defined]
        ways=ways,
        num_marks=sum(value.grad_added_to_main_grad for value in named.values()),  # type: ignore[attr-defined]
    )


def noting(ways: set[str], name: str, make):
    def call(*args, **options):
        ways.add(name)
        return make(*args, **options)

    return call


def of_length(length: int, seed: int) -> TokenBatch:
    """A micro-batch of one sequence."""
    (batch,) = step_batches(seed, num_groups=1, group=0, multiple=1, num_microbatches=1)
    cu_seqlens = torch.tensor([0, length], dtype=torch.int32)
    return batch.map(lambda value: value[:length], cu_seqlens=cu_seqlens)


def failing_at_the_second(loss: Loss) -> Loss:
    """The same loss, until it is asked for a second micro-batch."""
    calls: list[int] = []

    def function(inputs: LossInputs, _: object) -> LossOutput:
        calls.append(inputs.batch.num_tokens)
        if len(calls) == 2:
            raise RuntimeError("a passing fault")
        return loss(inputs)

    return Loss(name="fails", config=loss.config, needs=(), function=function)


def assert_same_gradients(found: Step, expected: Step) -> None:
    for name, gradient in expected.gradients.items():
        scale = float(gradient.abs().max())
        assert scale > 0, f"{name} has no gradient: the test is blind"
        difference = float((found.gradients[name] - gradient).abs().max())
        assert difference <= 1e-5 * scale, f"{name}: {difference} of {scale}"


# sft is fused in one pass, pear in two.
@pytest.mark.parametrize("loss_name", ["sft", "pear"])
@pytest.mark.parametrize("lengths", [[LONG, SHORT], [SHORT, LONG]])
@pytest.mark.parametrize("tied", [False, True])
def test_a_long_microbatch_leaves_the_gradients_of_a_short_one(
    loss_name: str, lengths: list[int], tied: bool
) -> None:
    asked = {"tied": tied, "fails_first": False}
    (expected,) = run_ranks(1, run_step, {}, [lengths], "off", loss_name, asked)
    (found,) = run_ranks(1, run_step, {}, [lengths], "auto", loss_name, asked)
    assert_same_gradients(found, expected)
    assert (found.ways, found.num_marks) == ({"output"}, 0)


def test_a_step_after_one_that_failed_has_its_own_gradients() -> None:
    lengths = [[LONG, SHORT]]
    expected, found = (
        run_ranks(1, run_step, {}, lengths, "auto", "sft", {"tied": False, "fails_first": fails})[0]
        for fails in (False, True)
    )
    assert_same_gradients(found, expected)


@pytest.mark.parametrize("parallel", [{}, SHARDED], ids=["plain", "sharded"])
def test_one_rank_with_a_long_microbatch_decides_for_all(parallel: dict) -> None:
    """A distributed optimizer reduces each rank's own share, so each is compared with the same rank's."""
    lengths, asked = [[LONG], [SHORT]], {"tied": False, "fails_first": False}
    expected = run_ranks(2, run_step, parallel, lengths, "off", "sft", asked)
    for found, truth in zip(
        run_ranks(2, run_step, parallel, lengths, "auto", "sft", asked), expected, strict=True
    ):
        assert_same_gradients(found, truth)
        assert found.ways == {"output"}


def run_step(parallel: dict, lengths: list[list[int]], fused: str, loss_name: str, asked: dict) -> Step:
    return step(parallel, lengths, fused, loss_name, **asked)
