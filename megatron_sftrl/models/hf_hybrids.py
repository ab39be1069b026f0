"""Keys of hybrids, whose layers have attention or a gated delta net, and of multimodal models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_sftrl.errors import UserError
from megatron_sftrl.models.architecture import Architecture, DeltaNet, Family
from megatron_sftrl.models.hf_families import hf_family
from megatron_sftrl.models.hf_tensor_file import tensor_names
from megatron_sftrl.models.json_reader import JsonReader

_DELTA, _FULL = "linear_attention", "full_attention"
_INTERVAL = "full_attention_interval"
_SIZES = {
    "num_key_heads": ("linear_num_key_heads", 16),
    "num_value_heads": ("linear_num_value_heads", 32),
    "key_dim": ("linear_key_head_dim", 128),
    "value_dim": ("linear_value_head_dim", 128),
    "kernel": ("linear_conv_kernel_dim", 4),
}
"""By field of a DeltaNet, its key and what transformers assumes."""
# Of them mamba_ssm_dtype says in which dtype vLLM keeps what it caches.
DELTA_KEYS = frozenset({_INTERVAL, "mamba_ssm_dtype", *(key for key, _ in _SIZES.values())})


def read_delta_net(reader: JsonReader, num_layers: int) -> DeltaNet | None:
    """The gated delta nets; problems are added to the reader. None where no layer has one."""
    layers = _delta_layers(reader, num_layers)
    sizes = {field: reader.whole(key, default) for field, (key, default) in _SIZES.items()}
    try:
        return DeltaNet(layers=layers, **sizes) if layers else None
    except ValueError as error:
        reader.problems.append(str(error))
        return None


def _delta_layers(reader: JsonReader, num_layers: int) -> tuple[int, ...]:
    every = reader.whole(_INTERVAL, 4)
    by_interval = tuple(layer for layer in range(num_layers) if (layer + 1) % every)
    kinds = reader.get("layer_types")
    if kinds is None:
        return by_interval
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        reader.say("layer_types", f": expected a list with one entry for each of {num_layers} layers")
        return by_interval
    if others := sorted({str(kind) for kind in kinds} - {_DELTA, _FULL}):
        reader.say("layer_types", f" {', '.join(others)}: only {_DELTA} and {_FULL} are supported")
    layers = tuple(layer for layer, kind in enumerate(kinds) if kind == _DELTA)
    if reader.has(_INTERVAL) and layers != by_interval:
        reader.say("layer_types", f" contradicts {_INTERVAL} {every}: remove one of them")
    return layers


def delta_net_values(a: Architecture) -> dict[str, Any]:
    """What read_delta_net reads back, of an architecture of a hybrid family."""
    sizes = {key: getattr(a.delta_net, field, default) for field, (key, default) in _SIZES.items()}
    kinds = [_FULL if a.attends(layer) else _DELTA for layer in range(a.num_layers)]
    return {**sizes, "layer_types": kinds}


# A multimodal checkpoint holds its language model's configuration in text_config, and its tensors below
# model.language_model (a Gemma 3 as published: language_model). Everything else is about images and video.


_LANGUAGE_MODELS: Mapping[str, tuple[Family, ...]] = {
    "gemma3": ("gemma3_text",),
    "mistral3": ("mistral", "ministral3", "mistral4"),
    "qwen3_5": ("qwen3_5_text",),
    "qwen3_5_moe": ("qwen3_5_moe_text",),
}
"""By model_type of the multimodal model: those of its language model, the first where it does not say."""
_LANGUAGE_PREFIXES = {
    "model.language_model.": "model.",
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
}
_VISION_PREFIXES = ("model.visual.", "model.vision_tower.", "model.multi_modal_projector.")
_VISION_PREFIXES += ("vision_tower.", "multi_modal_projector.")
_FROM_OUTSIDE = ("bos_token_id", "dtype", "eos_token_id", "pad_token_id", "quantization_config")
_FROM_OUTSIDE += ("tie_word_embeddings", "torch_dtype", "transformers_version")


def is_multimodal(values: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a multimodal model whose language model is a family here."""
    return values.get("model_type") in _LANGUAGE_MODELS and isinstance(values.get("text_config"), dict)


def language_model_values(values: dict[str, Any]) -> dict[str, Any]:
    """The config.json of the language model inside a multimodal one; any other one as it is."""
    if not is_multimodal(values):
        return values
    families = _LANGUAGE_MODELS[values["model_type"]]
    inside: dict[str, Any] = values["text_config"]
    outside = {key: values[key] for key in _FROM_OUTSIDE if key in values and inside.get(key) is None}
    asked = inside.get("model_type")
    family = families[families.index(asked) if asked in families else 0]
    architectures = [hf_family(family).architecture]
    return {"model_type": family, **inside, **outside, "architectures": architectures}


def language_model_name(name: str) -> str | None:
    """A tensor of a multimodal checkpoint as its language model alone calls it; None: it has no such one."""
    if name.startswith(_VISION_PREFIXES):
        return None
    for prefix, own in _LANGUAGE_PREFIXES.items():
        if name.startswith(prefix):
            return own + name.removeprefix(prefix)
    return name


def language_model(reader: JsonReader, *, text_only: bool) -> JsonReader:
    """A reader of the language model's configuration, of a multimodal one with `text_only` alone.

    Raises:
        UserError: it is multimodal, and nobody has said that its language model is enough.
    """
    if not is_multimodal(reader.values):
        return reader
    if not text_only:
        raise UserError(
            f"{reader.file}: model_type {reader.get('model_type')!r} is a multimodal model: set "
            "model.text_only: true (sftrl convert: --text-only) to train and export its language model alone"
        )
    notes = [*reader.notes, "text_config alone is read: a model of text, without images and video"]
    return JsonReader(
        reader.file,
        {**language_model_values(reader.values), **_tied_or_not(reader, notes)},
        prefix="text_config: ",
        problems=reader.problems,
        notes=notes,
    )


def _tied_or_not(reader: JsonReader, notes: list[str]) -> dict[str, bool]:
    """Whether the output layer is the embedding, of a file that says it twice and differently.

    transformers 5 does so whenever it saves a Mistral 3 that was published without the outer key, whose
    default is true, and goes by the weights: an output layer that is there is not tied.
    """
    key = "tie_word_embeddings"
    inside, outside = reader.values["text_config"].get(key), reader.get(key)
    if inside is None or not reader.has(key) or outside == inside:
        return {}
    said = f" {outside!r} contradicts that of text_config, {inside!r}"
    names = tensor_names(reader.file.parent)
    if names is None:
        reader.say(key, f"{said}, and there are no weights to tell which is true; set both alike")
        return {}
    has_output = any(name.endswith("lm_head.weight") for name in names)
    notes.append(f"{key}{said}: the weights have {'an' if has_output else 'no'} output layer of their own")
    return {key: not has_output}
