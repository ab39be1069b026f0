"""The response that a row of prompts has beside its prompt, as a member of its group."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_sftrl.config.data import Learning, PromptColumns
from megatron_sftrl.config.schema import TokenizerSection
from megatron_sftrl.data.chat import tokenize_row
from megatron_sftrl.data.prompts import PromptSet, read_prompt_set
from megatron_sftrl.data.tokenizer import Tokenizer, load_tokenizer
from megatron_sftrl.errors import UserError
from tests.unit.data.tokenizers_for_tests import SENTENCEPIECE_MODEL, write_byte_level

THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return load_tokenizer(TokenizerSection(path=write_byte_level(tmp_path / "tokenizer", template="chatml")))


def read(
    tokenizer: Tokenizer, path: Path, *rows: dict, longest: int | None = 64, column: str | None = None
) -> PromptSet:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = None if column is None else PromptColumns(response=column)
    return read_prompt_set(
        [path], tokenizer, max_prompt_length=200, columns=columns, longest_demonstration=longest
    )


TURNS = [{"role": "system", "content": "add"}, {"role": "user", "content": "1+1"}]
SAID = [{"role": "assistant", "content": "2"}]
ROWS = {
    "response": ({"prompt": "1+1", "response": "2"}, None),
    "completion": ({"prompt": TURNS, "completion": SAID}, None),
    "LUFFY's, beside verl's answer": (
        {"prompt": TURNS, "target": SAID, "reward_model": {"ground_truth": "2"}},
        None,
    ),
    "messages": ({"messages": TURNS, "response": "2"}, None),
    "a question, named": ({"question": "1+1", "answer": "2", "worked": {"text": "2"}}, "worked.text"),
    "one of two, named": ({"prompt": "1+1", "response": "3", "target": "2"}, "target"),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_demonstration_stands_behind_its_prompt_as_it_is_learned(
    name: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    row, column = ROWS[name]
    (found,) = read(tokenizer, tmp_path / "rows.jsonl", row, column=column).rows
    assert found.demonstration is not None
    whole = {"messages": [*(TURNS if TURNS in row.values() else TURNS[1:]), *SAID]}
    ids, mask = tokenize_row(tokenizer, whole, Learning(turns="last_turn"))
    assert [*found.tokens, *found.demonstration] == ids
    assert mask == [False] * len(found.tokens) + [True] * len(found.demonstration)
    assert tokenizer.decode(found.demonstration) == "2<|im_end|>"


def test_a_tokenizer_without_a_template_ends_a_demonstration_with_its_end_token(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(TokenizerSection(path=SENTENCEPIECE_MODEL))
    (found,) = read(tokenizer, tmp_path / "rows.jsonl", {"prompt": "1+1 = ", "response": "2"}).rows
    assert found.demonstration is not None
    assert found.demonstration[-1] == tokenizer.eos_id
    assert found.tokens[0] == tokenizer.bos_id


def test_rows_without_one_are_prompts_alone_and_all_are_where_none_is_asked_for(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    rows = ({"prompt": "1+1", "response": "2"}, {"prompt": "1+2", "response": None}, {"prompt": "1+3"})
    shown = read(tokenizer, tmp_path / "rows.jsonl", *rows)
    assert [row.demonstration is not None for row in shown.rows] == [True, False, False]
    plain = read(tokenizer, tmp_path / "rows.jsonl", *rows, longest=None)
    assert [row.demonstration for row in plain.rows] == [None] * 3
    assert [row.tokens for row in plain.rows] == [row.tokens for row in shown.rows]
    assert plain.fingerprint != shown.fingerprint


@pytest.mark.parametrize(
    ("row", "column", "message"),
    [
        ({"prompt": "1+1"}, None, r"no row of data.train has a response .*rollout.demonstrations=0"),
        ({"prompt": "1+1", "response": None}, "response", r"no row of data.train has a response"),
        ({"prompt": "1+1", "respond": "2"}, "response", r"rows.jsonl:1: data.columns.response: .*respond"),
        ({"prompt": "1", "response": "2", "target": "3"}, None, r"has response and target; .*response: resp"),
        ({"prompt": "1", "response": " "}, None, r"rows.jsonl:1: the response is empty"),
        ({"prompt": "1", "response": "2" * 99}, None, r"at most rollout.max_new_tokens = 64 tokens, got"),
        (
            {"prompt": "1", "response": [*SAID, {"role": "user", "content": "sure?"}, *SAID]},
            None,
            r"rows.jsonl:1: response: a demonstration in a group is one assistant turn",
        ),
    ],
)
def test_a_demonstration_that_no_group_can_have_is_refused(
    row: dict, column: str | None, message: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        read(tokenizer, tmp_path / "rows.jsonl", row, column=column)


@pytest.mark.parametrize("said", ["one more\n</think>\n2", "2"])
def test_a_demonstration_goes_on_where_a_generation_begins_to_think(said: str, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(THINKS)
    tokenizer = load_tokenizer(
        TokenizerSection(path=write_byte_level(tmp_path / "t"), chat_template=tmp_path / "t.jinja")
    )
    (found,) = read(tokenizer, tmp_path / "rows.jsonl", {"prompt": "1+1", "response": said}).rows
    assert found.demonstration is not None
    assert tokenizer.decode(found.tokens).endswith("<think>\n")
    assert tokenizer.decode(found.demonstration) == f"{said}<|im_end|>"


def test_an_answer_that_begins_elsewhere_than_a_generation_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}final: "
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = load_tokenizer(
        TokenizerSection(path=write_byte_level(tmp_path / "t"), chat_template=tmp_path / "t.jinja")
    )
    with pytest.raises(UserError, match=r"rows.jsonl:1: .*block does not start where generation does"):
        read(tokenizer, tmp_path / "rows.jsonl", {"prompt": "1+1", "response": "2"})
