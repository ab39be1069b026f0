"""Which tokens end a response, whatever the template does to a turn."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sftrl.config.schema import TokenizerSection
from megatron_sftrl.data.prompts import end_token_ids
from megatron_sftrl.data.tokenizer import load_tokenizer
from tests.unit.data.tokenizers_for_tests import SENTENCEPIECE_MODEL, write_byte_level

USER = "{% for m in messages %}{% if m.role == 'user' %}<|start_header_id|>{{ m.content }}{% else %}"
END = "{% endif %}{% endfor %}"
TEMPLATES = {
    # The generation opens <think>, the finished turn has lost it.
    "cuts thoughts": (
        USER + "<|im_start|>{{ m.content.split('</think>')[-1] }}<|im_end|>" + END
        + "{% if add_generation_prompt %}<|im_start|><think>\n{% endif %}",
        {"</s>", "<|im_end|>"},
    ),
    "cuts thoughts, newline": (
        USER + "<|im_start|>{{ m.content }}<|im_end|>\n" + END
        + "{% if add_generation_prompt %}<|im_start|><think>{% endif %}",
        {"</s>", "<|im_end|>"},
    ),
    "cuts thoughts, eos": (
        USER + "<|im_start|>{{ m.content }}{{ eos_token }}" + END
        + "{% if add_generation_prompt %}<|im_start|><think>{% endif %}",
        {"</s>"},
    ),
    # One token ends the last turn, another one those before it and parts of the last.
    "two ends": (
        USER + "<|im_start|>analysis<|eot_id|><|im_start|>final{{ m.content }}"
        "{{ '<|im_end|>' if loop.last else '<|eot_id|>' }}" + END
        + "{% if add_generation_prompt %}<|im_start|>{% endif %}",
        {"</s>", "<|im_end|>"},
    ),
    "newline": (
        USER + "<|im_start|>{{ m.content }}\n<|im_end|>\n" + END
        + "{% if add_generation_prompt %}<|im_start|>{% endif %}",
        {"</s>", "<|im_end|>"},
    ),
    "no end": (
        USER + "<|im_start|>{{ m.content }}" + END + "{% if add_generation_prompt %}<|im_start|>{% endif %}",
        {"</s>"},
    ),
    "prompts only": (
        "{% for m in messages %}{{ m.content }}{% if m.role != 'user' %}{{ raise_exception('no') }}"
        "{% endif %}{% endfor %}",
        {"</s>"},
    ),
    "no answers": ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}" + END, {"</s>"}),
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_response_ends_with_the_end_token_and_with_what_the_template_prints_behind_a_turn(
    name: str, tmp_path: Path
) -> None:
    source, expected = TEMPLATES[name]
    (tmp_path / "t.jinja").write_text(source)
    tokenizer = load_tokenizer(
        TokenizerSection(path=write_byte_level(tmp_path / "t"), chat_template=tmp_path / "t.jinja")
    )
    assert {tokenizer.decode([each]) for each in end_token_ids(tokenizer)} == expected


def test_without_a_template_the_end_token_alone_ends_a_response() -> None:
    tokenizer = load_tokenizer(TokenizerSection(path=SENTENCEPIECE_MODEL))
    assert end_token_ids(tokenizer) == {tokenizer.eos_id}
