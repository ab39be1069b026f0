"""Reads the rotary positions of a config.json: transformers 5's rope_parameters, or the older two keys.

Every case computes what transformers 5 computes, or is refused by name. Where the keys contradict each other
transformers lets one of them win without a word; here they are refused.
"""

from __future__ import annotations

from typing import Any

from megatron_sftrl.models.architecture import Rope, yarn_attention_factor
from megatron_sftrl.models.hf_families import HfFamily
from megatron_sftrl.models.json_reader import JsonReader, shown

_COMMON_KEYS = frozenset({"rope_theta", "rope_type", "type", "partial_rotary_factor"})
_OWN_KEYS = {
    "default": frozenset[str](),
    "linear": frozenset({"factor"}),
    "llama3": frozenset(
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    ),
    "yarn": frozenset(
        {
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        }
    ),
}

# Keys of other types; some of them vLLM also reads where transformers does not.
_READ_SOMEWHERE = frozenset.union(*_OWN_KEYS.values()) | {
    "alpha",
    "fope_init_factor",
    "fope_sep_head",
    "long_factor",
    "long_mscale",
    "max_trained_positions",
    "mixed_b",
    "mrope_interleaved",
    "mrope_section",
    "num_inv_freq",
    "rope_dim",
    "short_factor",
    "short_mscale",
    "use_fope",
    "xdrope_section",
}


def read_rope(reader: JsonReader, *, default_theta: float, max_position_embeddings: int) -> Rope:
    """The rotary positions that a config.json asks for; problems are added to the reader.

    Args:
        default_theta: base when no key gives it.
        max_position_embeddings: tokens; the original length when no key gives it.
    """
    _refuse_partial_rotary(reader)
    sets: list[dict[str, Any]] = []
    for name in ("rope_scaling", "rope_parameters"):
        value = reader.get(name)
        if not value:
            continue
        if not isinstance(value, dict) or any(isinstance(item, dict) for item in value.values()):
            reader.say(name, f": expected one flat set of values for all layers, got {shown(value)}")
            return Rope(kind="default", theta=default_theta)
        sets.append(value)
    ropes = [_read_set(reader, values, default_theta, max_position_embeddings) for values in sets or [{}]]
    if any(rope != ropes[0] for rope in ropes):
        reader.problems.append("rope_scaling and rope_parameters contradict each other: remove one of them")
    return ropes[0]


def _read_set(
    reader: JsonReader, values: dict[str, Any], default_theta: float, max_position_embeddings: int
) -> Rope:
    rope = reader.part(values, "rope ")
    theta = _theta(reader, rope, default_theta)
    kind = values.get("rope_type", values.get("type", "default"))
    if values.get("type", kind) != kind:
        rope.problems.append(f"rope_type {kind!r} and type {values['type']!r} contradict each other")
    if not isinstance(kind, str) or kind not in _OWN_KEYS:
        reader.problems.append(f"rope_type {kind!r}: only {', '.join(_OWN_KEYS)} are supported")
        return Rope(kind="default", theta=theta)
    _refuse_partial_rotary(rope)
    for key in sorted(values.keys() - _COMMON_KEYS - _OWN_KEYS[kind]):
        if values[key] is None:
            continue
        if key in _READ_SOMEWHERE:
            rope.say(key, f" {shown(values[key])}: not supported with rope_type {kind!r}")
        else:
            rope.note(key, ": neither transformers nor vLLM reads it; it changes no number")
    if kind in ("default", "linear"):
        if reader.get("original_max_position_embeddings") is not None:
            reader.say("original_max_position_embeddings", f": rope_type {kind!r} does not use it, remove it")
        if kind == "default":
            return Rope(kind="default", theta=theta)
        return Rope(kind="linear", theta=theta, factor=rope.number("factor", at_least=1))
    original_length = _original_length(reader, rope, max_position_embeddings)
    if kind == "llama3":
        return _llama3(rope, theta, original_length)
    return _yarn(rope, theta, original_length, max_position_embeddings)


def _theta(reader: JsonReader, rope: JsonReader, default: float) -> float:
    if not rope.has("rope_theta"):
        return reader.number("rope_theta", default)
    theta = rope.number("rope_theta")
    # transformers takes the one inside the set.
    if reader.get("rope_theta") not in (None, theta):
        reader.problems.append("rope_theta is given twice with different values")
    return theta


def _original_length(reader: JsonReader, rope: JsonReader, max_position_embeddings: int) -> int:
    """Beside the set the key counts before the one inside; without both the longest sequence counts."""
    key = "original_max_position_embeddings"
    lengths = {part.whole(key) for part in (reader, rope) if part.has(key)}
    if len(lengths) > 1:
        reader.problems.append(f"{key} is given twice with different values")
    return min(lengths, default=max_position_embeddings)


def _llama3(rope: JsonReader, theta: float, original_length: int) -> Rope:
    factor = rope.number("factor", at_least=1)
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if rope.has("low_freq_factor") and rope.has("high_freq_factor") and not low < high:
        rope.say("high_freq_factor", f" {high:g} must be greater than low_freq_factor {low:g}")
    return Rope(
        kind="llama3",
        theta=theta,
        factor=factor,
        original_length=original_length,
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _yarn(rope: JsonReader, theta: float, original_length: int, max_position_embeddings: int) -> Rope:
    if not theta > 1:
        rope.problems.append(f"rope_theta {theta:g}: yarn needs a base above 1")
    if rope.has("factor") and rope.get("factor") is None:
        factor = max_position_embeddings / original_length
        if factor < 1:
            rope.problems.append(
                f"rope factor null means max_position_embeddings / original_max_position_embeddings = "
                f"{max_position_embeddings} / {original_length}, which is below 1"
            )
    else:
        factor = rope.number("factor", at_least=1)
    beta_fast, beta_slow = _or_default(rope, "beta_fast", 32.0), _or_default(rope, "beta_slow", 1.0)
    if beta_fast < beta_slow:
        rope.say("beta_fast", f" {beta_fast:g} must not be below beta_slow {beta_slow:g}")
    return Rope(
        kind="yarn",
        theta=theta,
        factor=factor,
        original_length=original_length,
        beta_fast=beta_fast,
        beta_slow=beta_slow,
        truncate=rope.flag("truncate", default=True),
        attention_factor=_attention_factor(rope, factor),
    )


def _attention_factor(rope: JsonReader, factor: float) -> float:
    if rope.get("attention_factor") is not None:
        return rope.number("attention_factor")
    mscale, mscale_all_dim = (
        None if rope.get(key) is None else rope.number(key, at_least=0)
        for key in ("mscale", "mscale_all_dim")
    )
    return yarn_attention_factor(factor, mscale, mscale_all_dim)


def _or_default(rope: JsonReader, key: str, default: float) -> float:
    """A number above 0; null stands for the default here."""
    return default if rope.get(key) is None else rope.number(key)


def _refuse_partial_rotary(reader: JsonReader) -> None:
    """Transformers ignores it in these families without scaling and fails with scaling; vLLM obeys it."""
    key = "partial_rotary_factor"
    value = reader.values.get(key, 1.0)
    if isinstance(value, bool) or value != 1.0:
        reader.say(key, f" {value!r}: only 1.0 is supported, rotary positions on whole heads")


# Reads which layers of a config.json attend over a sliding window, as transformers 5 decides it.
#
# A window of w tokens holds the token itself: query q attends to keys k with q - w < k <= q (transformers'
# sliding_window_overlay together with the causal mask).


_KINDS = ("full_attention", "sliding_attention")


def read_window(
    reader: JsonReader, family: HfFamily, *, num_layers: int, max_position_embeddings: int
) -> tuple[int | None, tuple[int, ...]]:
    """(window in tokens or None, layers that use it); problems are added to the reader.

    A window of max_position_embeddings or more excludes nothing and counts as none.
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
