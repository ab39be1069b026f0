"""Reads a Hugging Face config.json: each thing it asks for is honoured, or refused by name.

Only JSON is read, transformers is not imported. Absent keys take the defaults of transformers' own
configuration classes (version 5), so that both build the same network.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sftrl.architectures.architecture import (
    Architecture,
    Family,
    divided_head_dim,
    has_qk_norm,
    has_qkv_bias,
)
from megatron_sftrl.architectures.json_reader import JsonReader, read_json_object


@dataclass(frozen=True, slots=True, kw_only=True)
class _FamilyDefaults:
    """What transformers assumes when config.json does not say."""

    family: Family
    model_type: str
    num_key_value_heads: int | None
    head_dim: int | None
    max_position_embeddings: int


_FAMILIES = {
    "LlamaForCausalLM": _FamilyDefaults(
        family="llama",
        model_type="llama",
        num_key_value_heads=None,
        head_dim=None,
        max_position_embeddings=2048,
    ),
    "Qwen2ForCausalLM": _FamilyDefaults(
        family="qwen2",
        model_type="qwen2",
        num_key_value_heads=32,
        head_dim=None,
        max_position_embeddings=32768,
    ),
    "Qwen3ForCausalLM": _FamilyDefaults(
        family="qwen3",
        model_type="qwen3",
        num_key_value_heads=32,
        head_dim=128,
        max_position_embeddings=32768,
    ),
}

_READ_KEYS = frozenset(
    {
        "architectures",
        "attention_bias",
        "attention_dropout",
        "auto_map",
        "head_dim",
        "hidden_act",
        "hidden_size",
        "initializer_range",
        "intermediate_size",
        "is_encoder_decoder",
        "layer_types",
        "max_position_embeddings",
        "mlp_bias",
        "model_type",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "quantization_config",
        "rms_norm_eps",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "tie_word_embeddings",
        "use_sliding_window",
        "vocab_size",
    }
)

# They concern storage, generation, labels or caches, never the logits of a forward with the full context.
# sliding_window and max_window_layers act only with use_sliding_window or layer_types, which are checked;
# pretraining_tp only split the same products into slices.
_KEYS_WITHOUT_EFFECT = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_name_or_path",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "id2label",
        "label2id",
        "max_window_layers",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "return_dict",
        "sliding_window",
        "task_specific_params",
        "tokenizer_class",
        "torch_dtype",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
        "use_cache",
    }
)

_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def from_hf_config(path: Path | str) -> Architecture:
    """The architecture that a config.json describes.

    Args:
        path: the file, or the directory that holds it.
    Raises:
        ValueError: no such file, not JSON, or every request in it that cannot be honoured.
    """
    file = Path(path)
    file = file / "config.json" if file.is_dir() else file
    reader = read_json_object(file)
    defaults = _family(reader)
    _refuse_what_is_not_supported(reader)
    sizes = {
        name: reader.whole(name)
        for name in (
            "num_hidden_layers",
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "vocab_size",
        )
    }
    heads = sizes["num_attention_heads"]
    groups = reader.whole("num_key_value_heads", defaults.num_key_value_heads or heads)
    max_positions = reader.whole("max_position_embeddings", defaults.max_position_embeddings)
    head_dim = defaults.head_dim
    if reader.get("head_dim") is not None:
        head_dim = reader.whole("head_dim")
    theta, scaling_factor = _rope(reader)
    norm_eps = reader.number("rms_norm_eps", 1e-6)
    init_std = reader.number("initializer_range", 0.02)
    tie_embeddings = reader.flag("tie_word_embeddings")
    reader.raise_problems()
    try:
        return Architecture(
            family=defaults.family,
            num_layers=sizes["num_hidden_layers"],
            hidden_size=sizes["hidden_size"],
            ffn_hidden_size=sizes["intermediate_size"],
            num_attention_heads=heads,
            num_query_groups=groups,
            head_dim=head_dim or divided_head_dim(sizes["hidden_size"], heads),
            vocab_size=sizes["vocab_size"],
            max_position_embeddings=max_positions,
            rope_theta=theta,
            rope_scaling_factor=scaling_factor,
            norm_eps=norm_eps,
            tie_embeddings=tie_embeddings,
            qkv_bias=has_qkv_bias(defaults.family),
            qk_norm=has_qk_norm(defaults.family),
            init_std=init_std,
        )
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _family(reader: JsonReader) -> _FamilyDefaults:
    asked = reader.get("architectures")
    by_type = {defaults.model_type: name for name, defaults in _FAMILIES.items()}
    model_type = reader.get("model_type")
    if asked is None and model_type in by_type:
        asked = [by_type[model_type]]
    name = asked[0] if isinstance(asked, list) and len(asked) == 1 else None
    if name not in _FAMILIES:
        raise ValueError(
            f"{reader.file}: architectures is {asked!r} (model_type {model_type!r}); "
            f"supported: {', '.join(_FAMILIES)}"
        )
    defaults = _FAMILIES[name]
    if model_type is not None and model_type != defaults.model_type:
        reader.problems.append(f"model_type {model_type!r} contradicts architectures {asked!r}")
    return defaults


def _refuse_what_is_not_supported(reader: JsonReader) -> None:
    say = reader.problems.append
    if reader.get("auto_map"):
        say("auto_map asks for code that comes with the model: remote code is never run")
    if reader.get("quantization_config"):
        say("quantization_config: quantised weights cannot be trained; use the unquantised model")
    if reader.get("is_encoder_decoder"):
        say("is_encoder_decoder: only decoder-only models are supported")
    activation = reader.get("hidden_act")
    if activation not in (None, "silu"):
        say(f"hidden_act {activation!r}: only silu (SwiGLU) is supported")
    # Qwen2 does not read attention_bias: its q, k and v always carry biases and its output never does.
    if reader.get("attention_bias") and reader.get("model_type") != "qwen2":
        say("attention_bias: biases on all four projections are not supported")
    if reader.get("mlp_bias"):
        say("mlp_bias: biases in the MLP are not supported")
    if reader.get("attention_dropout"):
        say(f"attention_dropout {reader.get('attention_dropout')}: dropout is not supported, set 0.0")
    if reader.get("use_sliding_window"):
        say("use_sliding_window: attention over a window is not supported, only over the full context")
    other_layers = sorted({str(kind) for kind in reader.get("layer_types") or []} - {"full_attention"})
    if other_layers:
        say(f"layer_types {', '.join(other_layers)}: only full_attention is supported")
    for key in sorted(reader.values.keys() - _READ_KEYS - _KEYS_WITHOUT_EFFECT):
        # null, false, 0 and empty ask for nothing.
        if reader.get(key):
            say(f"{key}: not known here; remove it if it does not change what the network computes")


def _rope(reader: JsonReader) -> tuple[float, float | None]:
    """(theta, Llama 3.1 scaling factor or None), from transformers 5's rope_parameters or the older keys."""
    scaling = reader.get("rope_scaling") or {}
    parameters = reader.get("rope_parameters") or {}
    for name, value in (("rope_scaling", scaling), ("rope_parameters", parameters)):
        if not isinstance(value, dict) or any(isinstance(item, dict) for item in value.values()):
            reader.problems.append(f"{name}: expected one flat set of values for all layers, got {value!r}")
            return 1.0, None
    merged = {**scaling, **parameters}
    contradictions = [k for k in scaling.keys() & parameters.keys() if scaling[k] != parameters[k]]
    theta = reader.number("rope_theta", merged.get("rope_theta") or 10000.0)
    if merged.get("rope_theta") not in (None, theta):
        contradictions.append("rope_theta")
    for key in contradictions:
        reader.problems.append(f"{key} is given twice with different values")
    kind = merged.get("rope_type") or merged.get("type") or "default"
    known = {"rope_theta", "rope_type", "type"}
    if kind == "llama3":
        return theta, _llama3_factor(reader, merged, known)
    if kind != "default":
        reader.problems.append(f"rope_type {kind!r}: only default and llama3 are supported")
    else:
        _refuse_unknown_rope(reader, merged, known)
    return theta, None


def _llama3_factor(reader: JsonReader, rope: dict[str, Any], known: set[str]) -> float | None:
    """The factor; the other values are fixed in megatron-core's RotaryEmbedding._apply_scaling."""
    _refuse_unknown_rope(reader, rope, known | {"factor", *_LLAMA3_ROPE})
    for key, only in _LLAMA3_ROPE.items():
        if rope.get(key) != only:
            reader.problems.append(f"rope {key} {rope.get(key)!r}: llama3 scaling is supported with {only}")
    factor = rope.get("factor")
    if not isinstance(factor, int | float) or isinstance(factor, bool) or factor < 1:
        reader.problems.append(f"rope factor: expected a number >= 1, got {factor!r}")
        return None
    return float(factor)


def _refuse_unknown_rope(reader: JsonReader, rope: dict[str, Any], known: set[str]) -> None:
    for key in sorted(rope.keys() - known):
        is_whole_head = key == "partial_rotary_factor" and rope[key] == 1.0
        if rope[key] is not None and not is_whole_head:
            reader.problems.append(f"rope {key} {rope[key]!r}: not supported")
