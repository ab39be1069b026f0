"""config.json of Gemma 3: bases and windows in either spelling, and the language model of a larger one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_sftrl.errors import UserError
from megatron_sftrl.models.architecture import num_parameters
from megatron_sftrl.models.hf_config import from_hf_config, hf_config_values, read_hf_config
from megatron_sftrl.models.hf_output import read_assets
from megatron_sftrl.models.hf_weights import open_weights
from megatron_sftrl.models.rope import Rope, inverse_frequencies
from megatron_sftrl.models.tensors import hf_shapes
from tests.unit.models.hf_files import transformers_rotary, window_layers_of

# As published.
GEMMA3_1B: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "initializer_range": 0.02,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "use_cache": True,
    "vocab_size": 262144,
}
GEMMA3_4B: dict[str, Any] = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "initializer_range": 0.02,
    "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
}
LINEAR = {"rope_type": "linear", "factor": 8.0}
BOTH = {
    "full_attention": {"rope_theta": 2e6, **LINEAR},
    "sliding_attention": {"rope_type": "default", "rope_theta": 3e4},
}


def write(tmp_path: Path, content: dict[str, Any]) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(content))
    return tmp_path


def test_the_smallest_published_one(tmp_path: Path) -> None:
    a, notes = read_hf_config(write(tmp_path, GEMMA3_1B))
    assert num_parameters(a) == 999_885_952
    assert a.tie_embeddings
    assert a.window_layers == tuple(layer for layer in range(26) if (layer + 1) % 6)
    assert (a.sliding_window, a.attention_multiplier) == (512, 1 / 16)
    assert (a.rope, a.window_rope) == (Rope(kind="default", theta=1e6), Rope(kind="default", theta=1e4))
    assert [note.split(": ")[1] for note in notes] == ["cache_implementation"]


def test_a_text_config_of_a_few_keys_is_the_language_model_of_4_billion_parameters(tmp_path: Path) -> None:
    a = from_hf_config(write(tmp_path, GEMMA3_4B), text_only=True)
    assert num_parameters(a) == 3_880_263_168
    assert a.rope == Rope(kind="linear", theta=1e6, factor=8.0)
    assert a.rope_of(0) == Rope(kind="default", theta=1e4)
    assert (a.vocab_size, a.num_attention_heads, a.num_query_groups, a.head_dim) == (262208, 8, 4, 256)
    with pytest.raises(UserError, match=r"'gemma3' is a multimodal model: set model.text_only: true"):
        from_hf_config(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_theta": 5e5, "rope_local_base_freq": 2e4, "rope_scaling": LINEAR},
        {"rope_theta": None, "rope_local_base_freq": None, "rope_parameters": BOTH},
        {"rope_theta": 2e6, "rope_local_base_freq": 3e4, "rope_scaling": LINEAR, "rope_parameters": BOTH},
        {"rope_parameters": {"sliding_attention": BOTH["sliding_attention"]}, "rope_local_base_freq": None},
        {"sliding_window": 40000},
        {"sliding_window_pattern": 4},
        {"sliding_window_pattern": None, "layer_types": ["full_attention", "sliding_attention"] * 13},
    ],
    ids=["published", "older keys", "sets", "both", "one set", "a window that cuts nothing", "4", "listed"],
)
def test_positions_and_windows_are_those_of_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    content = {key: value for key, value in {**GEMMA3_1B, **changes}.items() if value is not None}
    ours = from_hf_config(write(tmp_path, content))
    for written in (content, hf_config_values(ours, dtype=None)):
        assert from_hf_config(write(tmp_path, written)) == ours
        theirs = transformers.AutoConfig.from_pretrained(tmp_path)
        assert window_layers_of(theirs) == (ours.sliding_window, ours.window_layers)
        for kind, rope in (("full_attention", ours.rope), ("sliding_attention", ours.window_rope)):
            assert rope is not None
            assert torch.equal(inverse_frequencies(rope, 256), transformers_rotary(theirs, f"{kind}_")[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0: a soft-cap on logits is not"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0: a soft-cap on logits is not"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention True: it changes which"),
        ({"hidden_activation": "gelu"}, "hidden_activation 'gelu': only gelu_pytorch_tanh is supported"),
        ({"attention_bias": True}, "attention_bias: biases on all four projections are not supported"),
        ({"hidden_size": 1154}, "hidden_size = 1154 is not a multiple of num_attention_heads = 4: trans"),
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar: expected a whole number >= 1, got 0"),
        ({"rope_scaling": {"type": "linear", "factor": 8.0}}, "rope_scaling: rope_type is missing"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, "rope_type 'yarn': only default, linear"),
        ({"rope_parameters": BOTH}, "rope_theta 1e+06 contradicts that of rope_parameters, 2000000.0"),
        ({"rope_parameters": LINEAR}, "rope_parameters: expected flat sets of values for"),
        ({"rope_parameters": {"chunked": LINEAR}}, "rope_parameters chunked: only sets for"),
        (
            {"rope_theta": 2e6, "rope_parameters": BOTH, "rope_scaling": {**LINEAR, "factor": 4.0}},
            "rope_scaling and rope_parameters contradict each other",
        ),
        ({"layer_types": ["full_attention"] * 26}, "layer_types contradicts sliding_window_pattern"),
        ({"sliding_window": None}, "sliding_window: expected a whole number >= 1, got None"),
    ],
)
def test_what_is_not_built_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        from_hf_config(write(tmp_path, {**GEMMA3_1B, **changes}))
    assert message in str(caught.value)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_a_language_model_is_read_from_beside_a_tower_for_images(tmp_path: Path, prefix: str) -> None:
    """Under the published names and those that transformers has in memory; an export describes it alone."""
    text = {"hidden_size": 32, "intermediate_size": 8, "num_hidden_layers": 2, "head_dim": 4, "vocab_size": 9}
    content = {**GEMMA3_4B, "text_config": {**GEMMA3_4B["text_config"], **text}}
    a = from_hf_config(write(tmp_path, content), text_only=True)
    tensors = {
        prefix + name.removeprefix("model."): torch.full(shape, float(number))
        for number, (name, shape) in enumerate(hf_shapes(a).items())
    }
    own = "model." if prefix.startswith("model.") else ""
    others = (
        "vision_tower.vision_model.post_layernorm.bias",
        "multi_modal_projector.mm_soft_emb_norm.weight",
    )
    save_file(tensors | {own + name: torch.zeros(2) for name in others}, tmp_path / "model.safetensors")
    with open_weights(tmp_path) as weights:
        weights.check_model(a)
        for number, name in enumerate(hf_shapes(a)):
            assert bool((weights.read(name) == number).all()), name
    (tmp_path / "export").mkdir()
    config = read_assets(model=tmp_path, tokenizer=None, chat_template=None).files["config.json"]
    (tmp_path / "export" / "config.json").write_bytes(config)
    assert from_hf_config(tmp_path / "export") == a
    assert json.loads(config)["architectures"] == ["Gemma3ForCausalLM"]
