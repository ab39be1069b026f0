"""A config.json that we write: read back the same by us, and the same network for transformers."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_sftrl.models.architecture import Architecture, Family
from megatron_sftrl.models.hf_config import from_hf_config, hf_config_values
from megatron_sftrl.models.hf_families import MULTIPLIERS, hf_family
from megatron_sftrl.models.rope import inverse_frequencies
from tests.unit.models.hf_files import CLASSES, HYBRIDS, transformers_rotary, window_layers_of
from tests.unit.models.random_architectures import FAMILIES, random_architecture


def write(directory: Path, architecture: Architecture, dtype: torch.dtype | None = None) -> None:
    text = json.dumps(hf_config_values(architecture, dtype=dtype))
    (directory / "config.json").write_text(text)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_is_read_back_as_the_same_architecture(tmp_path: Path, family: Family) -> None:
    rng = random.Random(40)
    for _ in range(100):
        architecture = random_architecture(rng, family)
        write(tmp_path, architecture)
        assert from_hf_config(tmp_path) == architecture


def is_longrope(architecture: Architecture) -> bool:
    return architecture.rope.kind == "longrope"


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_what_is_written_as_the_same_network(tmp_path: Path, family: Family) -> None:
    transformers = pytest.importorskip("transformers")
    rng = random.Random(41)
    for _ in range(20):
        ours = random_architecture(rng, family)
        write(tmp_path, ours, torch.bfloat16)
        theirs = transformers.AutoConfig.from_pretrained(tmp_path)
        assert theirs.architectures == [f"{CLASSES[family]}ForCausalLM"]
        assert (theirs.model_type, theirs.dtype) == (family, torch.bfloat16)
        assert (theirs.rms_norm_eps, theirs.initializer_range) == (ours.norm_eps, ours.init_std)
        original = theirs.rope_parameters["original_max_position_embeddings"] if is_longrope(ours) else None
        longest = min(theirs.max_position_embeddings, original or theirs.max_position_embeddings)
        assert longest == ours.max_position_embeddings
        assert window_layers_of(theirs) == (ours.sliding_window, ours.window_layers)
        ropes = {"": ours.rope}
        if hf_family(family).rope_by_layer_type:
            kinds = {f"{kind}_" for kind in theirs.layer_types}
            ropes = {"full_attention_": ours.rope, "sliding_attention_": ours.window_rope or ours.rope}
            ropes = {kind: rope for kind, rope in ropes.items() if kind in kinds}
        for kind, rope in ropes.items():
            frequencies, factor = transformers_rotary(theirs, kind)
            assert torch.equal(inverse_frequencies(rope, ours.rope_head_dim), frequencies)
            assert rope.attention_factor == factor
        if ours.mixture is not None:
            shared = ours.ffn_hidden_size * getattr(theirs, "n_shared_experts", 0)
            is_local = hasattr(theirs, "num_local_experts")
            name = "num_local_experts" if is_local else "num_experts"
            assert getattr(theirs, name) == ours.mixture.num_experts
            assert theirs.num_experts_per_tok == ours.mixture.experts_per_token
        if ours.delta_net is not None:
            kinds = [kind == "full_attention" for kind in theirs.layer_types]
            assert kinds == [ours.attends(layer) for layer in range(ours.num_layers)]
        if ours.mixture is not None and family not in ("mixtral", "minimax_m2", "gpt_oss"):
            assert theirs.norm_topk_prob == ours.mixture.normalizes_weights
            assert getattr(theirs, "shared_expert_intermediate_size", shared) == ours.mixture.shared_width
        for key, field in MULTIPLIERS.items():
            if hf_family(family).keys & {key}:
                assert getattr(theirs, key) == getattr(ours, field)
        if hf_family(family).no_rope_every:
            assert (
                tuple(i for i, turns in enumerate(theirs.no_rope_layers) if not turns) == ours.no_rope_layers
            )
        if (bias_key := hf_family(family).bias_key) is not None:
            assert getattr(theirs, bias_key) == ours.qkv_bias


@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_the_keys_of_transformers_are_written_and_their_values_kept(
    tmp_path: Path, family: Family
) -> None:
    transformers = pytest.importorskip("transformers")
    architecture = random_architecture(random.Random(42), family)
    written = hf_config_values(architecture, dtype=torch.float32)
    (tmp_path / "config.json").write_text(json.dumps(written))
    # The older names, which transformers 5 reads and replaces by the newer ones.
    older = {"rope_theta", "rope_scaling", *({"num_experts"} if family == "qwen3_moe" else ())}
    older |= {"partial_rotary_factor"} if family in ("phi3", "minimax_m2") else set()
    older |= {"rope_local_base_freq"} if family == "gemma3_text" else set()
    newer = {key: value for key, value in written.items() if key not in older}

    (tmp_path / "own").mkdir()
    own = transformers.AutoConfig.for_model(family, dtype="float32", architectures=["X"])
    own.save_pretrained(tmp_path / "own")
    own_keys = json.loads((tmp_path / "own" / "config.json").read_text()).keys()
    # Its version, a slicing of the same products, the weight of a loss that transformers computes, and what
    # only a rope asks for that is refused.
    left_out = {"transformers_version", "pretraining_tp", "router_aux_loss_coef"}
    left_out |= {"original_max_position_embeddings"} - written.keys()
    # Refused, or what layer_types was made of.
    left_out |= {"attn_logit_softcapping", "final_logit_softcapping", "_sliding_window_pattern"}
    # Most of its classes have no field for head_dim, but their attention reads it; vLLM has its own key for
    # the factors on queries.
    added = {"llama_4_scaling"} if family in ("ministral3", "mistral4") else {"head_dim"} - own_keys
    added |= hf_family(family).for_vllm.keys()
    if family == "minimax_m2":  # the share of a head that turns, for vLLM, and layers that draft tokens
        added |= {"rotary_dim", *hf_family(family).draft_keys}
    if family in HYBRIDS:
        added |= {"partial_rotary_factor", *hf_family(family).draft_keys}
    if family == "qwen3_5_moe_text":
        added |= {"decoder_sparse_step", "intermediate_size", "mlp_only_layers"}
    assert newer.keys() == (own_keys - left_out) | added

    transformers.AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    if is_longrope(architecture):  # it keeps the older name of rope_type, too
        assert saved["rope_parameters"].pop("type") == "longrope"
    # For a null its class puts the ids of the published tokenizer; a caller that knows one writes them over.
    kept = newer.keys() - ({"eos_token_id"} if family == "glm4" else set())
    assert {key: newer[key] for key in kept} == {key: saved[key] for key in kept}


def test_an_older_reader_finds_the_same_positions_under_the_older_names() -> None:
    rng = random.Random(43)
    for _ in range(30):
        values = hf_config_values(random_architecture(rng, "llama"), dtype=None)
        scaling = values.get("rope_scaling", {"rope_type": "default"})
        assert {**scaling, "rope_theta": values["rope_theta"]} == values["rope_parameters"]


def test_an_older_reader_finds_the_window_of_the_last_layers_in_max_window_layers() -> None:
    architecture = replace(
        random_architecture(random.Random(44), "qwen2"),
        num_layers=4,
        max_position_embeddings=100,
        sliding_window=10,
        window_layers=(2, 3),
    )
    assert hf_config_values(architecture, dtype=None)["max_window_layers"] == 2
    scattered = replace(architecture, window_layers=(0, 2))
    assert hf_config_values(scattered, dtype=None)["max_window_layers"] == 4


@pytest.mark.parametrize(
    ("dtype", "expected"), [(torch.bfloat16, "bfloat16"), (torch.float32, "float32"), (None, None)]
)
def test_the_dtype_is_written_by_name_or_not_at_all(dtype: torch.dtype | None, expected: str | None) -> None:
    architecture = random_architecture(random.Random(45), "llama")
    assert hf_config_values(architecture, dtype=dtype).get("dtype") == expected


def test_no_token_is_claimed_that_the_architecture_does_not_know(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    write(tmp_path, random_architecture(random.Random(46), "llama"))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, None, None)


@pytest.mark.parametrize(
    ("family", "window_layers", "message"),
    [
        ("llama", (0, 1, 2), "LlamaForCausalLM has none; use family mistral"),
        ("mistral", (1,), "MistralForCausalLM has a sliding window in all of its 3 layers or in none"),
        ("mixtral", (0, 2), "MixtralForCausalLM has a sliding window in all"),
        ("qwen3_moe", (0,), "Qwen3MoeForCausalLM has a sliding window in all"),
    ],
)
def test_a_window_for_which_the_family_has_no_key_is_refused(
    family: Family, window_layers: tuple[int, ...], message: str
) -> None:
    architecture = replace(
        random_architecture(random.Random(47), family),
        num_layers=3,
        sliding_window=5,
        window_layers=window_layers,
    )
    with pytest.raises(ValueError, match=message):
        hf_config_values(architecture, dtype=None)


def test_a_mixtral_that_does_not_normalise_its_weights_is_refused() -> None:
    architecture = random_architecture(random.Random(48), "mixtral")
    assert architecture.mixture is not None
    architecture = replace(architecture, mixture=replace(architecture.mixture, normalizes_weights=False))
    with pytest.raises(ValueError, match="a Mixtral always divides the weights"):
        hf_config_values(architecture, dtype=None)
