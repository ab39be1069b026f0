"""config.json files as they are published, and what must hold of each."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from megatron_sftrl.models.architecture import Architecture, num_parameters
from megatron_sftrl.models.hf_config import from_hf_config
from megatron_sftrl.models.rope import inverse_frequencies
from tests.unit.models.hf_files import CLASSES, transformers_rotary

Content = dict[str, Any]
EIGHT_BITS = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
# Mistral's: one factor for each matrix.
WHOLE_MATRICES = {
    "activation_scheme": "static",
    "dequantize": False,
    "modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
    "quant_method": "fp8",
    "weight_block_size": None,
}
QWEN3 = {"attention_bias": False, "head_dim": 128, "max_position_embeddings": 40960, "rope_theta": 1000000}


def config(model_type: str, sizes: tuple[int, int, int, int, int, int], **more: object) -> Content:
    """The usual keys of a config.json, and more."""
    hidden, width, layers, heads, groups, vocab = sizes
    return {
        "architectures": [f"{CLASSES[model_type]}ForCausalLM"],
        "model_type": model_type,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        **more,
    }


def multimodal(model_type: str, text: Content, **more: object) -> Content:
    """A multimodal model around the keys of its language model that its file has."""
    vision = {"gemma3": "siglip_vision_model", "mistral3": "pixtral"}.get(model_type, model_type)
    names = {"gemma3": "Gemma3", "mistral3": "Mistral3", "qwen3_5": "Qwen3_5", "qwen3_5_moe": "Qwen3_5Moe"}
    return {
        "architectures": [f"{names[model_type]}ForConditionalGeneration"],
        "model_type": model_type,
        "text_config": text,
        "vision_config": {"model_type": vision},
        **more,
    }


def mistral_text(model_type: str, sizes: tuple[int, int, int, int, int, int], **more: object) -> Content:
    """What the text_config of a Mistral 3 has."""
    left_out = ("architectures", "tie_word_embeddings", "torch_dtype")
    text = config(model_type, sizes, head_dim=128, rms_norm_eps=1e-05, sliding_window=None, **more)
    return {key: value for key, value in text.items() if key not in left_out or key in more}


def yarn_of_ministral(**changes: object) -> Content:
    """The rope_parameters of a Ministral 3."""
    return {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 16.0,
        "llama_4_scaling_beta": 0.1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 16384,
        "rope_theta": 1000000.0,
        "rope_type": "yarn",
        "type": "yarn",
        **changes,
    }


def hybrid(sizes: tuple[int, int, int, int, int, int], **more: object) -> Content:
    """The keys that Qwen3-Next and the text_config of a Qwen3.5 share; the latter has one more set."""
    keys = config("qwen3_next", sizes)
    return {
        **{key: value for key, value in keys.items() if key not in ("architectures", "model_type")},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "full_attention_interval": 4,
        "head_dim": 256,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_value_head_dim": 128,
        "max_position_embeddings": 262144,
        "mlp_only_layers": [],
        "rms_norm_eps": 1e-06,
        **more,
    }


def qwen3_5(model_type: str, sizes: tuple[int, int, int, int, int, int], **more: object) -> Content:
    """A Qwen3.5 with its tower for images."""
    layers, is_tied = sizes[2], bool(more.pop("is_tied", False))
    kinds = ["linear_attention"] * 3 + ["full_attention"]
    text = hybrid(
        sizes,
        attn_output_gate=True,
        layer_types=kinds * (layers // 4),
        mamba_ssm_dtype="float32",
        model_type=f"{model_type}_text",
        mtp_num_hidden_layers=1,
        mtp_use_dedicated_embeddings=False,
        rope_parameters={
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
            "rope_type": "default",
        },
        tie_word_embeddings=is_tied,
        **more,
    )
    del text["torch_dtype"]
    return multimodal(model_type, {**text, "dtype": "bfloat16"}, tie_word_embeddings=is_tied)


def architecture(directory: Path, content: Content) -> Architecture:
    """What we make of it; of a multimodal one its language model."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(content))
    return from_hf_config(directory, text_only=True)


def assert_is_transformers(directory: Path, content: Content, parameters: int) -> None:
    """Its number of parameters is the published one and that of transformers' network, with transformers'
    positions, and what transformers 5 writes of it, in the newer spelling, is the same architecture.
    """
    import torch
    import transformers

    ours = architecture(directory, content)
    assert num_parameters(ours) == parameters
    known = {key: value for key, value in content.items() if key not in ("auto_map", "quantization_config")}
    if known["model_type"] == "kimi_k2":
        known["model_type"] = "deepseek_v3"
    assert architecture(directory, known) == ours
    theirs = transformers.AutoConfig.from_pretrained(directory)
    theirs.save_pretrained(directory / "again")
    again = json.loads((directory / "again" / "config.json").read_text())
    if not ours.tie_embeddings:
        # Of a Mistral 3 transformers writes that it is tied, and goes by the weights.
        (directory / "again" / "model.safetensors.index.json").write_text(
            '{"weight_map": {"lm_head.weight": "model.safetensors"}}'
        )
    assert architecture(directory / "again", again) == ours
    text = theirs.get_text_config()
    kinds = {"": ours.rope}
    if text.model_type in ("olmo3", "gemma3_text"):
        kinds = {"full_attention_": ours.rope, "sliding_attention_": ours.window_rope or ours.rope}
    for layers, rope in kinds.items():
        frequencies, factor = transformers_rotary(text, layers)
        assert torch.equal(inverse_frequencies(rope, ours.rope_head_dim), frequencies)
        assert factor == rope.attention_factor
    name = f"{CLASSES[ours.family]}ForCausalLM"
    module = importlib.import_module("transformers")
    with torch.device("meta"):
        model = getattr(module, name)(text)
    # transformers does not count the correction biases of routers, which are buffers there.
    biases = [each for key, each in model.named_buffers() if key.endswith("e_score_correction_bias")]
    assert sum(each.numel() for each in (*model.parameters(), *biases)) == parameters
