"""Where a run's responses end, and that its checkpoints tell an export so."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_sftrl.config.schema import GrpoConfig, RunConfig, TokenizerSection
from megatron_sftrl.data.tokenizer import Tokenizer, load_tokenizer
from megatron_sftrl.trainers.checked import CheckedRun, export_assets, response_text, stop_ids
from megatron_sftrl.types import SamplingParams
from tests.unit.data.tokenizers_for_tests import write_byte_level

V = 400


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base model: texts end with </s>, which its files know; its chat template ends turns otherwise."""
    directory = write_byte_level(tmp_path / "base", template="chatml")
    eos = load_tokenizer(TokenizerSection(path=directory)).eos_id
    (directory / "config.json").write_text(json.dumps({"eos_token_id": eos, "model_type": "qwen2"}))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [eos, 390], "top_p": 0.9}))
    return directory


def config_of(base: Path, **changes: Any) -> RunConfig | GrpoConfig:
    values: dict[str, Any] = {
        "run_dir": "run",
        "model": {"hf": str(base)},
        "tokenizer": {"path": str(base)},
        "data": {"train": ["x.jsonl"], "max_length": 8},
        "batch": {"global_size": 1},
        "loss": {"name": "sft"},
        "optim": {"lr": 1e-3},
        "train": {"steps": 1},
    }
    if "rollout" in changes:
        values |= {"data": {"train": ["x.jsonl"], "max_prompt_length": 8}, "rewards": [{"name": "math"}]}
        changes["rollout"] = {"prompts_per_step": 1, "max_new_tokens": 4, **changes["rollout"]}
        return GrpoConfig.model_validate(values | changes)
    return RunConfig.model_validate(values | changes)


def ids(tokenizer: Tokenizer, *texts: str) -> set[int]:
    return {each for text in texts for each in tokenizer.encode(text)}


def checkpoint_that_ends_at(directory: Path, end: int) -> Path:
    step = directory / "checkpoints" / "step-00000004"
    (step / "hf").mkdir(parents=True)
    (step / "hf" / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    return directory


def test_a_response_ends_at_every_end_of_tokenizer_template_model_checkpoints_and_settings(
    base: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(TokenizerSection(path=base))
    trained = ids(tokenizer, "</s>", "<|im_end|>")
    assert stop_ids(config_of(base), tokenizer, vocab_size=V) == {*trained, 390}
    earlier, chosen = (checkpoint_that_ends_at(tmp_path / str(end), end) for end in (391, 392))
    model = {"hf_config": str(base), "init_checkpoint": str(earlier)}
    own = tmp_path / "run"
    grpo = config_of(base, rollout={"stop_ids": [7]}, model=model, run_dir=str(own))
    assert stop_ids(grpo, tokenizer, vocab_size=V) == {*trained, 390, 391, 7}
    assert stop_ids(grpo, tokenizer, vocab_size=V, checkpoint=chosen) == {*trained, 390, 391, 392, 7}
    # A run that goes on may have lost what it started from.
    checkpoint_that_ends_at(own, 393)
    earlier.rename(tmp_path / "moved")
    assert stop_ids(grpo, tokenizer, vocab_size=V) == {*trained, 390, 393, 7}


def test_a_stop_id_that_the_model_does_not_have_is_refused(base: Path) -> None:
    tokenizer = load_tokenizer(TokenizerSection(path=base))
    with pytest.raises(ValueError, match=r"rollout\.stop_ids: expected ids from 0 to 399, got \[-1, 400\]"):
        stop_ids(config_of(base, rollout={"stop_ids": [-1, 3, 400]}), tokenizer, vocab_size=V)


def test_an_export_ends_where_the_run_does_and_what_its_model_did_not_know_is_said(
    base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    config, tokenizer = config_of(base), load_tokenizer(TokenizerSection(path=base))
    (turn,) = ids(tokenizer, "<|im_end|>")
    nothing: Any = SimpleNamespace()
    checked = CheckedRun(
        config=config,
        architecture=nothing,
        loss=nothing,
        tokenizer=tokenizer,
        stop_ids=stop_ids(config, tokenizer, vocab_size=V),
    )
    files = export_assets(checked).files
    expected = {"eos_token_id": [turn, tokenizer.eos_id, 390], "top_p": 0.9}
    assert json.loads(files["generation_config.json"]) == expected
    (said,) = caplog.messages
    assert f"{turn} ('<|im_end|>'), too" in said


def test_the_text_of_a_response_stops_in_front_of_its_end(base: Path) -> None:
    tokenizer = load_tokenizer(TokenizerSection(path=base))
    tokens = tokenizer.encode("Hello there, how are you?</s>")
    sampling = SamplingParams(stop_ids=frozenset({tokenizer.eos_id}))
    assert response_text(tokenizer, tokens, sampling) == "Hello there, how are you?"
    sampling = SamplingParams(stop=("you", "there", "never"))
    assert response_text(tokenizer, tokens, sampling) == "Hello "
