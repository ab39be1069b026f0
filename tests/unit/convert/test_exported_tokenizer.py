"""A program that loads an export by its tokenizer's class gets the ids that were trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from transformers import AutoTokenizer

from megatron_sftrl.apps.convert.to_hf import with_ids_of_tokenizer_json
from megatron_sftrl.data.tokenizer_backends import PROBES
from megatron_sftrl.models.hf_output import HfAssets, read_assets, write_assets
from tests.unit.data.tokenizers_for_tests import write_byte_level


def assets_of(directory: Path, *, model_type: str, **config: object) -> HfAssets:
    """Files of an export: a byte-level tokenizer that writes lower case, its configuration replaced."""
    write_byte_level(directory)
    rules = json.loads((directory / "tokenizer.json").read_text())
    rules["normalizer"] = {"type": "Lowercase"}
    (directory / "tokenizer.json").write_text(json.dumps(rules))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    return read_assets(model=directory, tokenizer=directory, chat_template=None)


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_the_export_of_a_class_that_rebuilds_the_tokenizer_names_the_generic_one(
    model_type, tmp_path, capsys
) -> None:
    assets = assets_of(tmp_path / "a", model_type=model_type, tokenizer_class="LlamaTokenizerFast")
    own = tokenizers.Tokenizer.from_file(str(tmp_path / "a/tokenizer.json"))
    rebuilt = AutoTokenizer.from_pretrained(str(tmp_path / "a"))
    assert rebuilt.encode("jq zx", add_special_tokens=False) != own.encode("jq zx").ids
    changed = with_ids_of_tokenizer_json(assets)
    assert "tokenizer_class LlamaTokenizerFast is now PreTrainedTokenizerFast" in capsys.readouterr().err
    (tmp_path / "b").mkdir()
    write_assets(tmp_path / "b", changed)
    exported = AutoTokenizer.from_pretrained(str(tmp_path / "b"))
    for text in PROBES.values():
        assert exported.encode(text, add_special_tokens=False) == own.encode(text).ids
    # Named by the class alone, before.
    assert (exported.bos_token, exported.eos_token) == ("<s>", "</s>")
    assert {name for name in assets.files if assets.files[name] != changed.files[name]} == {
        "tokenizer_config.json"
    }


def test_a_model_type_that_brings_its_own_class_is_said(tmp_path, capsys) -> None:
    assets = assets_of(
        tmp_path, model_type="qwen2", tokenizer_class="Qwen2Tokenizer", eos_token="</s>", bos_token=None
    )
    with_ids_of_tokenizer_json(assets)
    assert "because of the model_type in config.json" in capsys.readouterr().err


def test_an_export_that_loads_as_it_was_trained_stays_as_it_is(tmp_path, capsys) -> None:
    assets = assets_of(
        tmp_path, model_type="llama", tokenizer_class="PreTrainedTokenizerFast", eos_token="</s>"
    )
    assert with_ids_of_tokenizer_json(assets) is assets
    without = HfAssets(files={"config.json": b"{}"})
    assert with_ids_of_tokenizer_json(without) is without
    assert capsys.readouterr().err == ""
