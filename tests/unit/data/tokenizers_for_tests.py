"""Small real tokenizers and chat templates of the common kinds, from tests/data/chat."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from megatron_sftrl.config.schema import TokenizerSection
from megatron_sftrl.data.tokenizer import Tokenizer, load_tokenizer

CHAT = Path(__file__).resolve().parents[2] / "data" / "chat"
SENTENCEPIECE_MODEL = CHAT / "tiny.model"
"""A BPE model of 100 pieces; characters outside of its corpus are unknown."""


def template_path(name: str) -> Path:
    """One of tests/data/chat/templates."""
    return CHAT / "templates" / f"{name}.jinja"


def write_byte_level(directory: Path, *, template: str | None = None, adds_bos: bool = False) -> Path:
    """A Hugging Face directory with the byte-level BPE tokenizer of 400 ids.

    Args:
        directory: where to write it.
        template: name of the chat template in its tokenizer_config.json.
        adds_bos: the tokenizer itself puts <s> in front of a text.
    Returns:
        The directory.
    """
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copy(CHAT / "byte_level" / "tokenizer.json", directory / "tokenizer.json")
    if adds_bos:
        rules = json.loads((directory / "tokenizer.json").read_text())
        bos = rules["model"]["vocab"]["<s>"]
        rules["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [bos], "tokens": ["<s>"]}},
        }
        (directory / "tokenizer.json").write_text(json.dumps(rules))
    config: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
    }
    if template is not None:
        config["chat_template"] = template_path(template).read_text()
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def load_by_name(directory: Path, *, kind: str, template: str | None) -> Tokenizer:
    """The tokenizer that a golden case names."""
    if kind == "sentencepiece":
        section = TokenizerSection(
            path=SENTENCEPIECE_MODEL, chat_template=template_path(template) if template else None
        )
    else:
        path = write_byte_level(directory, template=template, adds_bos=template is None)
        section = TokenizerSection(path=path)
    return load_tokenizer(section)


def reading(tokenizer: Tokenizer, ids: list[int], mask: list[bool]) -> str:
    """Tokens as a person reads them: `|` between tokens, what is learned in double brackets."""
    text, was_learned = "", False
    for i, learned in zip(ids, mask, strict=True):
        if learned != was_learned:
            text += "[[" if learned else "]]"
            was_learned = learned
        text += tokenizer.decode([i]) + "|"
    return text + ("]]" if was_learned else "")
