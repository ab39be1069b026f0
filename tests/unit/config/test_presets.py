"""Presets fill in what a run leaves open, and are what the papers say."""

from __future__ import annotations

import copy

import pytest

from megatron_sftrl import build_loss
from megatron_sftrl.config.presets import PRESETS, with_preset

SMALL = {
    "p": {"loss": {"name": "grpo", "clip_high": 0.28}, "optim": {"lr": 1e-6}, "rollout": {"group_size": 16}}
}


def test_a_key_of_the_run_wins_and_a_key_it_leaves_open_comes_from_the_preset():
    raw = {
        "preset": "p",
        "run_dir": "x",
        "loss": {"clip_high": 0.3, "clip_low": 0.1},
        "optim": {"name": "sgd"},
    }
    before = copy.deepcopy(raw)
    found = with_preset(raw, SMALL)
    assert found == {
        "run_dir": "x",
        "loss": {"name": "grpo", "clip_high": 0.3, "clip_low": 0.1},
        "optim": {"lr": 1e-6, "name": "sgd"},
        "rollout": {"group_size": 16},
    }
    assert raw == before
    assert with_preset(found, SMALL) == found  # it is no longer a preset but settings
    assert with_preset({**found, "preset": "p"}, SMALL) == found


@pytest.mark.parametrize("value", [0, 0.0, False, None, []])
def test_a_value_that_counts_as_false_is_a_value(value: object):
    raw = {"preset": "p", "optim": {"lr": value}}
    assert with_preset(raw, SMALL)["optim"]["lr"] == value


def test_a_section_with_nothing_below_it_is_filled_from_the_preset():
    assert with_preset({"preset": "p", "optim": None}, SMALL)["optim"] == {"lr": 1e-6}


def test_a_section_that_is_no_section_is_left_for_validation_to_refuse():
    assert with_preset({"preset": "p", "optim": 7}, SMALL)["optim"] == 7


def test_a_run_without_a_preset_is_only_copied():
    raw = {"loss": {"name": "sft"}, "data": {"train": ["a"]}}
    found = with_preset(raw, SMALL)
    assert found == raw
    found["loss"]["name"] = "gift"
    assert raw["loss"]["name"] == "sft"


def test_the_presets_themselves_cannot_be_changed_through_what_comes_out():
    with_preset({"preset": "dapo"}, PRESETS)["loss"]["clip_high"] = 9
    assert PRESETS["dapo"]["loss"]["clip_high"] == 0.28
    with pytest.raises(TypeError):
        PRESETS["dapo"]["loss"]["clip_high"] = 9  # type: ignore[index]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            {"preset": "dappo"},
            r"unknown preset 'dappo' \(did you mean 'dapo'\?\); there are: curiosft_rl, dapo, d",
        ),
        ({"preset": 3}, "unknown preset 3; there are"),
        (
            {"preset": "dapo", "loss": {"name": "sft"}},
            "preset 'dapo' sets options of loss 'grpo', and loss.name",
        ),
    ],
)
def test_a_preset_that_is_unknown_or_for_another_loss_is_refused(raw: dict, message: str):
    with pytest.raises(ValueError, match=message):
        with_preset(raw, PRESETS)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_the_loss_accepts_the_options_of_every_preset(name: str):
    loss = dict(with_preset({"preset": name}, PRESETS)["loss"])
    built = build_loss(loss.pop("name"), loss)
    assert ("reference" in built.needs) == (name == "deepseekmath")


@pytest.mark.parametrize(
    ("name", "group_size", "lr", "kl", "clip"),
    [
        ("luffy", 8, 1e-6, 0, (0.2, 0.2)),
        ("srft", 8, 1e-6, 0, (0.2, 0.2)),
        ("dapo", 16, 1e-6, 0, (0.2, 0.28)),
        ("curiosft_rl", 8, 1e-6, 0, (0.2, 0.2)),
        ("deepseekmath", 64, 1e-6, 0.04, (0.2, 0.2)),
        ("dr_grpo", 8, 1e-6, 0, (0.2, 0.2)),
        ("gspo", None, None, 0, (3e-4, 4e-4)),
    ],
)
def test_presets_hold_the_published_numbers(
    name: str, group_size: int | None, lr: float | None, kl: float, clip: tuple[float, float]
):
    preset = PRESETS[name]
    assert preset["rollout"].get("group_size") == group_size
    assert preset["rollout"]["temperature"] == 1.0
    assert preset.get("optim", {}).get("lr") == lr
    assert preset["loss"]["kl_coefficient"] == kl
    assert (preset["loss"]["clip_low"], preset["loss"]["clip_high"]) == clip


def test_only_curiosft_rl_has_a_published_batch_and_it_counts_responses():
    """METHODS.md, section 4: batch 128, mini-batch 32, n = 8; both are prompts, as in verl."""
    batches = {
        name: (preset["rollout"].get("prompts_per_step"), preset.get("batch", {}).get("global_size"))
        for name, preset in PRESETS.items()
    }
    assert batches == {name: (None, None) for name in PRESETS} | {"curiosft_rl": (128, 256)}


def test_a_batch_of_the_run_wins_over_the_presets():
    raw = {"preset": "curiosft_rl", "rollout": {"prompts_per_step": 64}, "batch": {"global_size": 512}}
    found = with_preset(raw, PRESETS)
    assert found["rollout"] == {"group_size": 8, "temperature": 1.0, "prompts_per_step": 64}
    assert found["batch"] == {"global_size": 512}
