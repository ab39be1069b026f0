"""Reads and writes which layers of a config.json attend over a sliding window, as transformers 5 decides it.

A window of w tokens holds the token itself: query q attends to keys k with q - w < k <= q (transformers'
sliding_window_overlay together with the causal mask).
"""

from __future__ import annotations

from typing import Any

from megatron_sftrl.errors import UserError
from megatron_sftrl.models.architecture import Architecture
from megatron_sftrl.models.hf_family import HfFamily
from megatron_sftrl.models.hf_positions import KINDS
from megatron_sftrl.models.json_reader import JsonReader


def read_window(
    reader: JsonReader,
    family: HfFamily,
    *,
    num_layers: int,
    max_position_embeddings: int,
    no_rope_layers: tuple[int, ...],
    has_own_rope: bool,
) -> tuple[int | None, tuple[int, ...]]:
    """(window in tokens or None, layers that use it); problems are added to the reader.

    A window of max_position_embeddings or more excludes nothing and counts as none, unless its layers have
    positions of their own (`has_own_rope`).
    """
    window = _size(reader, family)
    has_others = "layer_types" in family.refuses or family.has_delta_net
    given = None if has_others else _given_layers(reader, num_layers)
    if family.window in ("layers", "pattern"):
        layers = given
        if layers is None:
            layers = _layers_by_rule(reader, family, num_layers, no_rope_layers)
            layers = layers if window is not None or family.window == "pattern" else ()
        elif reader.has(family.full_every_key or "") and layers != _layers_by_rule(
            reader, family, num_layers, no_rope_layers
        ):
            reader.say("layer_types", f" contradicts {family.full_every_key}: remove one of them")
        if layers and window is None:
            reader.say("layer_types", " has sliding_attention, but no sliding_window is in use")
    else:
        layers = () if window is None else tuple(range(num_layers))
        _refuse_other_layers(reader, family, layers, given)
    if window is None or not layers or (window >= max_position_embeddings and not has_own_rope):
        return None, ()
    return window, layers


def _layers_by_rule(
    reader: JsonReader, family: HfFamily, num_layers: int, no_rope_layers: tuple[int, ...]
) -> tuple[int, ...]:
    """The layers with a window where layer_types does not say it."""
    if family.no_rope_every is not None:
        return no_rope_layers
    if family.full_every is not None:
        key = family.full_every_key
        every = family.full_every if key is None else reader.whole(key, family.full_every)
        return tuple(layer for layer in range(num_layers) if (layer + 1) % every)
    first = reader.values.get("max_window_layers", 28)
    if not isinstance(first, int) or isinstance(first, bool) or first < 0:
        reader.say("max_window_layers", f": expected a whole number >= 0, got {first!r}")
        first = 0
    return tuple(range(first, num_layers))


def _size(reader: JsonReader, family: HfFamily) -> int | None:
    """The window in tokens, None if the family's switch is off or the size null."""
    if family.window == "none":
        # transformers' Llama does not read it, vLLM's does: the two would be different networks.
        is_off = reader.get("use_sliding_window") is False
        if (reader.get("sliding_window") is not None and not is_off) or reader.get("use_sliding_window"):
            reader.say("sliding_window", f": {family.architecture} has none in transformers, remove it")
        return None
    if family.window == "off":
        if reader.flag("use_sliding_window"):
            reader.say("use_sliding_window", f": a window in {family.architecture} is not supported")
        return None
    if family.window in ("switch", "layers") and not reader.flag("use_sliding_window"):
        return None
    if family.sliding_window is None and not reader.has("sliding_window"):
        return None
    if reader.has("sliding_window") and reader.get("sliding_window") is None and family.window != "pattern":
        return None
    return reader.whole("sliding_window", family.sliding_window)


def _given_layers(reader: JsonReader, num_layers: int) -> tuple[int, ...] | None:
    """The layers that layer_types puts under the window, None without layer_types."""
    kinds = reader.get("layer_types")
    if kinds is None:
        return None
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        reader.say("layer_types", f": expected a list with one entry for each of {num_layers} layers")
        return None
    others = sorted({str(kind) for kind in kinds} - set(KINDS))
    if others:
        reader.say("layer_types", f" {', '.join(others)}: only {' and '.join(KINDS)} are supported")
    return tuple(layer for layer, kind in enumerate(kinds) if kind == "sliding_attention")


def _refuse_other_layers(
    reader: JsonReader, family: HfFamily, layers: tuple[int, ...], given: tuple[int, ...] | None
) -> None:
    """Keys that transformers does not read in this family must agree with what it does."""
    if given is not None and given != layers:
        reader.say(
            "layer_types",
            f" contradicts sliding_window: transformers uses the window in "
            f"{'all' if layers else 'no'} layers of {family.architecture}",
        )
    if layers and reader.get("max_window_layers"):
        reader.say(
            "max_window_layers",
            f" {reader.get('max_window_layers')!r}: transformers uses the window in all layers of "
            f"{family.architecture}; only 0 is supported",
        )


def window_values(a: Architecture, line: HfFamily) -> dict[str, Any]:
    """What read_window reads back."""
    if line.window not in ("layers", "pattern") and len(a.window_layers) not in (0, a.num_layers):
        raise UserError(
            f"window_layers {list(a.window_layers)}: {line.architecture} has a sliding window in all of its "
            f"{a.num_layers} layers or in none; use family qwen2 or qwen3 for a window in some"
        )
    if line.window in ("none", "off") and a.sliding_window is not None:
        raise UserError(
            f"sliding_window {a.sliding_window}: {line.architecture} has none; use family mistral"
        )
    if line.window == "none":
        return {}
    values: dict[str, Any] = {"sliding_window": 0 if line.window == "off" else a.sliding_window}
    if line.window == "pattern":
        # transformers fails on null, also where no layer has a window.
        values["sliding_window"] = a.sliding_window or a.max_position_embeddings
    elif line.window != "always":
        values["use_sliding_window"] = a.sliding_window is not None
    if line.window in ("layers", "pattern", "off"):
        values["layer_types"] = [KINDS[layer in a.window_layers] for layer in range(a.num_layers)]
    if line.window in ("layers", "off") and line.no_rope_every is None:
        # Read only by those who do not know layer_types: the first layer from which all have the window.
        values["max_window_layers"] = next(
            (first for first in range(a.num_layers) if {*a.window_layers} >= {*range(first, a.num_layers)}),
            a.num_layers,
        )
    return values
