"""A model with longrope is trained and run up to its original length: longer runs are refused by name."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_sftrl.config.schema import GrpoConfig, TrainingConfig
from megatron_sftrl.errors import UserError
from megatron_sftrl.models import architecture_of
from megatron_sftrl.models.architecture import Architecture, from_record, to_record
from megatron_sftrl.models.hf_config import hf_config_values
from megatron_sftrl.models.rope import Rope
from megatron_sftrl.rollout import vllm_settings
from megatron_sftrl.rollout.vllm_settings import VllmSettings
from megatron_sftrl.trainers.checked import check_original_length
from tests.unit.config.example import example
from tests.unit.rollout.test_build import config_of


def longrope(config: TrainingConfig, original_length: int) -> Architecture:
    """The configuration's sizes, eight times as many positions as the original length."""
    plain = architecture_of(config.model)
    half = plain.head_dim // 2
    rope = Rope(
        kind="longrope",
        theta=1e4,
        factor=8.0,
        original_length=original_length,
        short_factors=(1.0, *(1.5 for _ in range(half - 1))),
        long_factors=tuple(2.0 + number for number in range(half)),
    )
    return replace(plain, family="phi3", rope=rope, max_position_embeddings=original_length)


def refusal(config: TrainingConfig, original_length: int) -> str:
    with pytest.raises(UserError) as caught:
        check_original_length(config, longrope(config, original_length))
    return str(caught.value)


def test_sequences_beyond_the_original_length_are_refused_with_the_keys_that_make_them() -> None:
    sft, grpo = example(), config_of({})
    check_original_length(sft, longrope(sft, 128))
    check_original_length(grpo, longrope(grpo, 64))
    check_original_length(sft, architecture_of(sft.model))
    end = "is only trained and run with sequences of up to its original_max_position_embeddings ="
    assert refusal(sft, 127).startswith("data.max_length = 128: a model with rope_type longrope")
    assert f"{end} 127 tokens" in refusal(sft, 127)
    assert refusal(grpo, 63).startswith("data.max_prompt_length + rollout.max_new_tokens = 64: a model")


def test_demonstrations_beyond_it_are_refused() -> None:
    values = config_of({}).model_dump(mode="json", exclude_unset=True)
    data = {"train": ["unused"], "max_length": 65}
    term = {"data": data, "global_size": 1, "mu": {"peak": 0.5, "valley": 0.5}}
    config = GrpoConfig.model_validate({**values, "sft": term})
    assert refusal(config, 64).startswith("sft.data.max_length = 65: a model with rope_type longrope")


def test_an_engine_of_vllm_takes_the_short_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does where max_model_len is at most the original length that its config.json has."""
    monkeypatch.setattr(vllm_settings, "check_version", lambda: None)
    architecture = longrope(example(), 64)
    values = vllm_settings.vllm_config(architecture, dtype=None)  # type: ignore[arg-type]
    assert values["rope_parameters"]["original_max_position_embeddings"] == 64
    assert values["max_position_embeddings"] == 8 * 64
    vllm_settings.check_vllm(VllmSettings(tp=1, max_model_len=64), architecture, world_size=1)
    with pytest.raises(UserError, match="max_model_len = 65 passes the model's 64 positions"):
        vllm_settings.check_vllm(VllmSettings(tp=1, max_model_len=65), architecture, world_size=1)


def test_a_checkpoint_s_record_keeps_both_lists_with_every_bit() -> None:
    architecture = longrope(example(), 64)
    again = from_record(to_record(architecture))
    assert again == architecture
    assert hash(again.rope) == hash(architecture.rope)
    values = hf_config_values(again, dtype=None)["rope_parameters"]
    assert tuple(values["short_factor"]) == architecture.rope.short_factors
    assert tuple(values["long_factor"]) == architecture.rope.long_factors
