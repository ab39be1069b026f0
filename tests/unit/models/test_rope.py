"""Rotary frequencies: the same bits as transformers, for every scaling and every way of asking for it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sftrl.models.hf_families import hf_family
from megatron_sftrl.models.rope import inverse_frequencies
from tests.unit.models.hf_files import OWN_ROPES, read, transformers_rotary, values
from tests.unit.models.random_architectures import FAMILIES

COMMON = [family for family in FAMILIES if family not in OWN_ROPES]


def random_request(rng: random.Random, kind: str) -> dict[str, Any]:
    """Keys of a config.json about positions, in either spelling, with options given, null or left out."""
    rope: dict[str, Any] = {"type" if rng.random() < 0.3 else "rope_type": kind}
    top: dict[str, Any] = {"max_position_embeddings": rng.randint(64, 200000)}
    theta = rng.choice([10000, 1000000.0, 10 ** rng.uniform(2, 7)])
    (rope if rng.random() < 0.5 else top)["rope_theta"] = theta
    if kind != "default":
        rope["factor"] = rng.choice([1.0, 4, 8.0, rng.uniform(1, 40)])
    if kind in ("llama3", "yarn") and rng.random() < 0.8:
        rope["original_max_position_embeddings"] = rng.randint(32, 40000)
    if kind == "llama3":
        rope["low_freq_factor"] = rng.choice([1, 1.0, rng.uniform(0.5, 4)])
        rope["high_freq_factor"] = rope["low_freq_factor"] + rng.choice([3, rng.uniform(0.1, 8)])
    if kind == "yarn":
        options = {
            "beta_fast": rng.choice([None, 32, rng.uniform(8, 64)]),
            "beta_slow": rng.choice([None, 1, rng.uniform(0.1, 8)]),
            "attention_factor": rng.choice([None, None, rng.uniform(0.5, 2)]),
            "mscale": rng.choice([None, 0, 1, 0.707, rng.uniform(0.1, 2)]),
            "mscale_all_dim": rng.choice([None, 1.0, rng.uniform(0.1, 2)]),
            "truncate": rng.random() < 0.5,
        }
        rope |= {key: value for key, value in options.items() if rng.random() < 0.7}
        if "original_max_position_embeddings" in rope and rng.random() < 0.2:
            rope["factor"] = None
            rope["original_max_position_embeddings"] = rng.randint(32, top["max_position_embeddings"])
    return {**top, rng.choice(["rope_scaling", "rope_parameters"]): rope}


@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "yarn"])
def test_frequencies_and_attention_factor_are_bit_equal_to_transformers(tmp_path: Path, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    rng = random.Random(30)
    for number in range(60):
        family = COMMON[number % len(COMMON)]
        head_dim = rng.choice([6, 16, 64, 80, 128])
        asked = values(family, head_dim=head_dim, **random_request(rng, kind))
        ours = read(tmp_path, asked)
        frequencies, factor = transformers_rotary(transformers.AutoConfig.from_pretrained(tmp_path))
        assert torch.equal(inverse_frequencies(ours.rope, head_dim), frequencies), asked
        assert ours.rope.attention_factor == factor, asked
        assert ours.rope.kind == kind


def test_without_a_request_the_family_s_default_base_is_used(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for family in FAMILIES:
        # Six: of fewer layers of a Gemma 3 all have a window.
        ours = read(tmp_path, values(family, num_hidden_layers=6))
        layers = "full_attention_" if hf_family(family).rope_by_layer_type else ""
        frequencies, factor = transformers_rotary(transformers.AutoConfig.from_pretrained(tmp_path), layers)
        assert torch.equal(inverse_frequencies(ours.rope, ours.rope_head_dim), frequencies), family
        assert ours.rope.attention_factor == factor


@pytest.mark.parametrize("factor", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("place", ["", "rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("family", ["phi3", "glm4", "minimax_m2"])
def test_a_part_of_each_head_turns_as_in_transformers(
    tmp_path: Path, family: str, place: str, factor: float
) -> None:
    transformers = pytest.importorskip("transformers")
    part: dict[str, Any] = {"partial_rotary_factor": factor}
    ours = read(tmp_path, values(family, **({place: {**part, "rope_theta": 7.0}} if place else part)))
    frequencies, _ = transformers_rotary(transformers.AutoConfig.from_pretrained(tmp_path))
    assert torch.equal(inverse_frequencies(ours.rope, ours.head_dim), frequencies)
    assert len(frequencies) == factor * ours.head_dim / 2


@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
def test_longrope_up_to_its_original_length_is_that_of_transformers(tmp_path: Path, place: str) -> None:
    transformers = pytest.importorskip("transformers")
    rng = random.Random(32)
    for _ in range(20):
        fraction = rng.choice([0.5, 0.75, 1.0])
        factors = {
            f"{which}_factor": [rng.choice([1, rng.uniform(1, 60)]) for _ in range(int(32 * fraction))]
            for which in ("short", "long")
        }
        asked = values(
            "phi3",
            partial_rotary_factor=fraction,
            max_position_embeddings=rng.randint(64, 200000),
            original_max_position_embeddings=rng.randint(64, 8192),
            rope_theta=10 ** rng.uniform(2, 7),
            **{place: {"type": "longrope", **factors}},
        )
        ours = read(tmp_path, asked)
        frequencies, factor = transformers_rotary(transformers.AutoConfig.from_pretrained(tmp_path))
        assert torch.equal(inverse_frequencies(ours.rope, ours.head_dim), frequencies)
        assert ours.rope.attention_factor == factor


@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "yarn"])
def test_layers_with_a_window_have_positions_of_their_own(tmp_path: Path, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    rng = random.Random(31)
    for number in range(10):
        sets = {}
        for layers in ("full_attention", "sliding_attention"):
            asked = random_request(rng, kind if layers[0] == "f" or number % 2 else "default")
            rope: dict[str, Any] = asked.get("rope_scaling") or asked["rope_parameters"]
            sets[layers] = {"rope_theta": 7.5e4, **rope}
            sets[layers].pop("truncate", None)
        # Older keys scale the layers with full attention, and only them.
        older = {"rope_scaling": {"rope_type": kind, **sets["full_attention"]}}
        older["rope_scaling"]["rope_type"] = older["rope_scaling"].pop("type", kind)
        for positions in ({"rope_parameters": sets}, older):
            ours = read(tmp_path, values("olmo3", max_position_embeddings=200000, **positions))
            config = transformers.AutoConfig.from_pretrained(tmp_path)
            for layers, rope in (("full", ours.rope), ("sliding", ours.window_rope or ours.rope)):
                frequencies, factor = transformers_rotary(config, f"{layers}_attention_")
                assert torch.equal(inverse_frequencies(rope, ours.head_dim), frequencies), positions
                assert rope.attention_factor == factor


@pytest.mark.parametrize("kind", ["llama3", "yarn"])
def test_an_original_length_beside_the_set_is_the_one_that_counts(tmp_path: Path, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    rope = {"rope_type": kind, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind == "yarn":
        rope = {"rope_type": kind, "factor": 8.0}
    asked = values(original_max_position_embeddings=512, max_position_embeddings=4096, rope_scaling=rope)
    ours = read(tmp_path, asked)
    frequencies, _ = transformers_rotary(transformers.AutoConfig.from_pretrained(tmp_path))
    assert ours.rope.original_length == 512
    assert torch.equal(inverse_frequencies(ours.rope, ours.head_dim), frequencies)


def test_llama3_scaling_is_what_megatron_computes_for_the_values_that_it_fixes() -> None:
    rotary = pytest.importorskip("megatron.core.models.common.embeddings.rotary_pos_embedding")
    from megatron_sftrl.models.rope import Rope

    theirs = rotary.RotaryEmbedding(
        kv_channels=128,
        rotary_percent=1.0,
        rotary_base=500000,
        rope_scaling=True,
        rope_scaling_factor=8.0,
        use_cpu_initialization=True,
    ).inv_freq
    ours = Rope(kind="llama3", theta=500000.0, factor=8.0, original_length=8192)
    # The same fp32 formula up to the order of operations; a wrong constant changes entries by up to 8x.
    torch.testing.assert_close(inverse_frequencies(ours, 128), theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", ["deepseek_v3", "mistral4"])
@pytest.mark.parametrize("scales", [{}, {"mscale": 1.0}, {"mscale": 0.7, "mscale_all_dim": 1.2}])
def test_yarn_in_latent_attention_is_that_of_transformers(
    tmp_path: Path, scales: dict[str, float], family: str
) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention
    from transformers.models.mistral4.modeling_mistral4 import Mistral4Attention

    attention: Any = {"deepseek_v3": DeepseekV3Attention, "mistral4": Mistral4Attention}[family]
    yarn = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 64, **scales}
    if family == "mistral4":
        yarn |= {"llama_4_scaling_beta": 0.1, "partial_rotary_factor": 0.5}
    ours = read(tmp_path, values(family, rope_scaling=yarn))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    frequencies, factor = transformers_rotary(config)
    assert torch.equal(inverse_frequencies(ours.rope, ours.rope_head_dim), frequencies)
    assert ours.rope.attention_factor == factor
    with torch.device("meta"):
        scaling = attention(config, 0).scaling
    assert (ours.attention_multiplier or ours.head_dim**-0.5) == pytest.approx(scaling, rel=1e-15)
