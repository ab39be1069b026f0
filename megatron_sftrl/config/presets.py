"""Published settings of GRPO by name: `preset: dapo` fills in what the run's file leaves open.

Only what a paper or its released script states is here, with what of it cannot be expressed; everything else
keeps its own default. Learning rates belong to AdamW.
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
_NORMALIZED: Tree = {"estimator": "group_normalized"}

PRESETS: Mapping[str, Tree] = _frozen(
    {
        # LUFFY, arXiv:2504.14945; exp_scripts/train.sh of its repository. Its policy gradient only: the one
        # demonstration in each group, with its own importance weight, has no place here.
        "luffy": {
            # rollout.n=8, rollout.temperature=1.0, data.train_batch_size=128 prompts
            "rollout": {"group_size": 8, "temperature": 1.0, "prompts_per_step": 128},
            # algorithm.grpo_use_std=False
            "advantages": {"estimator": "dr_grpo"},
            # loss_remove_clip=True, use_kl_loss=False; entropy 0.01 as in the paper, the script says 0.001.
            # The script takes the mean entropy over tokens, here it is divided as the rest of the loss is.
            "loss": {
                "name": "grpo",
                "kl_coefficient": 0.0,
                "clip_low": 1.0,
                "clip_high": None,
                "entropy_coefficient": 0.01,
            },
            # ppo_mini_batch_size=64 prompts; loss_remove_token_mean=True
            "batch": {"global_size": 64 * 8, "aggregation": "constant_length"},
            # optim.lr=1e-6
            "optim": {"lr": 1e-6},
        },
        # SRFT, arXiv:2506.19767: groups of 8 at T = 1, lr 1e-6, no KL. Its on-policy part only, without the
        # terms on demonstrations and the entropy weights; batch sizes are left to the run.
        "srft": {
            "rollout": {"group_size": 8, "temperature": 1.0},
            "advantages": _NORMALIZED,
            "loss": _PLAIN,
            "optim": {"lr": 1e-6},
        },
        # The stage after CurioSFT, arXiv:2602.02244; scripts/2_rl.sh, with max_new_tokens 8192 and 12 epochs.
        # Its released loss is that of GRPO at ratio 1 only: away from it, a negative advantage has no ratio
        # (-A lp), and a positive one no gradient outside of the clip range.
        "curiosft_rl": {
            # rollout.n=8, rollout.temperature=1.0, data.train_batch_size=128 prompts
            "rollout": {"group_size": 8, "temperature": 1.0, "prompts_per_step": 128},
            "advantages": _NORMALIZED,
            # use_kl_loss=False, entropy_coeff=0.0; clip_ratio 0.2 is the default there
            "loss": _PLAIN,
            # ppo_mini_batch_size=32 prompts; core_algos.py divides each response by the padded length
            "batch": {"global_size": 32 * 8, "aggregation": "constant_length"},
            # optim.lr=1e-6
            "optim": {"lr": 1e-6},
        },
        # DAPO, arXiv:2503.14476, section 4.1. Its soft overlong punishment is the reward `length`, which
        # needs the run's lengths (16384 + 4096 there). verl's script for it differs: 10 steps of warm-up,
        # weight decay 0.1; others of verl's set dual_clip 10.
        "dapo": {
            # "512" prompts, "16 responses"
            "rollout": {"group_size": 16, "temperature": 1.0, "prompts_per_step": 512},
            "advantages": _NORMALIZED,
            "filters": {"dynamic_sampling": True},
            # clip-higher: 0.2 and 0.28; no KL
            "loss": {**_PLAIN, "clip_high": 0.28},
            # "mini-batch size 512": responses, 16 updates of 512 * 16; token mean
            "batch": {"global_size": 512, "aggregation": "token_mean"},
            # AdamW, "1e-6", linear warm-up over "20 rollout steps"
            "optim": {"lr": 1e-6, "warmup_steps": 20},
        },
        # DeepSeekMath, arXiv:2402.03300, section 4.2; the run adds `reference: {kind: frozen}`. Clip range
        # and temperature are not stated there (PPO's 0.2 and 1 here). A single update follows each
        # exploration, with a training batch of 1024, here 1024 responses.
        "deepseekmath": {
            "rollout": {"group_size": 64, "temperature": 1.0, "prompts_per_step": 16},
            "advantages": _NORMALIZED,
            "loss": {**_PLAIN, "kl_coefficient": 0.04},
            # equation 3: mean over each response
            "batch": {"global_size": 1024, "aggregation": "sequence_mean"},
            "optim": {"lr": 1e-6},
        },
        # Dr. GRPO, arXiv:2503.20783; examples/qwen2.5-math-7b.sh of understand-r1-zero.
        "dr_grpo": {
            # num_samples 8, temperature 1, rollout_batch_size 128 prompts
            "rollout": {"group_size": 8, "temperature": 1.0, "prompts_per_step": 128},
            # critic_type drgrpo: no division by the group's std, nor by the response's length
            "advantages": {"estimator": "dr_grpo"},
            # beta 0; 0.2 is PPO's usual clip range, which the script leaves at its default
            "loss": _PLAIN,
            # train_batch_size 128: responses
            "batch": {"global_size": 128, "aggregation": "constant_length"},
            # learning_rate 0.000001, lr_scheduler constant
            "optim": {"lr": 1e-6, "schedule": "constant"},
        },
        # GSPO, arXiv:2507.18071, section 5.1: clip ranges 3e-4 and 4e-4, four mini-batches for each rollout,
        # no KL in equation 5. Group size, batch sizes and learning rate are not stated there.
        "gspo": {
            "rollout": {"temperature": 1.0},
            "advantages": _NORMALIZED,
            "loss": {**_PLAIN, "ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
            "batch": {"aggregation": "sequence_mean"},
        },
    }
)
"""Presets by name."""
