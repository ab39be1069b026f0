"""Rows as other projects write them: each becomes the turns that a person reads in it, or is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_sftrl.apps.preflight.run import _read_first_rows
from megatron_sftrl.apps.score import read_whole
from megatron_sftrl.config.data import DemonstrationColumns, PromptColumns
from megatron_sftrl.config.schema import TokenizerSection
from megatron_sftrl.data.dataset import find_rows
from megatron_sftrl.data.prompts import PromptRow, read_prompt_set
from megatron_sftrl.data.tokenizer import Tokenizer, load_tokenizer
from megatron_sftrl.trainers.generate import _read_prompts
from tests.unit.data.tokenizers_for_tests import write_byte_level

Turn = dict[str, str]


def turn(role: str, content: str) -> Turn:
    return {"role": role, "content": content}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_byte_level(tmp_path / "tokenizer", template="chatml")


@pytest.fixture
def tokenizer(directory: Path) -> Tokenizer:
    return load_tokenizer(TokenizerSection(path=directory))


@pytest.fixture
def render(directory: Path) -> Callable[..., list[int]]:
    """transformers' own ids of turns, with or without the header of an answer."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(directory))

    def ids(turns: Sequence[Turn], *, asks: bool = False) -> list[int]:
        text = theirs.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=asks)
        return theirs(text, add_special_tokens=False)["input_ids"]

    return ids


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path: Path, *rows: dict) -> Path:
    import datasets

    datasets.Dataset.from_list(list(rows)).to_parquet(str(path))
    return path


def prompts(tokenizer: Tokenizer, path: Path, **columns: str) -> Sequence[PromptRow]:
    mapped = PromptColumns(**columns) if columns else None
    return read_prompt_set([path], tokenizer, max_prompt_length=200, columns=mapped).rows


def examples(tokenizer: Tokenizer, path: Path, **columns: str) -> list[tuple[list[int], list[bool]]]:
    mapped = DemonstrationColumns(**columns) if columns else None
    data = find_rows([path], tokenizer, max_length=200, truncation="error", columns=mapped).load()
    return [(each.tokens.tolist(), each.loss_mask.tolist()) for each in (data[i] for i in range(len(data)))]


def expected(
    render: Callable[..., list[int]], turns: Sequence[Turn], *learned: int
) -> tuple[list[int], list[bool]]:
    """Ids and mask by transformers: from behind the header of each learned turn to its end token."""
    whole = render(turns)
    mask = [False] * len(whole)
    (end,) = set(render([turn("user", "")])) & set(render([turn("user", "a")])) & {whole[-2]}
    for number in learned:
        before = render(turns[:number], asks=True)
        assert whole[: len(before)] == before
        stop = whole.index(end, len(before)) + 1
        mask[len(before) : stop] = [True] * (stop - len(before))
    stop = len(mask) - mask[::-1].index(True)
    return whole[:stop], mask[:stop]


SYSTEM, ASK = turn("system", "Be brief."), turn("user", "What is 2+2?")
THOUGHT = turn("assistant", "<think>2+2</think>4")
EARLIER = [turn("user", "Hello"), turn("assistant", "Hello there")]

VERL = {
    "data_source": "openai/gsm8k",
    "prompt": [SYSTEM, ASK],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "4"},
    "extra_info": {"split": "train", "index": 0, "question": "What is 2+2?", "answer": "#### 4"},
}


# Prompts: the ids that a response continues, and the answer that rewards read.


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_verls_rl_rows_ask_with_their_turns_and_answer_with_the_ground_truth(
    kind: str, tokenizer: Tokenizer, render: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="megatron_sftrl")
    several = {
        **VERL,
        "prompt": [SYSTEM, *EARLIER, ASK],
        "reward_model": {"style": "rule", "ground_truth": "5"},
    }
    path = (write if kind == "jsonl" else write_parquet)(tmp_path / f"verl.{kind}", VERL, several)
    one, two = prompts(tokenizer, path)
    assert list(one.tokens) == render([SYSTEM, ASK], asks=True)
    assert list(two.tokens) == render([SYSTEM, *EARLIER, ASK], asks=True)
    assert [one.values["answer"], two.values["answer"]] == ["4", "5"]
    assert one.values["data_source"] == "openai/gsm8k"
    assert one.values["extra_info"] == VERL["extra_info"]
    assert caplog.messages == [
        f"data.train: {path} holds verl's RL rows: prompt turns, answer from reward_model.ground_truth"
    ]


@pytest.mark.parametrize(
    ("row", "turns", "answer", "title"),
    [
        (
            {"question": "What is 2+2?", "answer": "#### 4"},
            [ASK],
            "#### 4",
            "question and answer: question as",
        ),
        ({"prompt": [SYSTEM, ASK], "answer": "4"}, [SYSTEM, ASK], "4", "prompts"),
        ({"prompt": "What is 2+2?", "answer": 4}, [ASK], 4, "prompts"),
        ({"messages": [SYSTEM, ASK], "answer": "4"}, [SYSTEM, ASK], "4", "messages"),
        ({**VERL, "target": [THOUGHT]}, [SYSTEM, ASK], "4", "verl's RL rows"),
        ({**VERL, "answer": "4"}, [SYSTEM, ASK], "4", "verl's RL rows"),
        # What is not text stays as it is; the rewards say whether they can read it.
        ({**VERL, "reward_model": {"ground_truth": None}}, [SYSTEM, ASK], None, "verl's RL rows"),
        ({**VERL, "reward_model": {"ground_truth": 1.5}}, [SYSTEM, ASK], 1.5, "verl's RL rows"),
    ],
)
def test_each_format_of_prompts_asks_what_generation_would_be_asked(
    row: dict, turns: list[Turn], answer: object, title: str,
    tokenizer: Tokenizer, render: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level("INFO", logger="megatron_sftrl")
    path = write(tmp_path / "rows.jsonl", row)
    (found,) = prompts(tokenizer, path)
    assert list(found.tokens) == render(turns, asks=True)
    assert found.values == {**row, "answer": answer}
    (line,) = caplog.messages
    assert line.startswith(f"data.train: {path} holds {title}")


# Demonstrations: the same ids, and a mask of the answers.


@pytest.mark.parametrize(
    ("row", "turns", "learned", "title"),
    [
        (
            {"prompt": "What is 2+2?", "completion": "4"},
            [ASK, turn("assistant", "4")], [1], "TRL's rows: prompt, and completion as the response",
        ),
        (
            {"prompt": [SYSTEM, *EARLIER, ASK], "completion": [THOUGHT]},
            [SYSTEM, *EARLIER, ASK, THOUGHT], [4], "TRL's rows",
        ),
        (
            {"prompt": [ASK], "completion": [THOUGHT, *EARLIER, turn("user", "left out")]},
            [ASK, THOUGHT, *EARLIER], [1, 3], "TRL's rows",
        ),
        ({"prompt": [ASK], "response": "4"}, [ASK, turn("assistant", "4")], [1], "prompt and response"),
        ({**VERL, "target": [THOUGHT]}, [SYSTEM, ASK, THOUGHT], [2], "LUFFY's rows: prompt turns, and"),
        (
            {"instruction": "Name a colour.", "input": "", "output": "Blue", "text": "### all of it"},
            [turn("user", "Name a colour."), turn("assistant", "Blue")], [1], "Alpaca's rows: instruction, a",
        ),
        (
            {"instruction": "Name a colour.", "input": "It is ice.", "output": "Blue", "system": "Be brief."},
            [SYSTEM, turn("user", "Name a colour.\nIt is ice."), turn("assistant", "Blue")], [2], "Alpaca's",
        ),
        (
            {"id": "a_0", "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "Hello"},
                {"from": "gpt", "value": "Hello there", "weight": 0},
                {"from": "human", "value": "What is 2+2?"},
                {"from": "gpt", "value": "<think>2+2</think>4"},
                {"from": "human", "value": "left out"},
            ]},
            [SYSTEM, *EARLIER, ASK, THOUGHT], [4], "ShareGPT's rows: conversations of from and value",
        ),
        (
            {"conversations": [{"from": "user", "value": "Hello"}, {"from": "gpt", "value": "Hello there"}]},
            EARLIER, [1], "ShareGPT's rows",
        ),
    ],
)  # fmt: skip
def test_each_format_of_demonstrations_learns_its_answers_and_no_more(
    row: dict, turns: list[Turn], learned: list[int], title: str,
    tokenizer: Tokenizer, render: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level("INFO", logger="megatron_sftrl")
    path = write(tmp_path / "rows.jsonl", row, row)
    assert examples(tokenizer, path) == [expected(render, turns, *learned)] * 2
    (line,) = caplog.messages
    assert line.startswith(f"data.train: {path} holds {title}")


def test_texts_of_trl_without_a_template_are_read_one_behind_the_other(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(TokenizerSection(path=write_byte_level(tmp_path / "t", adds_bos=True)))
    path = write(tmp_path / "rows.jsonl", {"prompt": "What is 2+2?", "completion": " 4"})
    ((ids, mask),) = examples(tokenizer, path)
    assert tokenizer.decode(ids) == "<s>What is 2+2? 4</s>"
    assert tokenizer.decode([i for i, learned in zip(ids, mask, strict=True) if learned]) == " 4</s>"
    turns = write(tmp_path / "turns.jsonl", {"prompt": [ASK], "completion": " 4"})
    with pytest.raises(ValueError, match=r"turns\.jsonl:1: the row has turns but .* no chat template"):
        examples(tokenizer, turns)


# data.columns: the user says where everything is.


def test_columns_of_any_name_and_keys_of_objects_are_read_where_data_columns_says_so(
    tokenizer: Tokenizer, render: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="megatron_sftrl")
    row = {
        "problem": "What is 2+2?",
        "prompt": "unused",
        "gold": {"final": "4"},
        "answer": "another",
        "a.b": "Hi",
    }
    path = write(tmp_path / "rows.jsonl", row)
    (found,) = prompts(tokenizer, path, prompt="problem", answer="gold.final")
    assert list(found.tokens) == render([ASK], asks=True)
    assert found.values == {**row, "answer": "4"}
    assert caplog.messages == [
        f"data.train: {path} holds rows as data.columns names them: prompt from problem, "
        "answer from gold.final"
    ]
    (found,) = prompts(tokenizer, path, prompt="a.b")
    assert list(found.tokens) == render([turn("user", "Hi")], asks=True)
    assert examples(tokenizer, path, prompt="problem", response="gold.final") == [
        expected(render, [ASK, turn("assistant", "4")], 1)
    ]


def test_data_columns_decides_between_two_formats_and_the_answer_alone_leaves_the_prompt_to_the_format(
    tokenizer: Tokenizer, render: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    row = {"prompt": "unused", "messages": [ASK, THOUGHT], "completion": "unused"}
    path = write(tmp_path / "rows.jsonl", row)
    assert examples(tokenizer, path, messages="messages") == [expected(render, [ASK, THOUGHT], 1)]
    told = [{"from": "human", "value": "What is 2+2?"}, {"from": "gpt", "value": "<think>2+2</think>4"}]
    path = write(tmp_path / "chats.jsonl", {"chat": {"turns": told}})
    assert examples(tokenizer, path, messages="chat.turns") == [expected(render, [ASK, THOUGHT], 1)]
    path = write(tmp_path / "verl.jsonl", {**VERL, "answer": "another"})
    caplog.clear()
    caplog.set_level("INFO", logger="megatron_sftrl")
    (found,) = prompts(tokenizer, path, answer="extra_info.answer")
    assert list(found.tokens) == render([SYSTEM, ASK], asks=True)
    assert found.values["answer"] == "#### 4"
    assert caplog.messages == [
        f"data.train: {path} holds verl's RL rows: prompt turns, answer from extra_info.answer"
    ]


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        (
            VERL, {"prompt": "prompt", "answer": "reward_model.ground_truht"},
            r"data\.columns\.answer: the row has no column reward_model\.ground_truht; the nearest is "
            r"reward_model\.ground_truth ",
        ),
        (VERL, {"answer": "reward_modle"}, r"data\.columns\.answer: .* column reward_modle; .* reward_mod"),
        ({"Question": "a"}, {"prompt": "question"}, r"data\.columns\.prompt: .* nearest is Question \(it"),
        (
            {"q": "a", "reward_model": '{"ground_truth": "4"}'},
            {"prompt": "q", "answer": "reward_model.ground_truth"},
            r"data\.columns\.answer: .* reward_model holds str and not an object \(JSON text is not parsed\)",
        ),
        ({"q": None}, {"prompt": "q"}, "q is null in this row"),
        ({"q": 3}, {"prompt": "q"}, "q: expected a list of turns, got int"),
        ({"q": "[]"}, {"messages": "q"}, "q: expected a list of turns, got str"),
        ({"a": {"b": "x"}, "a.b": "y"}, {"prompt": "a.b"}, r"a\.b: the row has a column of this name and"),
    ],
)  # fmt: skip
def test_a_column_that_is_not_there_is_refused_with_the_nearest_one_and_the_row(
    row: dict, columns: dict[str, str], message: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    good: dict = {}
    for column in columns.values():
        inner = good
        for key in column.split(".")[:-1]:
            inner = inner.setdefault(key, {})
        inner[column.rpartition(".")[2]] = [ASK] if column == columns.get("messages") else "x"
    if "prompt" not in columns and "messages" not in columns:
        good = {**VERL, **good}
    path = write(tmp_path / "rows.jsonl", good, row)
    with pytest.raises(ValueError, match=rf"rows\.jsonl:2: {message}"):
        prompts(tokenizer, path, **columns)


@pytest.mark.parametrize(
    ("schema", "columns", "message"),
    [
        (DemonstrationColumns, {}, "give prompt and response, or messages alone"),
        (DemonstrationColumns, {"prompt": "a"}, "give prompt and response, or messages alone"),
        (DemonstrationColumns, {"prompt": "a", "response": "b", "messages": "c"}, "or messages alone"),
        (PromptColumns, {}, "expected prompt, messages, answer, response or benchmark"),
        (PromptColumns, {"prompt": "a", "messages": "b"}, "give one of them"),
    ],
)
def test_a_mapping_that_says_too_little_or_too_much_is_refused(
    schema: type, columns: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        schema(**columns)


# What is refused, with its row.


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "a", "response": "b", "completion": "c"},
            r"two formats, prompt and response; and TRL's.*data\.columns: \{prompt: prompt, response: resp",
        ),
        (
            {"messages": [ASK, THOUGHT], "prompt": "a"},
            r"prompt beside messages.*data\.columns: \{messages: mess",
        ),
        ({"prompt": [ASK], "completion": [THOUGHT], "target": [THOUGHT]}, "TRL's rows.*; and LUFFY's rows"),
        (
            {"instruction": "a", "output": "b", "messages": [ASK, THOUGHT]},
            r"two formats, messages; and Alpaca's.*data\.columns: \{messages: messages\}",
        ),
        ({"instruction": "a", "output": "b", "prompt": "c"}, "the row has prompt beside Alpaca's rows"),
        (VERL, "the row has no response; expected prompt and response .*data.columns names"),
        ({"question": "a", "answer": "b"}, r"the row has no prompt; .* got \['answer', 'question'\]"),
        ({"conversations": [ASK, THOUGHT]}, "the row has no prompt; .*conversations of from and value"),
        ({"prompt": [ASK], "completion": [ASK]}, r"completion\[0\]\.role: expected assistant, got 'user'"),
        (
            {"prompt": [ASK, THOUGHT], "completion": "a"},
            r"prompt\[1\]: the prompt ends with an assistant turn",
        ),
        (
            {"prompt": [ASK, {**THOUGHT, "weight": 1}, ASK], "completion": "a"},
            r"prompt\[1\] says that it is learned",
        ),
        ({"prompt": [], "completion": "a"}, "prompt: expected a list of turns, got an empty one"),
        (
            {"prompt": [{"role": "user"}], "completion": "a"},
            r"prompt\[0\]\.content: expected text, got NoneType",
        ),
        ({"prompt": [ASK], "completion": 4}, "completion: expected text, or a list of turns, got int"),
        ({"prompt": [ASK], "completion": " "}, "the response is empty"),
        (
            {"prompt": [ASK], "target": [turn("assistant", "")]},
            r"target\[0\]: the assistant's response is empty",
        ),
        ({"instruction": "a", "input": 3, "output": "b"}, "input: expected text, got int"),
        ({"instruction": "a", "output": [THOUGHT]}, "output: expected text, got list"),
        ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "history: nothing reads this column"),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "b"}]},
            r"conversations\[1\]\.from: expected one of human, .*got 'function_call'",
        ),
        ({"conversations": [{"from": "human", "value": None}]}, r"conversations\[0\]\.value: expected text"),
        (
            {"conversations": [{"from": "human", "value": "a", "content": "b"}]},
            r"conversations\[0\] has from and value, and also content",
        ),
    ],
)
def test_a_demonstration_that_would_be_guessed_at_is_refused(
    row: dict, message: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = write(tmp_path / "rows.jsonl", row)
    with pytest.raises(ValueError, match=rf"rows\.jsonl:1: .*{message}"):
        examples(tokenizer, path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "a", "question": "b", "answer": "c"},
            r"two formats, prompts; and question and answer.*data\.columns: \{prompt: prompt\}",
        ),
        (
            {**VERL, "messages": [ASK]},
            r"verl's RL rows.*; and messages.*\{prompt: prompt, answer: reward_model\.ground_truth\}",
        ),
        (
            {**VERL, "answer": "5"},
            r"two answers, '5' in answer and '4' in reward_model\.ground_truth.*\{answer: ",
        ),
        ({"prompt": [ASK, THOUGHT]}, "prompt: the last turn is the assistant's"),
        ({"prompt": []}, "prompt: expected a list of turns, got an empty one"),
        ({"prompt": {"role": ["user"]}}, "prompt: expected a list of turns, got dict"),
        ({"question": "a"}, "expected either prompt or messages, or question and answer, or the columns of"),
        ({"instruction": "a", "output": "b"}, "expected either prompt or messages"),
    ],
)
def test_a_prompt_that_would_be_guessed_at_is_refused(
    row: dict, message: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = write(tmp_path / "rows.jsonl", row)
    with pytest.raises(ValueError, match=rf"rows\.jsonl:1: .*{message}"):
        prompts(tokenizer, path)


def test_a_row_of_another_format_than_the_files_first_is_refused(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    other = {"prompt": [ASK], "completion": "4"}
    path = write(tmp_path / "rows.jsonl", {"messages": [ASK, THOUGHT]}, other)
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: the row holds TRL's rows.* first row .* messages;"):
        examples(tokenizer, path)
    path = write(tmp_path / "verl.jsonl", VERL, {"prompt": [ASK], "answer": "4"})
    with pytest.raises(
        ValueError, match=r"verl\.jsonl:2: the row holds prompts, .* first row .* verl's RL rows"
    ):
        prompts(tokenizer, path)
    one, two = (
        write(tmp_path / "a.jsonl", {"prompt": "a", "completion": "b"}),
        write(tmp_path / "b.jsonl", other),
    )
    both = find_rows([one, two], tokenizer, max_length=200, truncation="error").load()
    assert len(both) == 2


def test_another_mapping_is_another_cache(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"a": "x", "b": "Blue", "c": "red"})

    def learned(response: str) -> int:
        data = find_rows(
            [path], tokenizer, max_length=200, truncation="error", cache_dir=tmp_path / "cache",
            columns=DemonstrationColumns(prompt="a", response=response),
        ).load()  # fmt: skip
        return data[0].tokens.tolist()[-2]

    assert learned("b") != learned("c")


# The other readers of rows.


def test_score_preflight_and_generate_read_the_same_formats(
    tokenizer: Tokenizer, render: Callable, tmp_path: Path
) -> None:
    luffy, verl = (
        write(tmp_path / "l.jsonl", {**VERL, "target": [THOUGHT]}),
        write(tmp_path / "v.jsonl", VERL),
    )
    rows, dataset = read_whole(luffy, tokenizer, None, max_length=200, key="--data")
    assert rows == [{**VERL, "target": [THOUGHT]}]
    ids, mask = expected(render, [SYSTEM, ASK, THOUGHT], 2)
    assert dataset[0].loss_token_ids.tolist() == [i for i, learned in zip(ids, mask, strict=True) if learned]
    rows, asked = _read_prompts(verl, tokenizer, None)
    assert (rows, asked) == ([VERL], [tuple(render([SYSTEM, ASK], asks=True))])

    def look(path: Path, columns: object, *, grpo: object) -> None:
        data = SimpleNamespace(train_paths=[path], valid=[path], columns=columns)
        checked: Any = SimpleNamespace(tokenizer=tokenizer, config=SimpleNamespace(data=data, grpo=grpo))
        _read_first_rows(checked)

    look(luffy, None, grpo=None)
    look(verl, PromptColumns(answer="extra_info.answer"), grpo="yes")
    with pytest.raises(
        ValueError, match=r"v\.jsonl:1: data\.columns\.answer: .* nearest is extra_info\.answer"
    ):
        look(verl, PromptColumns(answer="extra_info.answr"), grpo="yes")
    with pytest.raises(ValueError, match=r"v\.jsonl:1: the row has no response"):
        look(verl, None, grpo=None)
