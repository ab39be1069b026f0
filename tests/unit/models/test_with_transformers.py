"""transformers loads a directory of ours as if it had written it, and chooses the same weight files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
)

from megatron_sftrl.errors import UserError
from megatron_sftrl.models.hf_config import read_hf_config
from megatron_sftrl.models.hf_output import (
    new_directory,
    plan_files,
    read_assets,
    with_dtype,
    write_assets,
    write_file,
    write_index,
)
from megatron_sftrl.models.hf_weights import open_weights
from tests.hf_models import differing, read_tensors, write_model
from tests.unit.data.tokenizers_for_tests import template_path, write_byte_level

MESSAGES = [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Hello"}]


def save_tiny_model(directory: Path, *, seed: int = 0, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(directory)
    return model


def copy_model(source: Path, out: Path, *, tokenizer: Path, template: Path | None, max_bytes: int) -> None:
    """Through everything of ours that reads and writes."""
    with open_weights(source) as weights:
        tensors = {name: weights.read(name).bfloat16() for name in weights.shapes}
    sizes = [(name, tensor.nbytes) for name, tensor in tensors.items()]
    files = plan_files(sizes, max_bytes=max_bytes)
    with new_directory(out, num_bytes=sum(size for _, size in sizes)) as directory:
        for file in files:
            write_file(directory, file, tensors)
        write_index(directory, files, sizes)
        assets = read_assets(model=source, tokenizer=tokenizer, chat_template=template)
        write_assets(directory, with_dtype(assets, torch.bfloat16))


@pytest.mark.parametrize("max_bytes", [10**9, 3000], ids=["one file", "sharded"])
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_what_we_write(tmp_path: Path, max_bytes: int, tied: bool) -> None:
    model = save_tiny_model(tmp_path / "source", tied=tied)
    tokenizer = write_byte_level(tmp_path / "tokenizer", template="chatml")
    out = tmp_path / "out"
    copy_model(tmp_path / "source", out, tokenizer=tokenizer, template=None, max_bytes=max_bytes)
    loaded, report = AutoModelForCausalLM.from_pretrained(str(out), output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.dtype == torch.bfloat16
    expected = model.bfloat16().state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("template", [None, "inst"])
def test_the_tokenizer_that_we_write_renders_the_template_that_was_asked_for(
    tmp_path: Path, template: str | None
) -> None:
    save_tiny_model(tmp_path / "source")
    source = write_byte_level(tmp_path / "tokenizer", template="chatml")
    wanted = template_path(template or "chatml")
    out = tmp_path / "out"
    override = None if template is None else wanted
    copy_model(tmp_path / "source", out, tokenizer=source, template=override, max_bytes=10**9)
    before, after = AutoTokenizer.from_pretrained(str(source)), AutoTokenizer.from_pretrained(str(out))
    expected = before.apply_chat_template(MESSAGES, chat_template=wanted.read_text(), tokenize=False)
    assert after.apply_chat_template(MESSAGES, tokenize=False) == expected
    assert after("Hi there\n")["input_ids"] == before("Hi there\n")["input_ids"]


def test_the_named_templates_of_transformers_own_directories_travel(tmp_path: Path) -> None:
    source = tmp_path / "source"
    save_tiny_model(source)
    tokenizer = AutoTokenizer.from_pretrained(
        str(write_byte_level(tmp_path / "tokenizer", template="chatml"))
    )
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "with tools"}
    tokenizer.save_pretrained(source)
    out = tmp_path / "out"
    copy_model(source, out, tokenizer=source, template=None, max_bytes=10**9)
    assert AutoTokenizer.from_pretrained(str(out)).chat_template == tokenizer.chat_template


def test_a_single_file_wins_over_an_index_in_transformers_too(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, seed=1).save_pretrained(tmp_path, max_shard_size="5KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    with torch.no_grad():
        single = save_tiny_model(tmp_path / "single", seed=2)
    (tmp_path / "single" / "model.safetensors").rename(tmp_path / "model.safetensors")
    name = "model.embed_tokens.weight"
    loaded = AutoModelForCausalLM.from_pretrained(str(tmp_path)).state_dict()[name]
    with open_weights(tmp_path) as weights:
        assert torch.equal(weights.read(name), loaded)
    assert torch.equal(loaded, single.state_dict()[name])


@pytest.mark.parametrize("family", ["mixtral", "minimax_m2", "qwen3_moe", "qwen2_moe", "deepseek_v3"])
def test_experts_that_transformers_saved_as_stacks_are_those_that_it_saved_one_by_one(
    tmp_path: Path, family: str
) -> None:
    write_model(tmp_path / "published", family, max_shard_size="20KB")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "published")
    model.save_pretrained(tmp_path / "stacked", save_original_format=False, max_shard_size="20KB")
    stacks = read_tensors(tmp_path / "stacked")
    assert any(name.endswith("mlp.experts.gate_up_proj") for name in stacks)
    with open_weights(tmp_path / "stacked") as weights:
        assert not differing(
            read_tensors(tmp_path / "published"), {name: weights.read(name) for name in weights.shapes}
        )
    # transformers reads both, too.
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "stacked")
    assert not differing(dict(model.named_parameters()), dict(again.named_parameters()))


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_mistral_3_that_transformers_saved_is_tied_where_its_weights_are(
    tmp_path: Path, is_tied: bool
) -> None:
    """Its default for the outer key is true, whatever text_config says: Mistral Small 3.1 has neither."""
    text = {"model_type": "mistral", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 50}
    vision = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "head_dim": 8, "image_size": 32, "patch_size": 16}
    model = Mistral3ForConditionalGeneration(
        Mistral3Config(text_config=text, vision_config=vision, tie_word_embeddings=is_tied)
    )
    model.save_pretrained(tmp_path / "published")
    file = tmp_path / "published" / "config.json"
    published = json.loads(file.read_text())
    del published["tie_word_embeddings"]
    file.write_text(json.dumps(published))
    again = Mistral3ForConditionalGeneration.from_pretrained(tmp_path / "published")
    again.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (written["tie_word_embeddings"], written["text_config"]["tie_word_embeddings"]) == (True, False)
    a, notes = read_hf_config(tmp_path / "again", text_only=True)
    assert a.tie_embeddings == is_tied
    assert any("tie_word_embeddings True contradicts that of text_config, False" in note for note in notes)
    with open_weights(tmp_path / "again") as weights:
        weights.check_model(a)
    (tmp_path / "again" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="there are no weights to tell which is true; set both alike"):
        read_hf_config(tmp_path / "again", text_only=True)
