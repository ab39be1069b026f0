"""Fusing is decided from sizes, before anything is gathered or multiplied; how often logits are then made."""

from __future__ import annotations

import pytest
import torch

from megatron_sftrl.config.schema import ParallelSection
from megatron_sftrl.engine.objective import Objective, OutputHead
from megatron_sftrl.types import TokenBatch
from megatron_sftrl.vocab_parallel import OutputLayer, output_layer
from tests.distributed.test_layouts import VOCAB_SIZE, make_config, step_batches
from tests.ranks import run_ranks


def calls(fused: str, num_tokens: int) -> list[str]:
    """Which of the model's two ways to its logits are taken for a chunk of 16 tokens, at tp 2 with sp."""
    from megatron.core import parallel_state

    from megatron_sftrl.engine.parallel import initialize_parallel
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.models.architecture import from_section

    parallel = {"tp": 2, "sequence_parallel": True}
    config = make_config(parallel)
    assert config.model.architecture is not None
    context = initialize_parallel(ParallelSection.model_validate(parallel))
    model = PolicyEngine(from_section(config.model.architecture), config, context).chunks[-1]
    taken: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("logits", "output"):
            patch.setattr(model, name, recording(taken, name, getattr(model, name)))
        columns = model.output_weight().shape[0]
        patch.setattr(output_layer, "CPU_LOGITS_BYTES", 16 * columns * 4)
        objective = Objective(
            vocab_size=VOCAB_SIZE,
            parallel=context,
            fused=fused,  # type: ignore[arg-type]
            dtype=torch.float32,
        )
        states = torch.ones(num_tokens // 2, 1, config.model.architecture.hidden_size)
        head = OutputHead(model=model, hidden_states=states)
        distribution = objective.distribution(head, longest=num_tokens)
        assert distribution.num_tokens == num_tokens
    parallel_state.destroy_model_parallel()
    return taken


def recording(taken: list[str], name: str, function):
    def call(*args, **options):
        taken.append(name)
        return function(*args, **options)

    return call


@pytest.mark.parametrize(
    ("fused", "num_tokens", "way"),
    [("auto", 16, "logits"), ("auto", 18, "output"), ("on", 16, "output"), ("off", 18, "logits")],
)
def test_one_way_is_taken_and_the_other_left_alone(fused: str, num_tokens: int, way: str) -> None:
    assert run_ranks(2, calls, fused, num_tokens) == [[way], [way]]


def logits_made(loss_name: str) -> tuple[int, int]:
    """How many times logits of a chunk are made, policy's and reference's together, and how many chunks."""
    from megatron.core import parallel_state

    from megatron_sftrl.engine.parallel import initialize_parallel
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.losses.registry import build_loss
    from megatron_sftrl.models.architecture import from_section

    config = make_config({})
    assert config.model.architecture is not None
    context = initialize_parallel(ParallelSection())
    model = PolicyEngine(from_section(config.model.architecture), config, context).chunks[-1]
    (batch,) = step_batches(0, num_groups=1, group=0, multiple=1, num_microbatches=1)
    num_loss_tokens = int(batch.loss_mask.sum())
    only_loss: TokenBatch = batch.map(
        lambda value: value[batch.loss_mask], cu_seqlens=batch.cu_seqlens.new_tensor([0, num_loss_tokens])
    )
    made: list[str] = []
    states = torch.ones(num_loss_tokens, 1, config.model.architecture.hidden_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output_layer, "CPU_LOGITS_BYTES", 16 * model.output_weight().shape[0] * 4)
        make = OutputLayer.logits
        patch.setattr(OutputLayer, "logits", lambda *args: (made.append("logits"), make(*args))[1])
        objective = Objective(vocab_size=VOCAB_SIZE, parallel=context, fused="on", dtype=torch.float32)
        policy = OutputHead(model=model, hidden_states=states.clone().requires_grad_())
        loss = build_loss(loss_name)
        prior = OutputHead(model=model, hidden_states=states) if "reference" in loss.needs else None
        with torch.no_grad():
            num_chunks = len(policy.layer().chunks(num_loss_tokens))
        values = objective.values(loss, policy, prior, only_loss, longest=num_loss_tokens)
        values.total.backward()
    parallel_state.destroy_model_parallel()
    return len(made), num_chunks


@pytest.mark.parametrize(("loss_name", "times"), [("sft", 1), ("gift", 2), ("curiosft", 2), ("pear", 2)])
def test_a_token_local_loss_has_its_logits_made_once_and_another_one_twice(
    loss_name: str, times: int
) -> None:
    """Once of the reference, too; PEAR has none, and makes its own again for the backward."""
    ((made, num_chunks),) = run_ranks(1, logits_made, loss_name)
    assert num_chunks > 2
    assert made == times * num_chunks
