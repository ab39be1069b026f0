"""Metrics of a step are averages over all of its loss tokens, or refused; and a loss has a gradient."""

from __future__ import annotations

import pytest
import torch

from megatron_sftrl.losses.api import LossInputs, LossOptions, LossOutput
from megatron_sftrl.losses.registry import Loss
from megatron_sftrl.vocab_parallel import output_layer
from tests.distributed.test_layouts import VOCAB_SIZE, make_config, step_batches
from tests.ranks import run_ranks


def step(parallel: dict, kind: str, fused: str, num_microbatches: int) -> str | dict[str, float]:
    """The message of a step's error, or its metrics, gradient norm and whether it trained."""
    from megatron.core import parallel_state

    from megatron_sftrl.engine.parallel import initialize_parallel
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.errors import UserError
    from megatron_sftrl.models.architecture import from_section

    config = make_config(parallel, fused=fused)
    assert config.model.architecture is not None
    context = initialize_parallel(config.parallel)
    policy = PolicyEngine(from_section(config.model.architecture), config, context)
    batches = step_batches(
        0,
        num_groups=context.dp_size,
        group=context.dp_rank,
        multiple=2 * context.cp_size,
        num_microbatches=num_microbatches,
    )
    loss = named_by(kind, context.dp_rank)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(output_layer, "CPU_LOGITS_BYTES", 8 * 4 * VOCAB_SIZE)
            report = policy.forward_backward(batches, loss)
        update = policy.optim_step(0, num_steps=1)
        return {**report.metrics, "trained": report.is_trained, "grad_norm": update.grad_norm}
    except UserError as error:
        return str(error)
    finally:
        parallel_state.destroy_model_parallel()


def named_by(kind: str, dp_rank: int) -> Loss:
    """A negative log-likelihood with metrics `mine/all`, and `mine/some` as `kind` says."""
    calls: list[LossInputs] = []

    def function(inputs: LossInputs, _: object) -> LossOutput:
        calls.append(inputs)
        logprobs = inputs.policy.logprobs(inputs.batch.labels)
        ones = torch.ones_like(logprobs).detach()
        gives = {"always": True, "call": len(calls) == 2, "rank": dp_rank == 1, "detached": True}[kind]
        metrics = {"mine/all": ones, **({"mine/some": 2 * ones} if gives else {})}
        if kind == "rank" and dp_rank == 0:
            metrics["mine/other"] = ones  # as many names on both ranks, and not the same
        return LossOutput(
            token_loss=-(logprobs.detach() if kind == "detached" else logprobs), metrics=metrics
        )

    return Loss(name="mine", config=LossOptions(), needs=(), function=function, is_token_local=True)


MICROBATCH = (
    "'mine/some' is given for micro-batch 1 of data-parallel rank 0, and not for micro-batch 0 of data-p"
)
PARTS = (
    "'mine/some' is given for some tokens of micro-batch 0 of data-parallel rank 0, and not for micro-batch 0"
)
RANKS = "'mine/other' is given for micro-batch 0 of data-parallel rank 0, and not for micro-batch 0 of data-p"


@pytest.mark.parametrize(
    ("world_size", "parallel", "kind", "fused", "num_microbatches", "told"),
    [
        (1, {}, "call", "off", 2, MICROBATCH),
        (1, {}, "call", "on", 1, PARTS),
        (2, {}, "rank", "off", 1, RANKS),
        (2, {"pp": 2}, "call", "off", 2, MICROBATCH),
        (2, {"cp": 2}, "call", "off", 2, MICROBATCH),
    ],
    ids=["micro-batches", "chunks of tokens", "ranks", "stages", "context parallel"],
)
def test_a_metric_that_some_of_the_tokens_lack_is_refused_on_every_rank(
    world_size: int, parallel: dict, kind: str, fused: str, num_microbatches: int, told: str
) -> None:
    for message in run_ranks(world_size, step, parallel, kind, fused, num_microbatches):
        assert isinstance(message, str)
        assert message.startswith("loss 'mine': metric ")
        assert told in message


@pytest.mark.parametrize("fused", ["off", "on"])
@pytest.mark.parametrize("kind", ["always", "detached"])
def test_a_loss_that_stops_its_own_gradient_is_known_by_it(kind: str, fused: str) -> None:
    (found,) = run_ranks(1, step, {}, kind, fused, 2)
    assert isinstance(found, dict)
    # 1e-6: sums of fp32 weights.
    assert (found["mine/all"], found["mine/some"]) == pytest.approx((1.0, 2.0), rel=1e-6)
    assert found["trained"] == (found["grad_norm"] > 0) == (kind == "always")
