"""config.json of hybrids, and of multimodal models whose language model is one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_sftrl.errors import UserError
from megatron_sftrl.models.hf_config import from_hf_config, read_hf_config
from megatron_sftrl.models.hf_output import read_assets
from megatron_sftrl.models.hf_weights import open_weights
from megatron_sftrl.models.tensors import hf_shapes
from tests.unit.models.hf_files import values

FAMILY = "qwen3_5_text"
TEXT = {
    **values(FAMILY, num_attention_heads=8, num_key_value_heads=2, head_dim=32),
    "hidden_size": 32,
    "intermediate_size": 48,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e7,
        "partial_rotary_factor": 0.25,
        "mrope_interleaved": True,
        "mrope_section": [11, 11, 10],
    },
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 8,
    "mtp_num_hidden_layers": 1,
    "eos_token_id": 7,
}
MULTIMODAL = {
    "model_type": "qwen3_5",
    "architectures": ["Qwen3_5ForConditionalGeneration"],
    "text_config": {key: value for key, value in TEXT.items() if key != "architectures"},
    "vision_config": {"model_type": "qwen3_5_vision", "depth": 2},
    "image_token_id": 9,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def write(tmp_path: Path, content: dict[str, Any]) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(content))
    return tmp_path


def refusal(tmp_path: Path, content: dict[str, Any], *, text_only: bool = False) -> str:
    with pytest.raises(UserError) as caught:
        from_hf_config(write(tmp_path, content), text_only=text_only)
    return str(caught.value)


def test_a_multimodal_model_is_refused_until_its_language_model_is_asked_for(tmp_path: Path) -> None:
    message = refusal(tmp_path, MULTIMODAL)
    assert (
        "'qwen3_5' is a multimodal model: set model.text_only: true (sftrl convert: --text-only)" in message
    )
    found, notes = read_hf_config(write(tmp_path, MULTIMODAL), text_only=True)
    assert found == from_hf_config(write(tmp_path, TEXT))
    assert any("text_config alone is read" in note for note in notes)
    assert any("mtp_num_hidden_layers 1: layers that draft tokens are left out" in note for note in notes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"layer_types": ["full_attention"] * 3},
            "layer_types: expected a list with one entry for each of 4",
        ),
        ({"layer_types": ["sliding_attention"] * 4}, "sliding_attention: only linear_attention and full"),
        (
            {"layer_types": ["full_attention"] * 4, "full_attention_interval": 2},
            "layer_types contradicts full_attention_interval 2",
        ),
        (
            {"linear_num_value_heads": 5},
            "linear_num_value_heads = 5 is not a multiple of linear_num_key_heads",
        ),
        ({"attn_output_gate": False}, "attn_output_gate False: only True is supported"),
        ({"output_gate_type": "sigmoid"}, "output_gate_type 'sigmoid': vLLM builds another network"),
        ({"attention_bias": True}, "attention_bias: biases on all four projections are not supported"),
        ({"sliding_window": 64}, "sliding_window: Qwen3_5ForCausalLM has none in transformers"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type 'yarn': only default"),
    ],
)
def test_what_is_not_built_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    assert message in refusal(tmp_path, {**TEXT, **changes})
    inside = {**MULTIMODAL, "text_config": {**MULTIMODAL["text_config"], **changes}}
    assert message in refusal(tmp_path, inside, text_only=True)


def test_a_multimodal_model_that_is_tied_and_untied_is_refused(tmp_path: Path) -> None:
    inside = {**MULTIMODAL, "text_config": {**MULTIMODAL["text_config"], "tie_word_embeddings": True}}
    assert "tie_word_embeddings False contradicts that of text_config, True" in refusal(
        tmp_path, inside, text_only=True
    )


@pytest.mark.parametrize("changes", [{"output_gate_type": "swish"}, {"attn_output_gate": True}, {}])
def test_published_keys_are_read(tmp_path: Path, changes: dict[str, Any]) -> None:
    found = from_hf_config(write(tmp_path, {**TEXT, "mamba_ssm_dtype": "float32", **changes}))
    assert found.delta_net is not None
    assert found.delta_net.layers == (0, 1, 2)
    assert found.rope.fraction == 0.25


def test_a_language_model_is_read_from_among_the_others_tensors(tmp_path: Path) -> None:
    """And what an export is given beside it describes it alone."""
    architecture = from_hf_config(write(tmp_path, MULTIMODAL), text_only=True)
    tensors = {
        name.replace("model.", "model.language_model."): torch.full(shape, float(number))
        for number, (name, shape) in enumerate(hf_shapes(architecture).items())
    }
    extra = {name: torch.zeros(2) for name in ("model.visual.patch_embed.proj.weight", "mtp.fc.weight")}
    save_file({**tensors, **extra}, tmp_path / "model.safetensors")
    with open_weights(tmp_path) as weights:
        weights.check_model(architecture)
        for number, name in enumerate(hf_shapes(architecture)):
            assert bool((weights.read(name) == number).all()), name
    assets = read_assets(model=tmp_path, tokenizer=None, chat_template=None)
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "config.json").write_bytes(assets.files["config.json"])
    written = json.loads(assets.files["config.json"])
    assert from_hf_config(tmp_path / "export") == architecture
    assert written["architectures"] == ["Qwen3_5ForCausalLM"]
    assert (written["eos_token_id"], written["dtype"], written["tie_word_embeddings"]) == (
        7,
        "bfloat16",
        False,
    )
    assert not {"vision_config", "text_config", "image_token_id"} & written.keys()
