"""Published settings of GRPO by name: `preset: dapo` fills in what the run's file leaves open.

Only what a paper states is here; everything else keeps its own default. Learning rates belong to AdamW.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from megatron_sftrl.errors import UserError

Tree = Mapping[str, Any]
"""A part of a run's file: keys to values, or to further trees."""


def with_preset(raw: Tree, presets: Mapping[str, Tree]) -> dict[str, Any]:
    """The run's tree with its preset's settings below it, and without the key `preset`.

    A key that the run gives wins over the preset's, whatever its value; a key that it does not give, the
    preset's sections included, comes from the preset. What comes out has every setting once, in its own
    place, and expanding it again changes nothing.

    Args:
        raw: as parsed, with overrides applied and before validation; not modified.
        presets: by name.
    Returns:
        A new tree; `raw` itself, copied, where it names no preset.
    Raises:
        UserError: an unknown preset, or one for another loss than the run asks for.
    """
    name = raw.get("preset")
    rest = {key: value for key, value in raw.items() if key != "preset"}
    if name is None:
        return _below({}, rest)
    if not isinstance(name, str) or name not in presets:
        near = difflib.get_close_matches(str(name), list(presets), n=1, cutoff=0.4)
        meant = f" (did you mean {near[0]!r}?)" if near else ""
        raise UserError(f"unknown preset {name!r}{meant}; there are: {', '.join(sorted(presets))}")
    wanted, offered = _loss_name(raw), _loss_name(presets[name])
    if wanted is not None and offered is not None and wanted != offered:
        raise UserError(
            f"preset {name!r} sets options of loss {offered!r}, and loss.name is {wanted!r}: remove one of "
            "preset and loss.name"
        )
    return _below(presets[name], rest)


def _below(defaults: Tree, given: Tree) -> dict[str, Any]:
    """Both trees in one new tree; where both hold a value, the given one."""
    merged: dict[str, Any] = {}
    for key in (*defaults, *(key for key in given if key not in defaults)):
        low, high = defaults.get(key), given.get(key)
        if isinstance(high, Mapping):
            merged[key] = _below(low if isinstance(low, Mapping) else {}, high)
        elif isinstance(low, Mapping) and high is None:
            merged[key] = _below(low, {})  # `loss:` with nothing below it is a section without keys
        else:
            merged[key] = given.get(key, low)
    return merged


def _loss_name(tree: Tree) -> object:
    loss = tree.get("loss")
    return loss.get("name") if isinstance(loss, Mapping) else None


def _frozen(presets: Mapping[str, Mapping[str, Tree]]) -> Mapping[str, Tree]:
    """The same data, read-only down to the settings."""
    return MappingProxyType(
        {
            name: MappingProxyType(
                {section: MappingProxyType(dict(tree)) for section, tree in preset.items()}
            )
            for name, preset in presets.items()
        }
    )


_PLAIN: Tree = {"name": "grpo", "kl_coefficient": 0.0, "clip_low": 0.2, "clip_high": 0.2}
_GROUP_OF_8: Mapping[str, Tree] = {
    "rollout": {"group_size": 8, "temperature": 1.0},
    "advantages": {"estimator": "group_normalized"},
    "loss": _PLAIN,
    "optim": {"lr": 1e-6},
}

PRESETS: Mapping[str, Tree] = _frozen(
    {
        # arXiv:2504.14945 and 2506.19767: their on-policy part.
        "luffy": _GROUP_OF_8,
        "srft": _GROUP_OF_8,
        # arXiv:2602.02244: the stage after CurioSFT; 128 prompts in mini-batches of 32, 8 responses each.
        "curiosft_rl": {
            **_GROUP_OF_8,
            "rollout": {**_GROUP_OF_8["rollout"], "prompts_per_step": 128},
            "batch": {"global_size": 32 * 8},
        },
        # arXiv:2503.14476: clip-higher, token mean, dynamic sampling. Its soft overlong punishment is the
        # reward `length`, which needs the run's lengths.
        "dapo": {
            "rollout": {"group_size": 16, "temperature": 1.0},
            "advantages": {"estimator": "group_normalized"},
            "filters": {"dynamic_sampling": True},
            "loss": {**_PLAIN, "clip_high": 0.28},
            "batch": {"aggregation": "token_mean"},
            "optim": {"lr": 1e-6},
        },
        # arXiv:2402.03300: mean over each response, KL in the loss; the run adds `reference: {kind: frozen}`.
        "deepseekmath": {
            "rollout": {"group_size": 64, "temperature": 1.0},
            "advantages": {"estimator": "group_normalized"},
            "loss": {**_PLAIN, "kl_coefficient": 0.04},
            "batch": {"aggregation": "sequence_mean"},
            "optim": {"lr": 1e-6},
        },
        # arXiv:2503.20783: no division by the group's std, nor by the response's length.
        "dr_grpo": {
            **_GROUP_OF_8,
            "advantages": {"estimator": "dr_grpo"},
            "batch": {"aggregation": "constant_length"},
        },
        # arXiv:2507.18071, section 5.1: group size and learning rate are not stated there.
        "gspo": {
            "rollout": {"temperature": 1.0},
            "advantages": {"estimator": "group_normalized"},
            "loss": {**_PLAIN, "ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
            "batch": {"aggregation": "sequence_mean"},
        },
    }
)
"""Presets by name."""
