"""What travels beside weights: which files, the chat template that wins, the dtype in config.json."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron_sftrl.models.hf_output import (
    HfAssets,
    end_ids,
    read_assets,
    with_dtype,
    with_end_ids,
    with_keys,
    write_assets,
)
from megatron_sftrl.models.tokenizer_files import has_tokenizer
from tests.unit.data.tokenizers_for_tests import SENTENCEPIECE_MODEL, template_path, write_byte_level

CONFIG = """{
  "model_type": "llama",
  "rms_norm_eps": 1e-05, "rope_theta":10000.0,
  "torch_dtype": "float32"
}
"""


def model_directory(directory: Path) -> Path:
    """A model directory with everything, also with what must stay behind."""
    write_byte_level(directory, template="chatml")
    for name, content in {
        "config.json": CONFIG,
        "generation_config.json": '{"eos_token_id": 2}',
        "special_tokens_map.json": "{}",
        "chat_template.json": '{"chat_template": "old"}',
        "modeling_evil.py": "raise SystemExit",
        "tokenization_evil.py": "raise SystemExit",
        "model.safetensors": "weights",
        "pytorch_model.bin": "weights",
        "training_args.bin": "pickle",
        "README.md": "the model's card",
        "additional_chat_templates/rag.jinja": "rag",
        "additional_chat_templates/evil.py": "raise SystemExit",
    }.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(content)
    return directory


def test_configuration_tokenizer_and_templates_travel_and_nothing_else(tmp_path: Path) -> None:
    model = model_directory(tmp_path / "model")
    assets = read_assets(model=model, tokenizer=model, chat_template=None)
    assert set(assets.files) == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.json",
        "additional_chat_templates/rag.jinja",
    }
    write_assets(tmp_path, assets)
    for name in assets.files:
        assert (tmp_path / name).read_bytes() == (model / name).read_bytes()


def test_the_tokenizer_may_come_from_another_place_than_the_model(tmp_path: Path) -> None:
    model = model_directory(tmp_path / "model")
    tokenizer = write_byte_level(tmp_path / "tokenizer", adds_bos=True)
    files = read_assets(model=model, tokenizer=tokenizer, chat_template=None).files
    assert set(files) == {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert files["tokenizer.json"] == (tokenizer / "tokenizer.json").read_bytes()
    assert set(read_assets(model=None, tokenizer=tokenizer, chat_template=None).files) == {
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_a_sentencepiece_file_is_named_as_transformers_looks_for_it() -> None:
    files = read_assets(model=None, tokenizer=SENTENCEPIECE_MODEL, chat_template=template_path("inst")).files
    assert files == {
        "tokenizer.model": SENTENCEPIECE_MODEL.read_bytes(),
        "chat_template.jinja": template_path("inst").read_bytes(),
    }


def test_a_sentencepiece_model_by_another_name_and_a_tekken_file_travel_under_their_usual_names(
    tmp_path: Path,
) -> None:
    shutil.copy(SENTENCEPIECE_MODEL, tmp_path / "tokenizer.model.v3")
    assert has_tokenizer(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.model.v3"):
        files = read_assets(model=None, tokenizer=path, chat_template=None).files
        assert files == {"tokenizer.model": SENTENCEPIECE_MODEL.read_bytes()}
    (tmp_path / "tekken_240911.json").write_text("{}")
    path = tmp_path / "tekken_240911.json"
    assert read_assets(model=None, tokenizer=path, chat_template=None).files == {"tekken.json": b"{}"}


def test_a_template_file_replaces_every_other_template(tmp_path: Path) -> None:
    model = model_directory(tmp_path / "model")
    (model / "chat_template.jinja").write_text("another one")
    files = read_assets(model=model, tokenizer=model, chat_template=template_path("llama3")).files
    assert files["chat_template.jinja"] == template_path("llama3").read_bytes()
    before = json.loads((model / "tokenizer_config.json").read_text())
    del before["chat_template"]
    assert json.loads(files["tokenizer_config.json"]) == before
    assert not {"chat_template.json", "additional_chat_templates/rag.jinja"} & set(files)


@pytest.mark.parametrize(
    ("config", "dtype", "changed"),
    [
        (CONFIG, torch.bfloat16, CONFIG.replace("float32", "bfloat16")),
        (CONFIG, torch.float32, CONFIG),
        ('{"dtype": null, "x":  1}', torch.float16, '{"dtype": "float16", "x":  1}'),
        (
            '{"dtype":"float32", "torch_dtype" : "float32"}',
            torch.bfloat16,
            '{"dtype":"bfloat16", "torch_dtype" : "bfloat16"}',
        ),
    ],
    ids=["older key", "same", "null", "both keys"],
)
def test_only_the_dtype_of_the_config_changes(config: str, dtype: torch.dtype, changed: str) -> None:
    assets = HfAssets(files={"config.json": config.encode(), "tokenizer.json": b"{}"})
    assert with_dtype(assets, dtype).files == {"config.json": changed.encode(), "tokenizer.json": b"{}"}
    assert assets.files["config.json"] == config.encode()


def test_a_key_that_is_there_already_is_left_as_it_is() -> None:
    assets = HfAssets(files={"config.json": b'{"x":  1}', "tokenizer.json": b"{}"})
    assert with_keys(assets, {"x": 2}) == with_keys(assets, {}) == assets
    changed = with_keys(assets, {"x": 2, "y": {"z": 3}}).files
    assert json.loads(changed["config.json"]) == {"x": 1, "y": {"z": 3}}
    assert changed["tokenizer.json"] == b"{}"


@pytest.mark.parametrize(
    "config",
    [{"a": 1e-6}, {"dtype": "float32", "quantization": {"dtype": "int4"}}, {"nested": {"dtype": "x"}}],
)
def test_a_config_without_the_key_or_with_nested_ones_gets_the_right_one(config: dict[str, object]) -> None:
    assets = HfAssets(files={"config.json": json.dumps(config).encode()})
    changed = json.loads(with_dtype(assets, torch.bfloat16).files["config.json"])
    assert changed == config | {"dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "absent"}, "no such directory"),
        ({"model": "empty"}, r"no config\.json in"),
        ({"tokenizer": "absent"}, "does not exist; give a Hugging Face tokenizer directory"),
        ({"tokenizer": "empty"}, r"no tokenizer in .*expected tokenizer\.json"),
        ({"tokenizer": "tokenizer.json"}, r"expected a directory, a SentencePiece model by any name, or"),
        ({"chat_template": "absent.jinja"}, r"cannot read .*absent\.jinja: No such file"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path: Path, arguments: dict[str, str], message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "tokenizer.json").write_text("{}")
    paths = {"model": None, "tokenizer": None, "chat_template": None}
    with pytest.raises(ValueError, match=message):
        read_assets(**(paths | {name: tmp_path / value for name, value in arguments.items()}))


def model_files(config: object, generation: object = None) -> HfAssets:
    files = {"config.json": config} | ({} if generation is None else {"generation_config.json": generation})
    return HfAssets(files={name: json.dumps(values).encode() for name, values in files.items()})


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [
        ({"eos_token_id": 2}, None, (2,)),
        ({"eos_token_id": [3, 2]}, None, (3, 2)),
        ({}, None, ()),
        ({"eos_token_id": 2}, {"eos_token_id": [7, 5]}, (7, 5)),
        # transformers and vLLM read no config.json then.
        ({"eos_token_id": 2}, {"top_p": 0.9}, ()),
        ({"eos_token_id": 2}, {"eos_token_id": None}, ()),
    ],
)
def test_ends_are_those_that_transformers_reads(
    config: dict, generation: dict | None, ends: tuple[int, ...]
) -> None:
    assert end_ids(model_files(config, generation)) == ends


@pytest.mark.parametrize("value", ["2", [2, None], {"a": 1}, 2.0, True])
def test_an_end_that_is_no_id_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id: expected an id or a list"):
        end_ids(model_files({}, {"eos_token_id": value}))


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"a": 1.5, "eos_token_id": 2}, {"top_p": 0.9, "eos_token_id": 2}, {"top_p": 0.9}),
        ({"a": 1.5, "eos_token_id": [2]}, None, {}),
        ({"bos_token_id": 1, "eos_token_id": 2}, None, {"bos_token_id": 1}),
    ],
)
def test_missing_ends_are_put_in_front_in_both_files(
    config: dict, generation: dict | None, expected: dict
) -> None:
    files = with_end_ids(model_files(config, generation), {2, 9, 4}).files
    assert json.loads(files["generation_config.json"]) == expected | {"eos_token_id": [4, 9, 2]}
    assert json.loads(files["config.json"]) == config | {"eos_token_id": [4, 9, 2]}


def test_files_that_end_at_everything_stay_as_they_are() -> None:
    assets = model_files({"eos_token_id": 2}, {"eos_token_id": [4, 2]})
    assert with_end_ids(assets, {4}) is assets
