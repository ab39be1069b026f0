"""config.json: read as transformers reads it, or refused by the name of what is not supported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_sftrl.architectures.architecture import Architecture
from megatron_sftrl.architectures.hf_config import from_hf_config

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def values(model_type: str = "llama", **changes: object) -> dict[str, object]:
    names = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
    base: dict[str, object] = {
        "architectures": [names[model_type]],
        "model_type": model_type,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
        "vocab_size": 1000,
    }
    return {**base, **changes}


def read(tmp_path: Path, content: dict[str, object]) -> Architecture:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(content))
    assert from_hf_config(file) == from_hf_config(tmp_path)
    return from_hf_config(file)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
        {"rope_theta": 500000.0, "max_position_embeddings": 777, "initializer_range": 0.01},
        {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}, "rope_scaling": None},
    ],
)
def test_every_size_is_what_transformers_reads(
    tmp_path: Path, model_type: str, changes: dict[str, object]
) -> None:
    transformers = pytest.importorskip("transformers")
    ours = read(tmp_path, values(model_type, **changes))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert (ours.num_layers, ours.hidden_size) == (theirs.num_hidden_layers, theirs.hidden_size)
    assert ours.ffn_hidden_size == theirs.intermediate_size
    assert ours.num_query_groups == theirs.num_key_value_heads
    assert ours.head_dim == head_dim
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    assert ours.init_std == theirs.initializer_range
    assert ours.family == theirs.model_type


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_what_transformers_itself_writes_is_accepted(tmp_path: Path, model_type: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(model_type)
    (tmp_path / "config.json").write_text(config.to_json_string(use_diff=False))
    assert from_hf_config(tmp_path).num_layers == config.num_hidden_layers


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_llama3_scaling_is_honoured_in_both_spellings(tmp_path: Path, key: str) -> None:
    architecture = read(tmp_path, values(rope_theta=500000.0, **{key: LLAMA3_ROPE}))
    assert (architecture.rope_theta, architecture.rope_scaling_factor) == (500000.0, 8.0)


def test_no_scaling_leaves_the_factor_out(tmp_path: Path) -> None:
    assert read(tmp_path, values()).rope_scaling_factor is None


def test_settings_without_effect_do_not_stop_a_run(tmp_path: Path) -> None:
    harmless = {
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "torch_dtype": "bfloat16",
        "use_mrope": False,
        "pretraining_tp": 1,
        "layer_types": ["full_attention", "full_attention"],
        "attention_dropout": 0.0,
    }
    assert read(tmp_path, values("qwen2", **harmless)).qkv_bias


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "supported: LlamaForCausalLM, Qwen2ForCausalLM, Qwen3"),
        ({"architectures": None, "model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"model_type": "qwen3"}, "model_type 'qwen3' contradicts architectures"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "remote code is never run"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu': only silu"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"attention_dropout": 0.1}, "attention_dropout 0.1"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types sliding_attention"),
        ({"num_experts": 8}, "num_experts: not known here"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "big"}, "hidden_size: expected a whole number >= 1, got 'big'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: expected a whole number >= 1, got 0"),
        ({"rms_norm_eps": -1}, "rms_norm_eps: expected a number > 0, got -1"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: expected true or false"),
        ({"num_attention_heads": 31}, "hidden_size = 2048 is not a multiple of num_attention_heads = 31"),
        ({"num_key_value_heads": 5}, "not a multiple of num_query_groups = 5"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_type 'linear': only default and llama3"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "rope_type 'yarn'"),
        ({"rope_scaling": {**LLAMA3_ROPE, "low_freq_factor": 2}}, "rope low_freq_factor 2"),
        (
            {"rope_scaling": {**LLAMA3_ROPE, "original_max_position_embeddings": 4096}},
            "is supported with 8192",
        ),
        ({"rope_scaling": {**LLAMA3_ROPE, "factor": None}}, "rope factor: expected a number >= 1"),
        ({"rope_scaling": {**LLAMA3_ROPE, "beta": 3}}, "rope beta 3: not supported"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope partial_rotary_factor 0.5"),
        ({"rope_theta": 1.0, "rope_parameters": {"rope_theta": 2.0}}, "rope_theta is given twice"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}},
            "rope_parameters: expected one flat set",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=r"config\.json") as raised:
        read(tmp_path, {**values(), **changes})
    assert message in str(raised.value)


def test_all_problems_of_a_file_are_listed_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be used") as raised:
        read(tmp_path, values(hidden_act="gelu", mlp_bias=True, vocab_size=None))
    assert str(raised.value).count("\n  ") == 3


@pytest.mark.parametrize(("content", "message"), [("{", "cannot read"), ("[]", "expected a JSON object")])
def test_a_file_that_is_no_json_object_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        from_hf_config(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no such file: .*config\.json"):
        from_hf_config(tmp_path)


def test_llama3_scaling_with_these_values_is_what_megatron_computes() -> None:
    rotary = pytest.importorskip("megatron.core.models.common.embeddings.rotary_pos_embedding")
    ropes = pytest.importorskip("transformers.modeling_rope_utils")
    import torch
    from transformers import LlamaConfig

    ours = rotary.RotaryEmbedding(
        kv_channels=128,
        rotary_percent=1.0,
        rotary_base=500000,
        rope_scaling=True,
        rope_scaling_factor=8.0,
        use_cpu_initialization=True,
    ).inv_freq
    config = LlamaConfig(rope_parameters={"rope_theta": 500000.0, **LLAMA3_ROPE})
    theirs, attention_scaling = ropes.ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    assert attention_scaling == 1.0
    # The same fp32 formula in the same order; a wrong constant changes some entries by a factor of up to 8.
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
