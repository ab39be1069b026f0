"""Presets fill in what a run leaves open, and are what the papers say."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest

from megatron_sftrl import build_loss
from megatron_sftrl.config import load
from megatron_sftrl.config.data import MuSection
from megatron_sftrl.config.load import PRESETS, config_from_text, load_config, resolved_yaml, with_preset
from megatron_sftrl.config.schema import GrpoConfig

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
            r"unknown preset 'dappo' \(did you mean 'dapo'\?\); there are: chord, curiosft_rl, dapo, d",
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
        ("luffy", 8, 1e-6, 0, (1.0, None)),
        ("chord", 8, None, 0, (0.2, 0.2)),
        ("srft", 8, 1e-6, 0, (0.2, 0.2)),
        ("dapo", 16, 1e-6, 0, (0.2, 0.28)),
        ("curiosft_rl", 8, 1e-6, 0, (0.2, 0.2)),
        ("deepseekmath", 64, 1e-6, 0.04, (0.2, 0.2)),
        ("dr_grpo", 8, 1e-6, 0, (0.2, 0.2)),
        ("gspo", None, None, 0, (3e-4, 4e-4)),
    ],
)
def test_presets_hold_the_published_numbers(
    name: str, group_size: int | None, lr: float | None, kl: float, clip: tuple[float, float | None]
):
    preset = PRESETS[name]
    assert preset["rollout"].get("group_size") == group_size
    assert preset["rollout"]["temperature"] == 1.0
    assert preset.get("optim", {}).get("lr") == lr
    assert preset["loss"]["kl_coefficient"] == kl
    assert (preset["loss"]["clip_low"], preset["loss"]["clip_high"]) == clip


@pytest.mark.parametrize(
    ("name", "prompts", "responses_per_update", "estimator", "aggregation"),
    [
        ("luffy", 128, 64 * 8, "dr_grpo", "constant_length"),
        ("chord", None, None, "group_normalized", "token_mean"),
        ("srft", None, None, "group_normalized", None),
        ("dapo", 512, 512, "group_normalized", "token_mean"),
        ("curiosft_rl", 128, 32 * 8, "group_normalized", "constant_length"),
        ("deepseekmath", 16, 16 * 64, "group_normalized", "sequence_mean"),
        ("dr_grpo", 128, 128, "dr_grpo", "constant_length"),
        ("gspo", None, None, "group_normalized", "sequence_mean"),
    ],
)
def test_presets_hold_the_published_batches_and_normalisations(
    name: str, prompts: int | None, responses_per_update: int | None, estimator: str, aggregation: str | None
):
    """A mini-batch is given in prompts in verl's scripts, in responses in DAPO's paper and in oat."""
    preset = PRESETS[name]
    batch = preset.get("batch", {})
    assert (preset["rollout"].get("prompts_per_step"), batch.get("global_size")) == (
        prompts,
        responses_per_update,
    )
    assert (preset["advantages"]["estimator"], batch.get("aggregation")) == (estimator, aggregation)


def test_luffy_and_chord_alone_mix_demonstrations_in_as_published():
    shown = {name: preset["rollout"].get("demonstrations", 0) for name, preset in PRESETS.items()}
    assert shown == {name: 0 for name in PRESETS} | {"luffy": 1}
    assert build_loss("grpo").config.model_dump()["shaping"] == 0.1
    assert [name for name, preset in PRESETS.items() if "sft" in preset] == ["chord"]
    mu = MuSection.model_validate(dict(PRESETS["chord"]["sft"]["mu"]))
    assert [mu.at(step) for step in (0, 100, 200, 999)] == pytest.approx([0.9, 0.475, 0.05, 0.05])


def test_only_luffy_has_an_entropy_bonus_and_only_dapo_a_warm_up_and_dynamic_sampling():
    entropy = {name: preset["loss"].get("entropy_coefficient", 0) for name, preset in PRESETS.items()}
    assert entropy == {name: 0 for name in PRESETS} | {"luffy": 0.01}
    warmup = {name: preset.get("optim", {}).get("warmup_steps", 0) for name, preset in PRESETS.items()}
    assert warmup == {name: 0 for name in PRESETS} | {"dapo": 20}
    assert [name for name, preset in PRESETS.items() if "filters" in preset] == ["dapo"]


def test_a_batch_of_the_run_wins_over_the_presets():
    raw = {"preset": "curiosft_rl", "rollout": {"prompts_per_step": 64}, "batch": {"global_size": 512}}
    found = with_preset(raw, PRESETS)
    assert found["rollout"] == {"group_size": 8, "temperature": 1.0, "prompts_per_step": 64}
    assert found["batch"] == {"global_size": 512, "aggregation": "constant_length"}


def test_the_upper_clip_of_a_preset_is_taken_back_by_a_number_or_a_null_of_the_run():
    assert with_preset({"preset": "luffy", "loss": {"clip_high": 0.2}}, PRESETS)["loss"]["clip_high"] == 0.2
    assert with_preset({"preset": "dapo", "loss": {"clip_high": None}}, PRESETS)["loss"]["clip_high"] is None


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_run_with_a_preset_is_written_out_and_read_back_the_same(name: str):
    file = Path(__file__).resolve().parents[3] / "examples" / "grpo.yaml"
    shown = ["sft.data={train: [demos.jsonl], max_length: 64}", "sft.global_size=8"]
    more = shown if "sft" in PRESETS[name] else []
    config = load_config(file, [f"preset={name}", "optim.lr=1e-6", *more], schema=GrpoConfig)
    assert config.loss.options["clip_high"] == PRESETS[name]["loss"]["clip_high"]
    text = resolved_yaml(config)
    assert resolved_yaml(config_from_text(text, source="resolved.yaml", schema=GrpoConfig)) == text


def test_a_preset_is_read_when_it_is_named_and_the_list_reads_none(monkeypatch: pytest.MonkeyPatch):
    read: list[str] = []
    text_of = load.read_config_text
    monkeypatch.setattr(load, "read_config_text", lambda file: read.append(file.name) or text_of(file))
    assert len(PRESETS) == len(list(PRESETS)) >= 7
    assert "../presets/dapo" not in PRESETS
    assert read == []
    with_preset({"preset": "gspo"}, PRESETS)
    assert set(read) == {"gspo.yaml"}


def test_every_preset_says_its_source_and_the_key_names_them_all():
    for name in PRESETS:
        file = Path(load.__file__).with_name("presets") / f"{name}.yaml"
        assert re.match(r"# .*arXiv:\d{4}\.\d{5}", file.read_text(encoding="utf-8")), name
    explained = GrpoConfig.model_fields["preset"].description or ""
    assert set(re.findall(r"[a-z_]+", explained.partition(":")[2])) == set(PRESETS)
