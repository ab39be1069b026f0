"""What is asked of single tokens (log-probability, entropy, KL to another model), in every layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_sftrl.config.schema import LossSection, RunConfig
from megatron_sftrl.models import architecture_of
from tests.distributed.engine_outputs import engine_config, engine_token_numbers
from tests.distributed.hf_models import VOCAB_SIZE, save_model, transformers_logits
from tests.ranks import run_ranks

LENGTHS = [12, 4, 32]
TOKENS = torch.randint(0, VOCAB_SIZE, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Tensor]:
    """Two models of one shape, and [3, T] in float64 from the logits that transformers gives."""
    root = tmp_path_factory.mktemp("models")
    logits = []
    for name, seed in (("policy", 3), ("base", 4)):
        model = save_model("qwen2", root / name, seed=seed)
        logits.append(transformers_logits(model, TOKENS, LENGTHS).double())
    drawn, policy, base = (logits[0] / 0.7).log_softmax(1), *(each.log_softmax(1) for each in logits)
    numbers = [
        drawn.gather(1, TOKENS[:, None])[:, 0],
        -(drawn.exp() * drawn).sum(1),
        (policy.exp() * (policy - base)).sum(1),
    ]
    return root / "policy", root / "base", torch.stack(numbers)


def config_of(directory: Path, parallel: dict, fused: str) -> RunConfig:
    config = engine_config(directory, parallel, "fp32")
    return config.model_copy(update={"loss": LossSection(name="sft", fused=fused)})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("parallel", "fused"),
    [({}, "off"), ({}, "on"), ({"tp": 2}, "on"), ({"tp": 2}, "off"), ({"pp": 2}, "off"), ({"cp": 2}, "on")],
)
def test_every_layout_answers_what_the_whole_logits_say(
    truth: tuple[Path, Path, Tensor], parallel: dict, fused: str
) -> None:
    directory, base, expected = truth
    config = config_of(directory, parallel, fused)
    world_size = 2 if parallel else 1
    found = run_ranks(
        world_size, engine_token_numbers, config, architecture_of(config.model), TOKENS, LENGTHS, base
    )
    told = [each for each in found if each is not None]
    assert len(told) == (1 if "pp" in parallel else world_size)
    for numbers in told:
        torch.testing.assert_close(numbers.double(), expected, rtol=1e-5, atol=2e-6)
