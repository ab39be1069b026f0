"""Reads the rotary positions of a config.json: transformers 5's rope_parameters, or the older two keys.

Every case computes what transformers 5 computes, or is refused by name. Where the keys contradict each other
transformers lets one of them win without a word; here they are refused.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from megatron_sftrl.models.architecture import Architecture
from megatron_sftrl.models.hf_family import HfFamily
from megatron_sftrl.models.json_reader import JsonReader, shown
from megatron_sftrl.models.rope import Rope, longrope_attention_factor, yarn_attention_factor

KINDS = ("full_attention", "sliding_attention")
_BETA = "llama_4_scaling_beta"
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
    "longrope": frozenset(
        {"attention_factor", "factor", "long_factor", "original_max_position_embeddings", "short_factor"}
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


def read_ropes(
    reader: JsonReader, family: HfFamily, *, max_position_embeddings: int
) -> tuple[Rope, Rope | None]:
    """The rotary positions that a config.json asks for, and those of window layers if they are others.

    Problems are added to the reader.

    Args:
        max_position_embeddings: tokens; the original length when no key gives it.
    """
    read = partial(_read_set, reader, family=family, max_position_embeddings=max_position_embeddings)
    if family.rope_by_layer_type:
        sets_of = _sets_by_layer_type if family.window_theta is None else _sets_with_bases
        full, window = (read(values) for values in sets_of(reader, family))
        return full, (None if window == full else window)
    sets: list[dict[str, Any]] = []
    for name in ("rope_scaling", "rope_parameters"):
        value = reader.get(name)
        if not value:
            continue
        if not _is_flat(value):
            reader.say(name, f": expected one flat set of values for all layers, got {shown(value)}")
            return Rope(kind="default", theta=family.rope_theta), None
        sets.append(value)
    if not sets:
        sets.append(dict(family.rope or {}))
    ropes = [read(values) for values in sets]
    if any(rope != ropes[0] for rope in ropes):
        reader.problems.append("rope_scaling and rope_parameters contradict each other: remove one of them")
    return ropes[0], None


def _is_flat(value: object) -> bool:
    return isinstance(value, dict) and not any(isinstance(item, dict) for item in value.values())


def _sets_by_layer_type(reader: JsonReader, family: HfFamily) -> tuple[dict[str, Any], dict[str, Any]]:
    """For layers of full attention and of a window: one of each, or the older keys, which scale the first.

    transformers gives the second its default base then, whatever rope_theta says.
    """
    nested, scaling = reader.get("rope_parameters"), reader.get("rope_scaling")
    if nested is None:
        if scaling is not None and not _is_flat(scaling):
            reader.say("rope_scaling", f": expected one flat set of values, got {shown(scaling)}")
            return {}, {}
        if reader.get("rope_theta") not in (None, family.rope_theta):
            reader.say(
                "rope_theta",
                f" {reader.get('rope_theta')!r}: transformers gives layers with a window "
                f"{family.rope_theta:g} all the same; give rope_parameters with both of {KINDS}",
            )
        if scaling and "rope_type" not in scaling:
            reader.say("rope_scaling", ": rope_type is missing: transformers scales nothing without it")
        return scaling or {}, {}
    if scaling is not None or not isinstance(nested, dict) or nested.keys() != set(KINDS):
        reader.say("rope_parameters", f": expected a set for each of {KINDS} and no rope_scaling")
        return {}, {}
    if not all(_is_flat(values) for values in nested.values()):
        reader.say("rope_parameters", f": expected two flat sets of values, got {shown(nested)}")
        return {}, {}
    return nested[KINDS[0]], nested[KINDS[1]]


_BASES = ("rope_theta", "rope_local_base_freq")
"""Older keys of a Gemma 3, in the order of KINDS."""


def _sets_with_bases(reader: JsonReader, family: HfFamily) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same of a Gemma 3, where older keys give a base to each kind of layers, and scale the first."""
    assert family.window_theta is not None
    nested, scaling = reader.get("rope_parameters") or {}, reader.get("rope_scaling") or {}
    if not isinstance(nested, dict) or not all(_is_flat(values) for values in (scaling, *nested.values())):
        reader.say("rope_parameters", f": expected flat sets of values for {KINDS}, got {shown(nested)}")
        return {}, {}
    if others := sorted(nested.keys() - set(KINDS)):
        reader.say("rope_parameters", f" {', '.join(others)}: only sets for {KINDS} are supported")
    if scaling and "rope_type" not in scaling:
        reader.say("rope_scaling", ": rope_type is missing: transformers scales nothing without it")
    full, window = (dict(nested.get(kind, {})) for kind in KINDS)
    for values, key, default in zip(
        (full, window), _BASES, (family.rope_theta, family.window_theta), strict=True
    ):
        base = reader.number(key, default) if reader.has(key) or "rope_theta" not in values else None
        if base is not None and values.setdefault("rope_theta", base) != base:
            reader.say(key, f" {base:g} contradicts that of rope_parameters, {values['rope_theta']!r}")
    if nested.get(KINDS[0]) and any(full.get(key) != value for key, value in scaling.items()):
        reader.problems.append("rope_scaling and rope_parameters contradict each other: remove one of them")
    return {**full, **scaling}, window


def _read_set(
    reader: JsonReader, values: dict[str, Any], *, family: HfFamily, max_position_embeddings: int
) -> Rope:
    rope = reader.part(values, "rope ")
    theta = _theta(reader, rope, family)
    kind = values.get("rope_type", values.get("type", "default"))
    if values.get("type", kind) != kind:
        rope.problems.append(f"rope_type {kind!r} and type {values['type']!r} contradict each other")
    if not isinstance(kind, str) or kind not in family.rope_kinds:
        reader.problems.append(f"rope_type {kind!r}: only {', '.join(family.rope_kinds)} are supported")
        return Rope(kind="default", theta=theta)
    plain = Rope(
        kind="default",
        theta=theta,
        fraction=_fraction(reader, rope, family),
        interleaved=family.interleaved,
    )
    if family.rope_by_layer_type and values.get("truncate") is False:
        rope.say("truncate", " False: transformers does not read it in a set for one kind of layers")
    own = family.rope.keys() if family.rope else set()
    for key in sorted(values.keys() - _COMMON_KEYS - _OWN_KEYS[kind] - own - family.rope_ignores):
        if values[key] is None:
            continue
        if key in _READ_SOMEWHERE:
            rope.say(key, f" {shown(values[key])}: not supported with rope_type {kind!r}")
        else:
            rope.note(key, ": neither transformers nor vLLM reads it; it changes no number")
    if kind in ("default", "linear"):
        key = "original_max_position_embeddings"
        if reader.get(key) is not None and key not in family.keys:
            reader.say(key, f": rope_type {kind!r} does not use it, remove it")
        if kind == "default":
            return plain
        return replace(plain, kind="linear", factor=rope.number("factor", at_least=1))
    if kind == "longrope":
        return replace(plain, kind=kind, **_longrope(reader, rope, max_position_embeddings))
    original_length = _original_length(reader, rope, max_position_embeddings)
    if kind == "llama3":
        return replace(plain, kind=kind, original_length=original_length, **_llama3(rope))
    yarn = replace(
        plain,
        kind="yarn",
        original_length=original_length,
        **_yarn(rope, theta, original_length, max_position_embeddings),
    )
    if family.has_latent:
        yarn = replace(yarn, **_mscales(rope))
    return replace(yarn, query_beta=_query_beta(reader, rope, yarn)) if _BETA in own else yarn


def _query_beta(reader: JsonReader, rope: JsonReader, yarn: Rope) -> float:
    """Of a Ministral 3, whose attention reads both keys inside the set.

    vLLM reads them from a set of its own, llama_4_scaling, which an export has and which must agree.
    """
    beta = rope.number(_BETA, at_least=0)
    if not rope.has("original_max_position_embeddings"):
        rope.say("original_max_position_embeddings", " is missing")
    if reader.has("llama_4_scaling") and reader.get("llama_4_scaling") != scaling_for_vllm(yarn, beta):
        reader.say(
            "llama_4_scaling",
            f" {shown(reader.get('llama_4_scaling'))}: transformers reads {scaling_for_vllm(yarn, beta)}",
        )
    return beta


_ROTARY_DIM = "rotary_dim"
FOR_VLLM = ("llama_4_scaling", _ROTARY_DIM)
"""Keys of a config.json that transformers does not write and without which vLLM fails or computes another
model."""


def scaling_for_vllm(rope: Rope, beta: float) -> dict[str, Any]:
    """vLLM's llama_4_scaling."""
    return {"original_max_position_embeddings": rope.original_length, "beta": beta}


def _theta(reader: JsonReader, rope: JsonReader, family: HfFamily) -> float:
    if not rope.has("rope_theta"):
        return reader.number("rope_theta", family.rope_theta)
    theta = rope.number("rope_theta")
    # transformers takes the one inside the set.
    if family.window_theta is None and reader.get("rope_theta") not in (None, theta):
        reader.problems.append("rope_theta is given twice with different values")
    return theta


def _original_length(reader: JsonReader, rope: JsonReader, max_position_embeddings: int) -> int:
    """Beside the set the key counts before the one inside; without both the longest sequence counts."""
    key = "original_max_position_embeddings"
    lengths = {part.whole(key) for part in (reader, rope) if part.has(key)}
    if len(lengths) > 1:
        reader.problems.append(f"{key} is given twice with different values")
    return min(lengths, default=max_position_embeddings)


def _llama3(rope: JsonReader) -> dict[str, Any]:
    factor = rope.number("factor", at_least=1)
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if rope.has("low_freq_factor") and rope.has("high_freq_factor") and not low < high:
        rope.say("high_freq_factor", f" {high:g} must be greater than low_freq_factor {low:g}")
    return {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}


def _longrope(reader: JsonReader, rope: JsonReader, max_position_embeddings: int) -> dict[str, Any]:
    """Of a Phi-3, in transformers and vLLM: they agree up to the original length, on short_factor.

    Beyond it transformers takes long_factor for a forward with a longer sequence, vLLM for an engine whose
    max_model_len is larger, and both leave keys and values in caches as they are.
    """
    key = "original_max_position_embeddings"
    original = reader.whole(key, _PHI3_LENGTH)
    if rope.get(key) not in (None, original):
        rope.say(key, f" {rope.get(key)!r}: transformers takes the one beside the set, {original}")
    if original < 2:
        reader.say(key, f" {original}: expected at least 2")
        original = 2
    factor = max_position_embeddings / original
    built = {"factor": factor, "attention_factor": longrope_attention_factor(factor, original)}
    for name, value in built.items():
        if rope.get(name) not in (None, value):
            rope.say(name, f" {rope.get(name)!r}: vLLM takes {value:g}, of max_position_embeddings and {key}")
    rope.note("short_factor", f" counts, in sequences of up to {original} tokens; long_factor is only kept")
    return {
        **built,
        "original_length": original,
        "short_factors": rope.numbers("short_factor"),
        "long_factors": rope.numbers("long_factor"),
    }


_PHI3_LENGTH = 4096
"""transformers' original length where a Phi-3's file is silent."""


def longest_of(rope: Rope, max_position_embeddings: int) -> int:
    """Tokens of the longest sequence that is built."""
    original = rope.original_length if rope.kind == "longrope" else None
    return min(max_position_embeddings, original or max_position_embeddings)


def _yarn(
    rope: JsonReader, theta: float, original_length: int, max_position_embeddings: int
) -> dict[str, Any]:
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
    return {
        "factor": factor,
        "beta_fast": beta_fast,
        "beta_slow": beta_slow,
        "truncate": rope.flag("truncate", default=True),
        "attention_factor": _attention_factor(rope, factor),
    }


def _attention_factor(rope: JsonReader, factor: float) -> float:
    if rope.get("attention_factor") is not None:
        return rope.number("attention_factor")
    mscale, mscale_all_dim = (
        None if rope.get(key) is None else rope.number(key, at_least=0)
        for key in ("mscale", "mscale_all_dim")
    )
    return yarn_attention_factor(factor, mscale, mscale_all_dim)


def _mscales(rope: JsonReader) -> dict[str, float]:
    """What latent attention reads beside the other keys of yarn, where transformers and vLLM agree."""
    for key in ("attention_factor", "truncate"):
        if rope.get(key) is not None:
            rope.say(key, f" {rope.get(key)!r}: vLLM does not read it in latent attention, remove it")
    if rope.get("factor") is None:
        rope.say("factor", " is missing: latent attention reads it")
    mscale, of_all = (rope.get(key) or 0.0 for key in ("mscale", "mscale_all_dim"))
    if bool(mscale) != bool(of_all) and (mscale, of_all) != (1, 0):
        rope.say("mscale", f" {mscale}, mscale_all_dim {of_all}: only both above 0, or none, are supported")
    return {"mscale": float(mscale), "mscale_all_dim": float(of_all)} if of_all else {}


def latent_head(reader: JsonReader, family: HfFamily) -> tuple[int, int]:
    """Of the dimensions of a head in latent attention those that turn, and the others."""
    return (
        reader.whole("qk_rope_head_dim", 64),
        reader.whole("qk_nope_head_dim", family.sizes["qk_nope_head_dim"]),
    )


def _or_default(rope: JsonReader, key: str, default: float) -> float:
    """A number above 0; null stands for the default here."""
    return default if rope.get(key) is None else rope.number(key)


def _fraction(reader: JsonReader, rope: JsonReader, family: HfFamily) -> float:
    """Of a head's dimensions that turn.

    Where it is always the whole, transformers ignores the key without scaling and fails with scaling; vLLM
    obeys it.
    """
    key = "partial_rotary_factor"
    if family.partial_rotary is None:
        built, what = 1.0, "rotary positions on whole heads"
        if family.latent_head_dim == "all":
            turning, still = latent_head(reader, family)
            built, what = turning / (turning + still), "what qk_rope_head_dim says"
        for part in (reader, rope):
            value = part.values.get(key, built)
            if isinstance(value, bool) or value != built:
                part.say(key, f" {value!r}: only {built} is supported, {what}")
        if built != 1 and key not in {**reader.values, **(reader.get("rope_scaling") or {key: built})}:
            reader.say("rope_scaling", f" has no {key}: transformers takes 1 then and fails, write {built}")
        return 1.0
    given = {part.number(key) for part in (reader, rope) if part.has(key)}
    if len(given) > 1:
        reader.problems.append(f"{key} is given twice with different values")
    fraction = max(given, default=family.partial_rotary)
    if _ROTARY_DIM in family.keys and reader.get(_ROTARY_DIM) is not None:
        head_dim, turning = reader.whole("head_dim", family.head_dim), reader.whole(_ROTARY_DIM)
        fraction = fraction if given else turning / head_dim
        if int(head_dim * fraction) != turning:
            reader.say(_ROTARY_DIM, f" {turning} of head_dim {head_dim} contradicts {key} {fraction:g}")
    if fraction > 1:
        reader.say(key, f" {fraction:g}: at most 1, a whole head")
    return fraction


def read_no_rope_layers(reader: JsonReader, family: HfFamily, num_layers: int) -> tuple[int, ...]:
    """The layers without positions: where no_rope_layers has a 0."""
    if family.no_rope_every is None:
        return ()
    turns = reader.get("no_rope_layers")
    if turns is None:
        every = reader.whole("no_rope_layer_interval", family.no_rope_every)
        return tuple(layer for layer in range(num_layers) if (layer + 1) % every == 0)
    if not isinstance(turns, list) or len(turns) != num_layers or any(turn not in (0, 1) for turn in turns):
        reader.say("no_rope_layers", f": expected a list of 0 or 1 for each of {num_layers} layers")
        return ()
    return tuple(layer for layer, turn in enumerate(turns) if not turn)


# Writes positions of an architecture as keys of a config.json.


def rope_values(a: Architecture, family: HfFamily) -> dict[str, Any]:
    """What read_ropes and read_no_rope_layers read back, under newer and older names."""
    values: dict[str, Any] = {}
    if family.no_rope_every is not None:
        values["no_rope_layers"] = [int(layer not in a.no_rope_layers) for layer in range(a.num_layers)]
        values["no_rope_layer_interval"] = family.no_rope_every
    if family.rope_by_layer_type:
        ropes = (a.rope, a.window_rope or a.rope)
        sets = [_rope_set(rope, family) for rope in ropes]
        values["rope_parameters"] = dict(zip(KINDS, sets, strict=True))
        if family.window_theta is not None:
            values |= {key: rope.theta for key, rope in zip(_BASES, ropes, strict=True)}
            values |= {} if a.rope.kind == "default" else {"rope_scaling": sets[0]}
        return values
    scaling = _rope_set(a.rope, family)
    if family.latent_head_dim == "all":
        scaling["partial_rotary_factor"] = a.rope_head_dim / a.head_dim
    values |= {"rope_parameters": scaling, "rope_theta": a.rope.theta}
    if a.rope.kind == "longrope":
        assert a.rope.original_length is not None
        # The quotient of two lengths, which is exact enough to give the first one back.
        values["max_position_embeddings"] = round(a.rope.factor * a.rope.original_length)
        values["original_max_position_embeddings"] = a.rope.original_length
        # Older readers refuse a fourth key.
        older = {"short_factor": scaling["short_factor"], "long_factor": scaling["long_factor"]}
        values["rope_scaling"] = {"type": "longrope", **older}
    elif a.rope.kind != "default":
        values["rope_scaling"] = {key: value for key, value in scaling.items() if key != "rope_theta"}
    if family.partial_rotary is not None:
        values["partial_rotary_factor"] = a.rope.fraction
    if _ROTARY_DIM in family.keys:
        values[_ROTARY_DIM] = a.rope.turning(a.head_dim)
    if _BETA in scaling:
        values["llama_4_scaling"] = scaling_for_vllm(a.rope, a.rope.query_beta)
    return values


def _rope_set(rope: Rope, family: HfFamily) -> dict[str, Any]:
    values: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind not in ("default", "longrope"):
        values["factor"] = rope.factor
    if rope.kind in ("llama3", "yarn", "longrope"):
        values["original_max_position_embeddings"] = rope.original_length
    if rope.kind == "longrope":
        values |= {"short_factor": list(rope.short_factors), "long_factor": list(rope.long_factors)}
    if rope.kind == "llama3":
        values |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "yarn":
        values |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        if not family.has_latent:
            values |= {"attention_factor": rope.attention_factor, "truncate": rope.truncate}
        elif rope.mscale:
            values |= {"mscale": rope.mscale, "mscale_all_dim": rope.mscale_all_dim}
    if family.partial_rotary is not None:
        values["partial_rotary_factor"] = rope.fraction
    if _BETA in (family.rope or {}):
        values[_BETA] = rope.query_beta
    return values
