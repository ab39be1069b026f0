"""The supported Hugging Face architectures, and what transformers 5 assumes where config.json is silent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_sftrl.architectures.architecture import Family
from megatron_sftrl.architectures.json_reader import JsonReader
from megatron_sftrl.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureDefaults:
    """Experts that transformers assumes.

    Args:
        num_experts, experts_per_token: counts.
        width_key: the key that holds the width of an expert.
        width: that width, None if it must be given.
    """

    num_experts: int
    experts_per_token: int
    width_key: str
    width: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class HfFamily:
    """One architecture of transformers, and the defaults of its configuration class.

    Args:
        family: our name, which is transformers' model_type too.
        architecture: the class that config.json names.
        num_key_value_heads: when absent; None for num_attention_heads.
        null_key_value_heads: a null there means num_attention_heads; otherwise transformers fails on it.
        head_dim: when absent; None for hidden_size / num_attention_heads.
        null_head_dim: a null there means that quotient; otherwise transformers fails on it.
        max_position_embeddings, norm_eps, rope_theta: when absent.
        window: what decides about a sliding window. none: nothing, every layer attends to all. always:
            `sliding_window` alone. switch: `use_sliding_window` for all layers. layers: `use_sliding_window`
            with `layer_types` or `max_window_layers`.
        sliding_window: when absent, tokens.
        mixture: None for a dense family.
    """

    family: Family
    architecture: str
    num_key_value_heads: int | None = None
    null_key_value_heads: bool = False
    head_dim: int | None = None
    null_head_dim: bool = True
    max_position_embeddings: int
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    window: Literal["none", "always", "switch", "layers"]
    sliding_window: int | None = None
    mixture: MixtureDefaults | None = None


HF_FAMILIES: tuple[HfFamily, ...] = (
    HfFamily(
        family="llama",
        architecture="LlamaForCausalLM",
        null_key_value_heads=True,
        max_position_embeddings=2048,
        window="none",
    ),
    HfFamily(
        family="mistral",
        architecture="MistralForCausalLM",
        num_key_value_heads=8,
        max_position_embeddings=131072,
        window="always",
        sliding_window=4096,
    ),
    HfFamily(
        family="qwen2",
        architecture="Qwen2ForCausalLM",
        num_key_value_heads=32,
        null_key_value_heads=True,
        null_head_dim=False,
        max_position_embeddings=32768,
        window="layers",
        sliding_window=4096,
    ),
    HfFamily(
        family="qwen3",
        architecture="Qwen3ForCausalLM",
        num_key_value_heads=32,
        null_key_value_heads=True,
        head_dim=128,
        null_head_dim=False,
        max_position_embeddings=32768,
        window="layers",
        sliding_window=4096,
    ),
    HfFamily(
        family="mixtral",
        architecture="MixtralForCausalLM",
        num_key_value_heads=8,
        max_position_embeddings=131072,
        norm_eps=1e-5,
        rope_theta=1e6,
        window="always",
        mixture=MixtureDefaults(
            num_experts=8, experts_per_token=2, width_key="intermediate_size", width=None
        ),
    ),
    HfFamily(
        family="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        num_key_value_heads=4,
        null_head_dim=False,
        max_position_embeddings=32768,
        window="switch",
        sliding_window=4096,
        mixture=MixtureDefaults(
            num_experts=128, experts_per_token=8, width_key="moe_intermediate_size", width=768
        ),
    ),
)

_GEMMA = frozenset({"gemma2", "gemma3", "gemma3_text"})
_GEMMA_ARCHITECTURES = frozenset(
    {"Gemma2ForCausalLM", "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration", "Gemma3TextForCausalLM"}
)


def hf_family(family: Family) -> HfFamily:
    """The line of the table for one of our families."""
    return next(line for line in HF_FAMILIES if line.family == family)


def asked_family(reader: JsonReader) -> HfFamily:
    """The family that `architectures`, or without it `model_type`, names.

    Raises:
        UserError: none, several, or one that is not supported.
    """
    asked, model_type = reader.get("architectures"), reader.get("model_type")
    names = asked if isinstance(asked, list) else []
    if model_type in _GEMMA or any(str(name) in _GEMMA_ARCHITECTURES for name in names):
        raise UserError(
            f"{reader.file}: architectures is {asked!r} (model_type {model_type!r}): Gemma 2 and 3 cannot be "
            "built, megatron-core 0.16.1 has no norms after attention and MLP (sandwich norms) in its "
            "TransformerLayer and no logit soft-cap in its attention"
        )
    if asked is None:
        chosen = [line for line in HF_FAMILIES if line.family == model_type]
    else:
        chosen = [line for line in HF_FAMILIES if names == [line.architecture]]
    if not chosen:
        raise UserError(
            f"{reader.file}: architectures is {asked!r} (model_type {model_type!r}); "
            f"supported: {', '.join(line.architecture for line in HF_FAMILIES)}"
        )
    if model_type is not None and model_type != chosen[0].family:
        reader.problems.append(f"model_type {model_type!r} contradicts architectures {asked!r}")
    return chosen[0]
