"""Reads which layers of a config.json attend over a sliding window, as transformers 5 decides it.

A window of w tokens holds the token itself: query q attends to keys k with q - w < k <= q (transformers'
sliding_window_overlay together with the causal mask).
"""

from __future__ import annotations

from megatron_sftrl.architectures.hf_families import HfFamily
from megatron_sftrl.architectures.json_reader import JsonReader

_KINDS = ("full_attention", "sliding_attention")


def read_window(
    reader: JsonReader, family: HfFamily, *, num_layers: int, max_position_embeddings: int
) -> tuple[int | None, tuple[int, ...]]:
    """(window in tokens or None, layers that use it); problems are added to the reader.

    Args:
        reader: of the whole config.json.
        family: whose rules decide.
        num_layers: of the model.
        max_position_embeddings: a window this long excludes nothing and counts as none.
    """
    window = _size(reader, family)
    if family.family == "mistral" and reader.has("layer_types"):
        reader.say("layer_types", ": transformers builds a Ministral, not a Mistral, with it; remove it")
        return None, ()
    given = _given_layers(reader, num_layers)
    if family.window == "layers":
        layers = given
        if layers is None:
            first = reader.values.get("max_window_layers", 28)
            if not isinstance(first, int) or isinstance(first, bool) or first < 0:
                reader.say("max_window_layers", f": expected a whole number >= 0, got {first!r}")
                first = 0
            layers = () if window is None else tuple(range(first, num_layers))
        if layers and window is None:
            reader.say("layer_types", " has sliding_attention, but no sliding_window is in use")
    else:
        layers = () if window is None else tuple(range(num_layers))
        _refuse_other_layers(reader, family, layers, given)
    if window is None or not layers or window >= max_position_embeddings:
        return None, ()
    return window, layers


def _size(reader: JsonReader, family: HfFamily) -> int | None:
    """The window in tokens, None if the family's switch is off or the size null."""
    if family.window == "none":
        # transformers' Llama does not read it, vLLM's does: the two would be different networks.
        is_off = reader.get("use_sliding_window") is False
        if (reader.get("sliding_window") is not None and not is_off) or reader.get("use_sliding_window"):
            reader.say("sliding_window", f": {family.architecture} has none in transformers, remove it")
        return None
    if family.window != "always" and not reader.flag("use_sliding_window"):
        return None
    if family.sliding_window is None and not reader.has("sliding_window"):
        return None
    if reader.has("sliding_window") and reader.get("sliding_window") is None:
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
    others = sorted({str(kind) for kind in kinds} - set(_KINDS))
    if others:
        reader.say("layer_types", f" {', '.join(others)}: only {' and '.join(_KINDS)} are supported")
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
