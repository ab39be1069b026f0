"""What tells the weights of a file from those that a model needs, in a few lines."""

from __future__ import annotations

import re
from collections.abc import Sequence

_EACH_AT_MOST = 4
"""Problems that are listed one by one; of more, each kind is counted and its first ones are shown."""
_SHOWN = 2
_BODY_NAME = re.compile(r"(?P<prefix>.*?)(?P<rest>layers\.\d+\..*|embed_tokens\.weight|norm\.weight)")
_HF_PREFIX = "model."
_SIGNS = (
    (
        r"\.experts\.(gate_up_proj|down_proj)$",
        "all experts of a layer are one fused tensor here ({name}): save the model with transformers' "
        "save_pretrained and its default save_original_format=True, which writes the tensors of each expert",
    ),
    (
        r"\.(lora_[AB]|lora_embedding_[AB]|base_layer|modules_to_save)\.",
        "these are adapters ({name}): merge them into their model (peft's merge_and_unload) and save that",
    ),
    (
        r"\.(weight_scale|weight_scale_inv|weight_packed|qweight|qzeros|scales|g_idx|absmax|quant_map)$"
        r"|\.weight\.(absmax|quant_map|quant_state\.[\w.]+)$",
        "these weights are quantised ({name}): give the unquantised model",
    ),
    (
        r"\.(qkv_proj|query_key_value|W_pack|c_attn|gate_up_proj)\.",
        "projections are fused into one tensor here ({name}): expected q_proj, k_proj, v_proj, gate_proj and "
        "up_proj, as transformers' own classes of this architecture save them",
    ),
)


def mismatch_lines(*, missing: Sequence[str], unexpected: Sequence[str], other: Sequence[str]) -> list[str]:
    """The problems, at most four lines with a hint; never one line for each of thousands of tensors.

    Args:
        missing: tensors that are not there, each as it is shown: name, shape and anything to say about it.
        unexpected: tensors that no model of this kind has, likewise.
        other: whole sentences about tensors of another shape or dtype.
    """
    hint = _hint([each.split(" ")[0] for each in unexpected], [each.split(" ")[0] for each in missing])
    lines = [f"missing: {each}" for each in missing] + [f"not expected: {each}" for each in unexpected]
    lines += other
    if len(lines) + len(hint) > _EACH_AT_MOST:
        kinds = (("missing", missing), ("not expected", unexpected), ("of another shape or dtype", other))
        lines = [f"{len(of)} {kind}: {_shown(of)}" for kind, of in kinds if of]
    return lines + hint


def _shown(problems: Sequence[str]) -> str:
    """The first problems of one kind, in one line."""
    return "; ".join(problems[:_SHOWN]) + ("; ..." if len(problems) > _SHOWN else "")


def _hint(unexpected: Sequence[str], missing: Sequence[str]) -> list[str]:
    """What the names show about how the file was made, and what to do; nothing where they show nothing."""
    for pattern, text in _SIGNS:
        if name := next((name for name in unexpected if re.search(pattern, name)), None):
            return [text.format(name=name)]
    absent = {*missing}
    found = [match for name in unexpected if (match := _BODY_NAME.fullmatch(name))]
    renamed = [match["prefix"] for match in found if f"{_HF_PREFIX}{match['rest']}" in absent]
    if len({*renamed}) != 1:
        return []
    count = "every name" if len(renamed) == len(unexpected) else f"{len(renamed)} of {len(unexpected)} names"
    return [
        f"{count} not expected would fit with {_HF_PREFIX!r} in front instead of {renamed[0]!r}: rename the "
        "tensors, or load the language model alone with transformers' AutoModelForCausalLM and save it with "
        "save_pretrained"
    ]
