"""Fusing is decided from sizes, before anything is gathered or multiplied."""

from __future__ import annotations

import pytest
import torch

from megatron_sftrl.config.schema import ParallelSection
from megatron_sftrl.engine.objective import Objective, OutputHead
from megatron_sftrl.vocab_parallel import output_layer
from tests.distributed.test_layouts import VOCAB_SIZE, make_config
from tests.ranks import run_ranks


def calls(fused: str, num_tokens: int) -> list[str]:
    """Which of the model's two ways to its logits are taken for a chunk of 16 tokens, at tp 2 with sp."""
    from megatron.core import parallel_state

    from megatron_sftrl.architectures.architecture import from_section
    from megatron_sftrl.engine.parallel import initialize_parallel
    from megatron_sftrl.engine.policy import PolicyEngine

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
        objective = Objective(vocab_size=VOCAB_SIZE, parallel=context, fused=fused)  # type: ignore[arg-type]
        states = torch.ones(num_tokens // 2, 1, config.model.architecture.hidden_size)
        distribution = objective.distribution(OutputHead(model=model, hidden_states=states))
        assert distribution.num_tokens == num_tokens
    parallel_state.destroy_model_parallel()
    return taken


def recording(taken: list[str], name: str, function):
    def call(*args):
        taken.append(name)
        return function(*args)

    return call


@pytest.mark.parametrize(
    ("fused", "num_tokens", "way"),
    [("auto", 16, "logits"), ("auto", 18, "output"), ("on", 16, "output"), ("off", 18, "logits")],
)
def test_one_way_is_taken_and_the_other_left_alone(fused: str, num_tokens: int, way: str) -> None:
    assert run_ranks(2, calls, fused, num_tokens) == [[way], [way]]
