"""The moving average of bf16 weights is one in fp32, in memory and in checkpoints."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import torch

from tests.distributed.checkpoint_runs import Span, engines, open_store, stored_tensors
from tests.ranks import run_ranks

SPAN = Span(parallel={}, dtype="bf16", reference="moving_average")
DECAY, NUM_UPDATES = 0.99, 20


def follow_a_walk(placement: str) -> list[tuple[float, float]]:
    """A slow teacher: its distance to the fp32 average of the same bf16 policies, and how far that moved."""
    span = Span(parallel={}, dtype="bf16", reference="moving_average", placement=placement)
    with engines(span) as (_, policy, reference):
        assert reference is not None
        reference.section = reference.section.model_copy(update={"decay": DECAY})
        weights = [weight for chunk in policy.chunks for weight in chunk.parameters()]
        teacher = [weight for chunk in reference.chunks for weight in chunk.parameters()]
        start = [weight.detach().float() for weight in weights]
        average = [weight.clone() for weight in start]
        generator = torch.Generator().manual_seed(0)
        for _ in range(NUM_UPDATES):
            with torch.no_grad():
                for weight, own in zip(weights, average, strict=True):
                    weight.add_(
                        0.01 * weight.abs().mean() * torch.randn(weight.shape, generator=generator).abs()
                    )
                    own.mul_(DECAY).add_(weight.float(), alpha=1.0 - DECAY)
            reference.follow(policy.chunks)
        found = reference.averages()
        return [
            (
                float((found[id(weight)] - own).abs().max()) + float((weight - own.bfloat16()).abs().max()),
                float((own - first).abs().max()),
            )
            for weight, own, first in zip(teacher, average, start, strict=True)
        ]


def test_a_slow_teacher_of_a_bf16_policy_is_the_fp32_average_of_its_weights() -> None:
    for placement in ("resident", "offload"):
        (distances,) = run_ranks(1, follow_a_walk, placement, group=True)
        assert all(distance == 0.0 and moved > 0.0 for distance, moved in distances)


def save_as_before(directory: str) -> None:
    """A checkpoint in which the average has the model's dtype."""
    from megatron_sftrl.engine.checkpoint import TrainerState

    with engines(SPAN) as (parallel, policy, reference):
        assert reference is not None
        reference._averages = [{} for _ in reference.chunks]
        open_store(directory, parallel, SPAN).save(TrainerState(step=1), policy, reference)


def load_again(directory: str) -> tuple[str, dict[str, torch.Tensor]]:
    """What loading says, and the averages behind it."""
    from megatron_sftrl.cli import start_logging

    with engines(SPAN) as (parallel, policy, reference):
        assert reference is not None
        for average in reference.averages().values():
            average.zero_()
        store, said = open_store(directory, parallel, SPAN), io.StringIO()
        path = store.latest()
        assert path is not None
        start_logging()
        with contextlib.redirect_stderr(said):
            store.load(path, policy, reference)
        averages = reference.averages()
        found = {
            name: averages[id(weight)].clone() - weight.float()
            for name, weight in reference.chunks[0].named_parameters()
        }
        assert any(average.any() for average in averages.values())
        return said.getvalue(), found


def test_a_checkpoint_of_an_average_in_bf16_is_loaded_with_a_line(tmp_path: Path) -> None:
    run_ranks(1, save_as_before, str(tmp_path))
    stored = stored_tensors(tmp_path / "step-00000001")
    assert {value.dtype for key, value in stored.items() if key.startswith("reference.")} == {torch.bfloat16}
    ((said, differences),) = run_ranks(1, load_again, str(tmp_path))
    assert "holds the moving average in torch.bfloat16" in said
    assert "goes on in fp32" in said
    assert not any(difference.any() for difference in differences.values())
