"""What a config.json asks for is what the engine computes: its logits are those of transformers.

transformers runs each sequence alone, the engine runs them packed, in several layouts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sftrl.models import architecture_of
from megatron_sftrl.models.architecture import Mixture
from tests.distributed.engine_outputs import engine_config, engine_cos_sin, engine_greedy, engine_logits
from tests.distributed.hf_models import CONFIGS, VOCAB_SIZE, WINDOW, save_model, transformers_logits
from tests.ranks import run_ranks

# Multiples of 4 for cp 2; one shorter than the window, others several times as long and longer than the
# original length of the scaled ropes.
LENGTHS = [12, 100, 4, 72]
TWO_RANKS = {
    "tp2": {"tp": 2},
    "sp2": {"tp": 2, "sequence_parallel": True},
    "pp2": {"pp": 2},
    "vp2": {"pp": 2, "vp": 2},
    "cp2": {"cp": 2},
    "ep2": {"ep": 2},
}
SPLIT = [
    ("tp2", "llama"),
    ("tp2", "llama_tied"),
    ("tp2", "llama_wide_heads"),
    ("tp2", "qwen2"),
    ("sp2", "qwen3"),
    ("sp2", "mixtral"),
    ("sp2", "qwen3_moe_unnormalized"),
    ("pp2", "llama_tied"),
    ("pp2", "qwen2_window"),
    ("pp2", "qwen3_moe"),
    ("vp2", "qwen2_window"),
    ("cp2", "llama_yarn"),
    ("cp2", "mistral"),
    ("cp2", "qwen3_window"),
    ("cp2", "mixtral_window"),
    ("ep2", "mixtral"),
    ("ep2", "qwen3_moe"),
]


def random_tokens(lengths: list[int]) -> Tensor:
    return torch.randint(0, VOCAB_SIZE, (sum(lengths),), generator=torch.Generator().manual_seed(1))


class Models:
    """The saved models of this module, each made once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._models: dict[str, Any] = {}

    def directory(self, name: str) -> Path:
        return self._root / name

    def model(self, name: str) -> Any:
        if name not in self._models:
            self._models[name] = save_model(name, self.directory(name))
        return self._models[name]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


def relative_difference(found: list[Tensor | None], expected: Tensor) -> float:
    """Largest |difference| of all logits on any last stage, over the largest |logit|."""
    differences = [(logits - expected).abs().max() for logits in found if logits is not None]
    assert differences
    return float(torch.stack(differences).max() / expected.abs().max())


def difference_from_transformers(
    models: Models,
    name: str,
    parallel: dict,
    lengths: list[int],
    *,
    world_size: int,
    changes: Mapping[str, Any] | None = None,
    rope: Mapping[str, Any] | None = None,
) -> float:
    """relative_difference in fp32; `changes` and `rope` falsify what config.json describes."""
    tokens = random_tokens(lengths)
    expected = transformers_logits(models.model(name), tokens, lengths)
    config = engine_config(models.directory(name), parallel, "fp32")
    architecture = architecture_of(config.model)
    architecture = dataclasses.replace(
        architecture, rope=dataclasses.replace(architecture.rope, **(rope or {})), **(changes or {})
    )
    found = run_ranks(world_size, engine_logits, config, architecture, tokens, lengths)
    return relative_difference(found, expected)


# The promised bound. Measured: 1.3e-6 at most, from the order of summation in fp32.
BOUND = 1e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_of_packed_sequences_are_those_of_transformers(models: Models, name: str) -> None:
    assert difference_from_transformers(models, name, {}, LENGTHS, world_size=1) <= BOUND


@pytest.mark.parametrize(("layout", "name"), SPLIT)
def test_logits_are_those_of_transformers_on_two_ranks(models: Models, layout: str, name: str) -> None:
    assert difference_from_transformers(models, name, TWO_RANKS[layout], LENGTHS, world_size=2) <= BOUND


@pytest.mark.parametrize("name", ["llama_linear", "llama_llama3", "llama_yarn", "mistral"])
def test_logits_of_a_long_sequence_are_those_of_transformers(models: Models, name: str) -> None:
    assert difference_from_transformers(models, name, {}, [4200], world_size=1) <= BOUND


def mixture(num_experts: int, experts_per_token: int, *, normalizes_weights: bool) -> dict[str, Any]:
    return {
        "changes": {
            "mixture": Mixture(
                num_experts=num_experts,
                experts_per_token=experts_per_token,
                normalizes_weights=normalizes_weights,
            )
        }
    }


WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "window_one_short": ("mistral", {"changes": {"sliding_window": WINDOW - 1}}),
    "window_one_long": ("mistral", {"changes": {"sliding_window": WINDOW + 1}}),
    "window_on_another_layer": ("qwen2_window", {"changes": {"window_layers": (1, 3)}}),
    "norm_eps": ("llama", {"changes": {"norm_eps": 1e-5}}),
    "linear_factor": ("llama_linear", {"rope": {"factor": 4.1}}),
    "llama3_factor": ("llama_llama3", {"rope": {"factor": 8.2}}),
    "llama3_band": ("llama_llama3", {"rope": {"high_freq_factor": 4.1}}),
    "yarn_factor": ("llama_yarn", {"rope": {"factor": 8.2}}),
    "yarn_without_attention_factor": ("llama_yarn", {"rope": {"attention_factor": 1.0}}),
    "router_weights_normalized": ("qwen3_moe_unnormalized", mixture(8, 3, normalizes_weights=True)),
    "router_weights_unnormalized": ("mixtral", mixture(4, 2, normalizes_weights=False)),
    "one_more_expert_per_token": ("mixtral", mixture(4, 3, normalizes_weights=True)),
}


@pytest.mark.parametrize("defect", WRONG)
def test_no_wrong_number_in_the_architecture_would_stay_unseen(models: Models, defect: str) -> None:
    name, falsified = WRONG[defect]
    # Ten times the bound: nothing of this size hides in rounding. The smallest is norm_eps, 2e-4 (measured).
    assert difference_from_transformers(models, name, {}, LENGTHS, world_size=1, **falsified) > 10 * BOUND


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "name", ["llama", "llama_linear", "llama_llama3", "llama_yarn", "qwen3_yarn_given_factor"]
)
def test_cos_and_sin_at_every_position_are_the_numbers_of_transformers(
    models: Models, name: str, dtype: str
) -> None:
    length = 131072
    model = models.model(name)
    config = engine_config(models.directory(name), {}, dtype)
    (ours,) = run_ranks(1, engine_cos_sin, config, architecture_of(config.model), length)
    cos, sin = model.model.rotary_emb(
        torch.zeros(1, dtype=ours.dtype), torch.arange(length)[None]
    )  # [1, length, head_dim], both halves equal
    half = ours.shape[1] // 2
    theirs = torch.cat([cos[0, :, :half], sin[0, :, :half]], dim=1)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)  # the same operations on the same numbers


@pytest.mark.parametrize(
    ("name", "parallel"),
    [
        ("mistral", {}),
        ("mixtral_window", {}),
        ("qwen2_window", {"pp": 2}),
        ("llama_llama3", {}),
        ("llama_yarn", {"tp": 2}),
    ],
)
def test_windows_and_ropes_hold_token_by_token_with_a_cache_too(
    models: Models, name: str, parallel: dict
) -> None:
    num_new = 3 * WINDOW
    tokens = random_tokens([5, 40, 23])
    prompts = [tuple(prompt.tolist()) for prompt in tokens.split([5, 40, 23])]
    model = models.model(name)
    config = engine_config(models.directory(name), parallel, "fp32")
    found = run_ranks(
        2 if parallel else 1, engine_greedy, config, architecture_of(config.model), prompts, num_new
    )
    for prompt, *responses in zip(prompts, *found, strict=True):
        # Each response is what transformers, without a cache, finds most likely after each of its prefixes.
        whole = torch.tensor([*prompt, *responses[0]])
        logits = transformers_logits(model, whole, [len(whole)])
        likeliest = logits.argmax(dim=1)[len(prompt) - 1 : -1]
        assert all(response == tuple(likeliest.tolist()) for response in responses)
