"""Rows to tokens and masks: golden files that a person has read, and what is refused."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_sftrl.config.data import Learning
from megatron_sftrl.config.schema import TokenizerSection
from megatron_sftrl.data.chat import encode_prompt, tokenize_row, tokenize_sequences
from megatron_sftrl.data.conversation import read_demonstration, read_prompt
from megatron_sftrl.data.template import ChatTemplate
from megatron_sftrl.data.tokenizer import Tokenizer, load_tokenizer
from megatron_sftrl.errors import UserError
from tests.unit.data.tokenizers_for_tests import (
    CHAT,
    SENTENCEPIECE_MODEL,
    load_by_name,
    reading,
    template_path,
    write_byte_level,
)

CASES = json.loads((CHAT / "cases.json").read_text())


def turn(role: str, content: object) -> dict[str, Any]:
    return {"role": role, "content": content}


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['tokenizer']}-{c['template']}-{c['name']}")
def test_tokens_and_mask_equal_the_golden_file_and_the_end_token_is_learned(case, tmp_path) -> None:
    tokenizer = load_by_name(tmp_path / "t", kind=case["tokenizer"], template=case["template"])
    ids, mask = tokenize_row(tokenizer, case["row"])
    assert reading(tokenizer, ids, mask) == case["reading"]
    assert ids == case["ids"]
    assert "".join("01"[learned] for learned in mask) == case["mask"]
    assert mask[-1]
    assert ids[-1] in tokenizer.special_ids


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['tokenizer']}-{c['template']}-{c['name']}")
def test_the_prompt_of_generation_is_exactly_what_stands_in_front_of_the_first_response(
    case, tmp_path
) -> None:
    tokenizer = load_by_name(tmp_path / "t", kind=case["tokenizer"], template=case["template"])
    ids, mask = tokenize_row(tokenizer, case["row"])
    messages = read_demonstration(case["row"]).messages
    first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
    prompt = messages[:first] if tokenizer.chat_template else case["row"]["prompt"]
    assert ids[: mask.index(True)] == encode_prompt(tokenizer, prompt)


def test_a_token_that_would_cross_into_the_response_is_split_as_generation_would_see_it(tmp_path) -> None:
    tokenizer = load_by_name(tmp_path / "t", kind="byte_level", template=None)
    row = {"prompt": "Name a colo", "response": "ur"}
    whole = tokenizer.encode("Name a colour")
    ids, mask = tokenize_row(tokenizer, row)
    prompt = encode_prompt(tokenizer, "Name a colo")
    assert whole[: len(prompt) - 1] != prompt[1:], "the example must merge, or it proves nothing"
    assert ids[: len(prompt)] == prompt
    assert mask.index(True) == len(prompt)
    assert tokenizer.decode(ids) == "<s>Name a colour</s>"


def test_a_sentencepiece_response_gets_no_invented_space_in_front(tmp_path) -> None:
    tokenizer = load_by_name(tmp_path / "t", kind="sentencepiece", template=None)
    ids, mask = tokenize_row(tokenizer, {"prompt": "the an", "response": "swer"})
    assert ids[: mask.index(True)] == encode_prompt(tokenizer, "the an")
    assert tokenizer.decode(ids) == "<s>the answer</s>"


def test_texts_that_are_tokenized_apart_keep_the_space_behind_a_control_token(tmp_path) -> None:
    template = tmp_path / "bare.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    tokenizer = load_tokenizer(TokenizerSection(path=SENTENCEPIECE_MODEL, chat_template=template))
    turns = [
        turn("user", "the an"),
        turn("assistant", "swer"),
        turn("user", "red"),
        turn("assistant", " fine"),
    ]
    ids, mask = tokenize_row(tokenizer, {"messages": turns})
    assert ids[: mask.index(True)] == encode_prompt(tokenizer, "the an")
    assert ids != tokenizer.encode("the answer</s>red fine</s>"), (
        "the example must merge, or it proves nothing"
    )
    behind = ids[ids.index(tokenizer.eos_id) :]
    assert behind == tokenizer.encode("</s>red fine</s>")


def test_turns_that_a_template_prints_differently_later_are_learned_in_sequences_of_their_own(
    tmp_path,
) -> None:
    tokenizer = load_by_name(tmp_path / "t", kind="byte_level", template="forgets_thoughts")
    turns = [turn("user", "Hello"), turn("assistant", "<think>red</think>fine")]
    more = [*turns, turn("user", "Hello"), turn("assistant", "Blue")]
    first, second = tokenize_sequences(tokenizer, {"messages": more})
    assert first == tokenize_row(tokenizer, {"messages": turns})
    with pytest.raises(UserError, match="expected one sequence, got 2"):
        tokenize_row(tokenizer, {"messages": more})
    ids, mask = second
    assert ids[: mask.index(True)] == encode_prompt(tokenizer, more[:3])
    assert "red" not in tokenizer.decode(ids)
    assert reading(tokenizer, ids, mask).endswith("[[Bl|ue|<|im_end|>|]]")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Hello"}, "no response"),
        ({"response": "Hello"}, "no prompt"),
        ({"prompt": "Hello", "response": None}, "no response"),
        ({"prompt": "Hello", "response": " \n"}, "response is empty"),
        ({"prompt": "Hello", "response": 4}, "expected text, or a list of turns, got int"),
        ({"messages": []}, "list of turns"),
        ({"messages": "Hello"}, "list of turns"),
        ({"messages": ["Hello"]}, r"messages\[0\]"),
        ({"messages": [turn("user", "Hello")]}, "no response"),
        ({"messages": [turn("user", "Hello"), turn("assistant", "")]}, r"messages\[1\].*empty"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\].content"),
        ({"messages": [turn("assistant", "a")], "prompt": "b"}, "keep one of the two"),
        ({"question": "b"}, r"got \['question'\]"),
    ],
)
def test_a_row_without_a_usable_response_is_refused(row, message, tmp_path) -> None:
    tokenizer = load_by_name(tmp_path / "t", kind="byte_level", template="chatml")
    with pytest.raises(ValueError, match=message):
        tokenize_row(tokenizer, row)


def test_messages_without_a_template_are_refused_with_the_setting_to_change(tmp_path) -> None:
    tokenizer = load_by_name(tmp_path / "t", kind="byte_level", template=None)
    with pytest.raises(ValueError, match=r"tokenizer\.chat_template"):
        tokenize_row(tokenizer, {"messages": [turn("user", "a"), turn("assistant", "b")]})


def test_a_template_file_replaces_the_tokenizers_own_template(tmp_path) -> None:
    path = write_byte_level(tmp_path / "t", template="chatml")
    other = tmp_path / "other.jinja"
    other.write_text("{% for m in messages %}{{ m.content }}</s>{% endfor %}")
    tokenizer = load_tokenizer(TokenizerSection(path=path, chat_template=other))
    ids, mask = tokenize_row(tokenizer, {"prompt": "Hello", "response": "Blue"})
    assert reading(tokenizer, ids, mask) == "Hello|</s>|[[Bl|ue|</s>|]]"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''.__class__.__base__ }}",
        "{% include '/etc/passwd' %}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(source) -> None:
    template = ChatTemplate(source, special_tokens={}, origin="evil.jinja")
    with pytest.raises(ValueError, match=r"evil\.jinja"):
        template.render([turn("user", "Hello")])


def test_a_template_may_print_json_and_html_stays_as_written() -> None:
    template = ChatTemplate("{{ messages | tojson }}", special_tokens={}, origin="t")
    assert template.render([turn("user", "<b>é")]) == '[{"role": "user", "content": "<b>é"}]'


def test_a_template_that_is_no_jinja_is_refused() -> None:
    with pytest.raises(ValueError, match=r"broken\.jinja is not a Jinja template"):
        ChatTemplate("{% for %}", special_tokens={}, origin="broken.jinja")


def test_a_generation_block_whose_text_is_changed_afterwards_is_refused() -> None:
    source = "{% filter upper %}{% generation %}ab{% endgeneration %}{% endfilter %}"
    template = ChatTemplate(source, special_tokens={}, origin="t")
    assert template.render_generated_spans([turn("user", "x")]) == ("AB", [(0, 2)])
    source = "{% filter trim %}{% generation %} ab {% endgeneration %}{% endfilter %}"
    template = ChatTemplate(source, special_tokens={}, origin="t")
    with pytest.raises(ValueError, match="changed afterwards"):
        template.render_generated_spans([turn("user", "x")])


def test_the_word_generation_in_a_comment_or_string_is_no_marker() -> None:
    for source in ("{# {% generation %} #}x", "{{ '{% generation %}' }}"):
        assert not ChatTemplate(source, special_tokens={}, origin="t").has_generation_markers


def test_text_behind_the_last_block_that_nobody_learns_is_refused(tmp_path) -> None:
    path = write_byte_level(tmp_path / "t")
    file = tmp_path / "t.jinja"
    file.write_text(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %} END{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    tokenizer = load_tokenizer(TokenizerSection(path=path, chat_template=file))
    with pytest.raises(ValueError, match=r"' END'.*no end would be learned"):
        tokenize_row(tokenizer, {"prompt": "Hello", "response": "Blue"})


def test_rendering_equals_hugging_faces_own(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    messages = [turn("user", "Hello"), turn("assistant", "fine"), turn("user", "Name <b>a</b> colour")]
    for name in ("chatml", "llama3", "inst", "generation", "plain_text", "forgets_thoughts"):
        path = write_byte_level(tmp_path / name, template=name)
        theirs = AutoTokenizer.from_pretrained(str(path)).apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        template = load_tokenizer(TokenizerSection(path=path)).chat_template
        assert template is not None
        assert template.render(messages, add_generation_prompt=True) == theirs


def tokenizer_with(directory: Path, source: str) -> Tokenizer:
    """The byte-level tokenizer with this template."""
    file = directory / "own.jinja"
    file.write_text(source)
    return load_tokenizer(TokenizerSection(path=write_byte_level(directory / "t"), chat_template=file))


def learned(tokenizer: Tokenizer, row: dict) -> str:
    """The text of the learned tokens."""
    ids, mask = tokenize_row(tokenizer, row)
    return tokenizer.decode([i for i, is_learned in zip(ids, mask, strict=True) if is_learned])


HEADER = "<|im_start|>{{ m.role }}\n"
FULL = (
    "{% if tools %}[{{ tools | tojson }}]{% endif %}{% if documents %}{{ documents | tojson }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}{{ '\\n' }}"
    "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Prints every key there is, and the thinking of the last turn alone, as when a model is served."""
TOOL = {"type": "function", "function": {"name": "add"}}


@pytest.mark.parametrize(
    "flag", [{"weight": 0}, {"weight": 0.0}, {"loss": False}, {"trainable": False}, {"train": False}]
)
@pytest.mark.parametrize("template", ["chatml", "generation"])
def test_a_turn_that_says_so_is_not_learned_and_the_others_are_as_generation_asks(
    flag, template, tmp_path
) -> None:
    tokenizer = load_by_name(tmp_path / "t", kind="byte_level", template=template)
    turns = [turn("user", "Hello"), {**turn("assistant", "WRONG"), **flag}, turn("user", "again")]
    last = {**turn("assistant", "Blue"), **dict.fromkeys(flag, 1)}
    behind = [turn("user", "more"), {**turn("assistant", "WRONG"), **flag}]
    row = {"messages": [*turns, last, *behind]}
    assert learned(tokenizer, row) == "Blue<|im_end|>"
    ids, mask = tokenize_row(tokenizer, row)
    assert ids[: mask.index(True)] == encode_prompt(tokenizer, turns)
    assert "more" not in tokenizer.decode(ids)


def test_a_turn_that_is_not_learned_may_lose_its_thoughts_as_when_served(tmp_path) -> None:
    tokenizer = load_by_name(tmp_path / "t", kind="byte_level", template="forgets_thoughts")
    first = {**turn("assistant", "<think>red</think>fine"), "weight": 0}
    row = {"messages": [turn("user", "Hello"), first, turn("user", "Name"), turn("assistant", "Blue")]}
    assert learned(tokenizer, row) == "Blue<|im_end|>"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": 0.5}, r"messages\[1\]\.weight: expected 0 or 1 .*got 0\.5"),
        ({"weight": "0"}, r"messages\[1\]\.weight: expected 0 or 1"),
        ({"weight": 0}, "none of its assistant turns is learned"),
        ({"weight": 0, "train": True}, r"messages\[1\]: weight and train contradict"),
        ({"reasoning_content": "why"}, r"messages\[1\]\.reasoning_content: .*does not print it"),
        ({"thinking": "why"}, r"messages\[1\]\.thinking: .*does not print it"),
        ({"tool_calls": [TOOL]}, r"messages\[1\]\.tool_calls: .*does not print it"),
        ({"name": "bob"}, r"messages\[1\]\.name: .*does not print it"),
    ],
)
def test_a_key_of_a_turn_that_is_not_honoured_is_refused(changes, message, tmp_path) -> None:
    tokenizer = load_by_name(tmp_path / "t", kind="byte_level", template="chatml")
    row = {"messages": [turn("user", "Hello"), {**turn("assistant", "Blue"), **changes}]}
    with pytest.raises(ValueError, match=message):
        tokenize_row(tokenizer, row)


def test_only_assistant_turns_can_ask_to_be_learned(tmp_path) -> None:
    tokenizer = load_by_name(tmp_path / "t", kind="byte_level", template="chatml")
    row = {"messages": [{**turn("user", "Hello"), "weight": 1}, turn("assistant", "Blue")]}
    with pytest.raises(ValueError, match=r"messages\[0\]\.weight: only assistant turns"):
        tokenize_row(tokenizer, row)
    row["messages"][0]["weight"] = 0
    assert learned(tokenizer, row) == "Blue<|im_end|>"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"tools": [TOOL]}, "^tools: .*does not print them"),
        ({"documents": [{"title": "a"}]}, "^documents: .*does not print them"),
        ({"tools": "add"}, "^tools: expected a list of objects, got no JSON"),
        ({"tools": '{"type": "function"}'}, "^tools: expected a list of objects, got dict"),
        ({"tools": ['{"type": "function"}']}, r"^tools\[0\]: expected an object, got str"),
        ({"functions": [TOOL]}, "^functions: nothing reads this column.*write them as tools"),
        ({"system_prompt": "Be brief."}, "^system_prompt: nothing reads this column.*name the column system"),
        ({"systemPrompt": "Be brief."}, "^systemPrompt: nothing reads this column.*name the column system"),
        ({"System": "Be brief."}, "^System: nothing reads this column.*name the column system"),
        ({"chat_template_kwargs": {"style": "x"}}, r"^chat_template_kwargs\.style: .*reads no variable"),
        ({"chat_template_kwargs": "x"}, "^chat_template_kwargs: expected an object, got no JSON"),
        (
            {"chatTemplateKwargs": {"style": "x"}},
            "^chatTemplateKwargs: .*name the column chat_template_kwargs",
        ),
        ({"images": ["a.png"]}, "^images: nothing reads this column.*only text"),
        ({"system": 3}, "^system: expected text"),
    ],
)
def test_a_column_that_would_be_lost_is_refused_in_demonstrations_and_prompts(
    columns, message, tmp_path
) -> None:
    tokenizer = load_by_name(tmp_path / "t", kind="byte_level", template="chatml")
    with pytest.raises(ValueError, match=message):
        tokenize_row(tokenizer, {"prompt": "Hello", "response": "Blue", **columns})
    with pytest.raises(ValueError, match=message):
        encode_prompt(tokenizer, read_prompt({"prompt": "Hello", **columns}))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"reasoning_content": "why"}, "^reasoning_content: nothing reads this column"),
        ({"thinking": "why"}, "^thinking: nothing reads this column"),
        ({"thought": "why"}, "^thought: nothing reads this column"),
        ({"weight": 0.5}, "^weight: expected true, got 0.5"),
        ({"weight": "0.5"}, "^weight: expected true"),
        ({"loss": [False, True]}, "^loss: expected true"),
        ({"loss_mask": [0, 1]}, "^loss_mask: expected true"),
        ({"sample_weight": 0.5}, "^sample_weight: expected true"),
        ({"mask_history": True}, "^mask_history: expected false"),
    ],
)
def test_a_column_about_the_response_is_refused(columns, message, tmp_path) -> None:
    tokenizer = load_by_name(tmp_path / "t", kind="byte_level", template="chatml")
    with pytest.raises(ValueError, match=message):
        tokenize_row(tokenizer, {"prompt": "Hello", "response": "Blue", **columns})


def test_columns_of_the_users_own_and_empty_keys_change_nothing(tmp_path) -> None:
    tokenizer = load_by_name(tmp_path / "t", kind="byte_level", template="chatml")
    plain = {"messages": [turn("user", "Hello"), turn("assistant", "Blue")]}
    more = {"id": 7, "source": "web", "weight": "75 kg", "tools": [], "system": "", "thinking": None}
    more |= {"documents": "[]", "loss_mask": [1, 1], "train_on_prompt": False, "enable_thinking": True}
    nulls = {"tool_calls": [], "name": "", "weight": None, "reasoning_content": None}
    row = {"messages": [{**message, **nulls} for message in plain["messages"]], **more}
    assert tokenize_row(tokenizer, row) == tokenize_row(tokenizer, plain)


@pytest.mark.parametrize("role", ["Assistant", "gpt", "model", "human"])
def test_a_role_of_another_format_is_refused_though_a_template_would_print_it(role, tmp_path) -> None:
    tokenizer = load_by_name(tmp_path / "t", kind="byte_level", template="chatml")
    turns = [turn("user", "Hello"), turn(role, "Blue"), turn("user", "Hello"), turn("assistant", "fine")]
    with pytest.raises(ValueError, match=rf"messages\[1\]\.role: expected (assistant|user), got '{role}'"):
        tokenize_row(tokenizer, {"messages": turns})


def test_a_column_that_the_template_would_read_is_refused(tmp_path) -> None:
    thinks = FULL + "{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}"
    tokenizer = tokenizer_with(tmp_path, thinks)
    row = {"prompt": "Hello", "response": "Blue", "reasoning_effort": "high"}
    assert learned(tokenizer, row) == "Blue<|im_end|>"
    with pytest.raises(ValueError, match=r"^enable_thinking: .* reads a variable of this name"):
        tokenize_row(tokenizer, {**row, "enable_thinking": True})
    with pytest.raises(ValueError, match=r"^enable_thinking: .* reads a variable of this name"):
        encode_prompt(tokenizer, read_prompt({"prompt": "Hello", "enable_thinking": "no"}))


def test_a_name_that_the_template_sets_itself_is_no_variable_unless_it_asks_for_it_first() -> None:
    source = (
        "{% if not day is defined %}{% set day = 1 %}{% endif %}{{ day }}{{ bos_token }}{{ range(2) }}"
        "{% if tools %}{% set text = 'a' %}{% else %}{% set text = 'b' %}{% endif %}{{ text }}{{ kind }}"
        "{% for m in messages %}{{ m.content }}{{ loop.last }}{% endfor %}{{ add_generation_prompt }}"
    )
    template = ChatTemplate(source, special_tokens={"bos_token": "<s>"}, origin="x")
    assert template.variables == {"day", "kind", "tools"}


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_a_turn_of_calls_alone_is_learned(content, tmp_path) -> None:
    tokenizer = tokenizer_with(tmp_path, FULL)
    calls = [{"id": "c1", "function": {"name": "add", "arguments": {"a": 1}}}]
    row = {"messages": [turn("user", "Hello"), {"role": "assistant", **content, "tool_calls": calls}]}
    assert '"name": "add", "arguments": {"a": 1}' in learned(tokenizer, row)
    assert tokenize_row(tokenizer, {**row, "tools": [TOOL]}) == tokenize_row(
        tokenizer, {**row, "tools": json.dumps([TOOL])}
    )


@pytest.mark.parametrize("arguments", ['{"a": 1}', "{}"])
def test_arguments_of_a_call_are_not_learned_in_quotes(arguments, tmp_path) -> None:
    call = {"function": {"name": "add", "arguments": arguments}}
    turns = [turn("user", "Hello"), {**turn("assistant", "so"), "tool_calls": [call]}]
    assert f'"arguments": {arguments}' in learned(tokenizer_with(tmp_path, FULL), {"messages": turns})
    in_quotes = FULL.replace("m.tool_calls | tojson", "m.tool_calls[0].function.arguments | string | tojson")
    assert in_quotes != FULL
    with pytest.raises(ValueError, match=r"messages\[1\]\.tool_calls\[0\]: .*prints the arguments in quotes"):
        tokenize_row(tokenizer_with(tmp_path, in_quotes), {"messages": turns})
    as_it_is = FULL.replace("m.tool_calls | tojson", "m.tool_calls[0].function.arguments")
    assert as_it_is != FULL
    assert f"so{arguments}<" in learned(tokenizer_with(tmp_path, as_it_is), {"messages": turns})


def test_a_column_system_is_the_first_turn(tmp_path) -> None:
    tokenizer = load_by_name(tmp_path / "t", kind="byte_level", template="chatml")
    turns = [turn("user", "Hello"), turn("assistant", "Blue")]
    expected = tokenize_row(tokenizer, {"messages": [turn("system", "Be brief."), *turns]})
    for row in ({"messages": turns}, {"prompt": "Hello", "response": "Blue"}):
        assert tokenize_row(tokenizer, {**row, "system": "Be brief."}) == expected
    prompt = encode_prompt(tokenizer, read_prompt({"prompt": "Hello", "system": "Be brief."}))
    ids, mask = expected
    assert prompt == ids[: mask.index(True)]
    with pytest.raises(ValueError, match="a column system and also a system turn"):
        tokenize_row(tokenizer, {"messages": [turn("system", "a"), *turns], "system": "b"})
    without = load_by_name(tmp_path / "u", kind="byte_level", template=None)
    with pytest.raises(ValueError, match="the row has system but the tokenizer has no chat template"):
        tokenize_row(without, {"prompt": "Hello", "response": "Blue", "system": "a"})
    with pytest.raises(ValueError, match="the row has tools but the tokenizer has no chat template"):
        encode_prompt(without, read_prompt({"prompt": "Hello", "tools": [TOOL]}))


def test_tools_and_keys_that_the_template_prints_are_honoured(tmp_path) -> None:
    tokenizer = tokenizer_with(tmp_path, FULL)
    call = {"id": "c1", "function": {"name": "add", "arguments": {"a": 1}}}
    turns = [
        {**turn("user", "Hello"), "name": "bob"},
        {**turn("assistant", "calling"), "tool_calls": [call], "reasoning_content": "sum", "weight": 0},
        {**turn("tool", "4"), "tool_call_id": "c1"},
        {**turn("assistant", "Blue"), "reasoning_content": "why"},
    ]
    row = {"messages": turns, "tools": [TOOL], "documents": [{"title": "a"}]}
    assert learned(tokenizer, row) == "<think>why</think>Blue<|im_end|>"
    ids, mask = tokenize_row(tokenizer, row)
    prompt = {**row, "messages": turns[:3]}
    assert ids[: mask.index(True)] == encode_prompt(tokenizer, read_prompt(prompt))
    assert '"name": "add"' in tokenizer.decode(ids)
    turns[2]["tool_call_id"] = "c2"
    with pytest.raises(ValueError, match=r"messages\[2\]\.tool_call_id"):
        tokenize_row(tokenizer, row)
    with pytest.raises(ValueError, match=r"messages\[2\]\.tool_call_id"):
        encode_prompt(tokenizer, read_prompt(prompt))


@pytest.mark.parametrize(
    ("printed", "content"),
    [
        ("m.content.split('</think>')[-1]", "<think>why</think>Blue"),
        ("m.content[:4]", "Blue and red"),
        ("m.content.replace('  ', ' ')", "a  b"),
        ("m.content | upper", "Blue"),
    ],
)
@pytest.mark.parametrize("blocks", [("", ""), ("{% generation %}", "{% endgeneration %}")])
def test_a_template_that_cuts_or_changes_what_is_learned_is_refused(
    printed, content, blocks, tmp_path
) -> None:
    source = (
        f"{{% for m in messages %}}{HEADER}{{% if m.role == 'assistant' %}}{blocks[0]}{{{{ {printed} }}}}"
        f"<|im_end|>{blocks[1]}{{% else %}}{{{{ m.content }}}}<|im_end|>{{% endif %}}{{% endfor %}}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = tokenizer_with(tmp_path, source)
    row = {"prompt": "Hello", "response": content}
    if "</think>" in content and not blocks[0]:
        # A template of history cuts thoughts, and generation writes them.
        assert learned(tokenizer, row) == f"{content}<|im_end|>"
        return
    with pytest.raises(ValueError, match=r"^response: .*prints another text than the row has"):
        tokenize_row(tokenizer, row)


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_a_turn_that_the_template_leaves_out_is_refused(role, tmp_path) -> None:
    source = f"{{% for m in messages %}}{{% if m.content != 'lost' %}}{HEADER}{{{{ m.content }}}}<|im_end|>"
    source += "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    tokenizer = tokenizer_with(
        tmp_path, source.replace("m.content != 'lost'", f"not (m.role == '{role}' and loop.first)")
    )
    turns = [{**turn(role, "lost"), **({"weight": 0} if role == "assistant" else {})}, turn("user", "Hello")]
    with pytest.raises(ValueError, match=rf"messages\[0\]: .*does not print the text of this {role} turn"):
        tokenize_row(tokenizer, {"messages": [*turns, turn("assistant", "Blue")]})
    with pytest.raises(ValueError, match=rf"messages\[0\]: .*does not print the text of this {role} turn"):
        encode_prompt(tokenizer, read_prompt({"messages": turns}))


def test_a_system_text_printed_behind_the_first_question_is_not_lost(tmp_path) -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {% if loop.last or loop.index == 2 %}"
        "{{ m.content }}\n{{ messages[0].content }}{% endif %} [/INST]{% elif m.role == 'assistant' %}"
        "{{ m.content }}</s>{% elif m.role == 'tool' %}{{ m.content | tojson }}{% endif %}{% endfor %}"
    )
    tokenizer = tokenizer_with(tmp_path, source)
    turns = [
        turn("system", "Be brief."),
        turn("user", "Hello"),
        turn("tool", 'a "b"'),
        turn("assistant", "Blue"),
    ]
    assert learned(tokenizer, {"messages": turns}) == "Blue</s>"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "<think>\n{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}",
            r"does not start where generation does.*ends in '.*assistant\\n', the block starts behind "
            r"'.*assistant\\n<think>\\n'",
        ),
        (
            "{{ m.content[:1] }}{% generation %}{{ m.content[1:] }}<|im_end|>{% endgeneration %}",
            "does not start where generation does",
        ),
        (
            "{% generation %}{{ m.content }}{% endgeneration %}, {% generation %}x{% endgeneration %}",
            "does not start where generation does",
        ),
        ("{% generation %}{{ m.content }}{% endgeneration %} END<|im_end|>", "no end would be learned"),
    ],
)
@pytest.mark.parametrize("num_turns", [1, 2])
def test_a_generation_block_that_is_not_what_generation_is_asked_for_is_refused(
    body, message, num_turns, tmp_path
) -> None:
    source = (
        f"{{% for m in messages %}}{HEADER}"
        f"{{% if m.role == 'assistant' and loop.index == {2 * num_turns} %}}{body}"
        "{% elif m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = tokenizer_with(tmp_path, source)
    turns = [turn("user", "Hello"), turn("assistant", "Blue")] * 2
    with pytest.raises(ValueError, match=message):
        tokenize_row(tokenizer, {"messages": turns})


def test_a_generation_prompt_that_no_block_follows_is_refused(tmp_path) -> None:
    source = (
        template_path("generation")
        .read_text()
        .replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    )
    tokenizer = tokenizer_with(tmp_path, source)
    with pytest.raises(ValueError, match=r"given a text that ends in .*<think>.*, the block starts behind"):
        tokenize_row(tokenizer, {"prompt": "Hello", "response": "Blue"})


def test_a_turn_that_asks_to_be_learned_needs_a_block(tmp_path) -> None:
    source = (
        template_path("generation")
        .read_text()
        .replace("'assistant' %}{% gen", "'assistant' and loop.last %}{% gen")
    )
    tokenizer = tokenizer_with(tmp_path, source)
    turns = [turn("user", "Hello"), turn("assistant", "red"), turn("user", "Name"), turn("assistant", "Blue")]
    assert learned(tokenizer, {"messages": turns}) == "Blue<|im_end|>"
    turns[1] = {**turns[1], "weight": 1}
    with pytest.raises(ValueError, match=r"messages\[1\] says that it is learned"):
        tokenize_row(tokenizer, {"messages": turns})


def test_a_template_that_asks_the_clock_names_the_way_out() -> None:
    template = ChatTemplate("{{ strftime_now('%Y') }}", special_tokens={}, origin="t.jinja")
    with pytest.raises(ValueError, match=r"^t\.jinja asks for today's date.* set tokenizer\.date"):
        template.render([turn("user", "Hello")])
    other = ChatTemplate("{{ other_name() }}", special_tokens={}, origin="t.jinja")
    with pytest.raises(ValueError, match="'other_name' is undefined"):
        other.render([turn("user", "Hello")])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            r"\[0\]\.content\[0\]: .*only text",
        ),
        ({"messages": [{"role": "user", "content": []}]}, r"\[0\]\.content: expected text"),
        ({"messages": [{"content": "a"}]}, r"messages\[0\]\.role"),
        ({"messages": [turn("user", "a"), turn("assistant", "b")]}, "the last turn is the assistant's"),
        ({"prompt": ""}, "non-empty text"),
        ({"answer": "4"}, "expected either prompt or messages"),
    ],
)
def test_a_row_that_is_no_prompt_is_refused(row, message) -> None:
    with pytest.raises(ValueError, match=message):
        read_prompt(row)


@pytest.mark.parametrize("empty", ["", None])
def test_a_call_without_text_is_given_as_the_template_prints_it(empty, tmp_path) -> None:
    """DeepSeek's prints calls only where there is no content at all, and takes arguments as a text."""
    source = (
        f"{{% for m in messages %}}{HEADER}{{% if m.content is none %}}{{{{ m.tool_calls[0].function.name + "
        "':' + m.tool_calls[0].function.arguments }}{% else %}{{ m.content }}{% endif %}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    turns = [turn("user", "Hello"), {"role": "assistant", "content": empty, "tool_calls": [call]}]
    assert learned(tokenizer_with(tmp_path, source), {"messages": turns}) == 'add:{"a": 1}<|im_end|>'


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        ("{{ m.content }}", "one\ntwo"),
        (
            "{% if m.content is string %}{{ m.content }}{% else %}"
            "{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}",
            "onetwo",
        ),
    ],
)
def test_texts_of_a_list_are_joined_as_the_template_does_or_else_by_a_line_break(
    printed, expected, tmp_path
) -> None:
    source = (
        f"{{% for m in messages %}}{HEADER}{printed}<|im_end|>{{% endfor %}}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = tokenizer_with(tmp_path, source)
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    row = {"messages": [turn("user", parts), turn("assistant", parts)]}
    ids, _ = tokenize_row(tokenizer, row)
    assert tokenizer.decode(ids).count(expected) == 2
    assert learned(tokenizer, row) == f"{expected}<|im_end|>"
    assert tokenizer.decode(encode_prompt(tokenizer, [turn("user", parts)])).count(expected) == 1


def test_thoughts_are_given_under_the_key_that_the_template_reads(tmp_path) -> None:
    tokenizer = tokenizer_with(tmp_path, FULL)
    texts = {
        learned(tokenizer, {"messages": [turn("user", "Hello"), {**turn("assistant", "Blue"), key: "why"}]})
        for key in ("reasoning_content", "reasoning", "thinking")
    }
    assert texts == {"<think>why</think>Blue<|im_end|>"}


SWITCHED = (
    f"{{% for m in messages %}}{HEADER}{{{{ m.content }}}}<|im_end|>{{% endfor %}}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
).replace("{% for m", "{% if effort is defined %}{{ effort }}{% endif %}{% for m", 1)


def switched(tmp_path: Path, **settings: Any) -> Tokenizer:
    template = tmp_path / "switched.jinja"
    template.write_text(SWITCHED)
    path = write_byte_level(tmp_path / "t")
    return load_tokenizer(TokenizerSection(path=path, chat_template=template, **settings))


def test_switches_reach_the_template_and_a_row_has_its_own(tmp_path) -> None:
    plain = switched(tmp_path)
    tokenizer = switched(tmp_path, chat_template_kwargs={"effort": "high"})
    row = {"prompt": "Hello", "response": "Blue"}
    ids, mask = tokenize_row(tokenizer, row)
    assert tokenizer.decode(ids).startswith("high<|im_start|>")
    assert ids[: mask.index(True)] == encode_prompt(tokenizer, "Hello")
    own = {**row, "chat_template_kwargs": {"effort": "low", "other": None}}
    ids, _ = tokenize_row(tokenizer, own)
    assert tokenizer.decode(ids).startswith("low<|im_start|>")
    assert (ids, _) == tokenize_row(plain, {**row, "chat_template_kwargs": '{"effort": "low"}'})
    assert plain.fingerprint != tokenizer.fingerprint
    with pytest.raises(UserError, match=r"^tokenizer\.chat_template_kwargs\.think: .*it reads effort"):
        switched(tmp_path, chat_template_kwargs={"think": False})
    with pytest.raises(UserError, match=r"^tokenizer\.date: .*prints no date"):
        switched(tmp_path, date=datetime.date(2026, 1, 31))


def test_the_date_of_the_configuration_is_the_one_that_is_printed(tmp_path) -> None:
    source = "{{ strftime_now('%d %b %Y') }} or {% if strftime_now is defined %}x{% endif %}" + SWITCHED
    (tmp_path / "dated.jinja").write_text(source)
    path = write_byte_level(tmp_path / "t")
    section: dict[str, Any] = {"path": path, "chat_template": tmp_path / "dated.jinja"}
    dated = load_tokenizer(TokenizerSection(**section, date=datetime.date(2026, 1, 31)))
    assert dated.decode(encode_prompt(dated, "Hello")).startswith("31 Jan 2026 or x")
    undated = load_tokenizer(TokenizerSection(**section))
    assert any("tokenizer.date sets one" in note for note in undated.notes)
    assert not any("tokenizer.date" in note for note in dated.notes)


OPENED = (
    f"{{% for m in messages %}}{HEADER}"
    "{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


@pytest.mark.parametrize(
    ("answer", "thinking", "expected"),
    [
        ({"content": "<think>\nwhy\n</think>\n\nBlue"}, "keep", "why\n</think>\n\nBlue"),
        ({"content": "<think>why</think>Blue"}, "keep", "why</think>Blue"),
        ({"content": "why\n</think>\n\nBlue"}, "keep", "why\n</think>\n\nBlue"),
        ({"content": "Blue", "reasoning_content": "why"}, "keep", "why\n</think>\n\nBlue"),
        ({"content": "Blue"}, "keep", "Blue"),
        ({"content": "Blue"}, "cut", "\n</think>\n\nBlue"),
        ({"content": "<think>\nwhy\n</think>\n\nBlue"}, "cut", "\n</think>\n\nBlue"),
        ({"content": "Blue", "reasoning_content": "why"}, "cut", "\n</think>\n\nBlue"),
        ({"content": "<think>\nwhy and"}, "keep", "why and"),
        ({"content": "why\n</think>\n\nBlue"}, "cut", "\n</think>\n\nBlue"),
        ({"content": "The tag </think> closes."}, "keep", "The tag </think> closes."),
    ],
)
def test_behind_an_opened_thought_the_row_goes_on(answer, thinking, expected, tmp_path, caplog) -> None:
    tokenizer = tokenizer_with(tmp_path, OPENED)
    row = {"messages": [turn("user", "Hello"), {"role": "assistant", **answer}]}
    with caplog.at_level("WARNING"):
        ids, mask = tokenize_row(tokenizer, row, Learning(thinking=thinking))
    assert ids[: mask.index(True)] == encode_prompt(tokenizer, "Hello")
    assert tokenizer.decode(ids[mask.index(True) :]) == f"{expected}<|im_end|>"
    assert ("nothing closes" in caplog.text) == (expected == "Blue")


def test_earlier_thoughts_that_the_template_never_prints_are_each_learned_in_their_own_turn(tmp_path) -> None:
    tokenizer = tokenizer_with(tmp_path, OPENED)
    thoughts = [
        {**turn("assistant", "Blue"), "reasoning_content": "why"},
        turn("assistant", "<think>\nhow\n</think>\n\nred"),
        turn("assistant", "fine"),
    ]
    turns = [each for answer in thoughts for each in (turn("user", "Hello"), answer)]
    texts = [
        tokenizer.decode(ids[mask.index(True) :])
        for ids, mask in tokenize_sequences(tokenizer, {"messages": turns})
    ]
    assert texts == ["why\n</think>\n\nBlue<|im_end|>", "how\n</think>\n\nred<|im_end|>", "fine<|im_end|>"]


def test_what_is_lost_behind_an_opened_thought_is_refused(tmp_path) -> None:
    tokenizer = tokenizer_with(tmp_path, OPENED)
    named = {**turn("assistant", "Blue"), "name": "bob"}
    with pytest.raises(UserError, match=r"^messages\[1\]\.name: .*does not print it"):
        tokenize_row(tokenizer, {"messages": [turn("user", "Hello"), named]})
    upper = tokenizer_with(tmp_path, OPENED.replace("[-1] if", "[-1] | upper if"))
    with pytest.raises(UserError, match=r"^response: .*prints another text than the row has"):
        tokenize_row(upper, {"prompt": "Hello", "response": "Blue"})


def test_a_turn_behind_another_header_than_the_one_that_is_asked_is_refused(tmp_path) -> None:
    source = (
        "{% for m in messages %}{{ 'BOT' if m.role == 'assistant' else m.role }}: {{ m.content }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.raises(UserError, match=r"message 1 \(assistant\) is not printed where .*Three ways out"):
        tokenize_row(tokenizer_with(tmp_path, source), {"prompt": "Hello", "response": "Blue"})


def test_answers_whose_contexts_merge_into_other_tokens_get_sequences_of_their_own(tmp_path) -> None:
    source = "{% for m in messages %}<|im_start|>a colo{{ m.content }}<|im_end|>{% endfor %}"
    tokenizer = tokenizer_with(
        tmp_path, source + "{% if add_generation_prompt %}<|im_start|>a colo{% endif %}"
    )
    turns = [turn("user", "Hello"), turn("assistant", "ur"), turn("user", "Name"), turn("assistant", "ur")]
    sequences = tokenize_sequences(tokenizer, {"messages": turns})
    assert len(sequences) == 2
    for (ids, mask), asked in zip(sequences, (turns[:1], turns[:3]), strict=True):
        assert ids[: mask.index(True)] == encode_prompt(tokenizer, asked)
        assert mask[mask.index(True) :] == [True] * (len(mask) - mask.index(True))


@pytest.mark.parametrize(
    ("answer", "thinking", "message"),
    [
        (
            {"content": "<think>why</think>Blue", "reasoning_content": "x"},
            "keep",
            "in its text and in reasoning",
        ),
        ({"content": "Blue", "reasoning": "why", "thinking": "x"}, "keep", "in reasoning and in thinking"),
        ({"content": "<think>why</think>"}, "cut", "nothing is left of it"),
        ({"content": "<think>why"}, "cut", "nothing is left of it"),
    ],
)
def test_thoughts_that_would_be_lost_are_refused(answer, thinking, message, tmp_path) -> None:
    row = {"messages": [turn("user", "Hello"), {"role": "assistant", **answer}]}
    with pytest.raises(UserError, match=rf"^messages\[1\].*{message}"):
        tokenize_row(tokenizer_with(tmp_path, OPENED), row, Learning(thinking=thinking))


def test_an_answer_that_speaks_of_thoughts_is_not_cut(tmp_path) -> None:
    tokenizer = load_by_name(tmp_path / "t", kind="byte_level", template="chatml")
    for text in ("The tag </think> closes.", "so <think>a</think> it is"):
        ids, mask = tokenize_row(tokenizer, {"prompt": "Hello", "response": text}, Learning(thinking="cut"))
        assert tokenizer.decode(ids[mask.index(True) :]) == f"{text}<|im_end|>"


def test_a_prompt_with_earlier_thoughts_is_asked_as_it_is_trained(tmp_path) -> None:
    tokenizer = tokenizer_with(tmp_path, OPENED)
    turns = [
        turn("user", "Hello"),
        {**turn("assistant", "red"), "reasoning_content": "why"},
        turn("user", "Name"),
    ]
    *_, (ids, mask) = tokenize_sequences(tokenizer, {"messages": [*turns, turn("assistant", "Blue")]})
    assert ids[: mask.index(True)] == encode_prompt(tokenizer, turns)


def test_an_end_token_in_a_learned_text_is_refused(tmp_path) -> None:
    tokenizer = load_by_name(tmp_path / "t", kind="byte_level", template="chatml")
    for text in ("Blue<|im_end|>", "Blue</s> red"):
        with pytest.raises(UserError, match="a learned text holds an end token"):
            tokenize_row(tokenizer, {"prompt": "Hello", "response": text})


def test_every_turn_has_an_end_where_the_template_prints_none(tmp_path) -> None:
    tokenizer = load_by_name(tmp_path / "t", kind="byte_level", template="plain_text")
    turns = [turn("user", "Hello"), turn("assistant", "red"), turn("user", "Name"), turn("assistant", "Blue")]
    sequences = tokenize_sequences(tokenizer, {"messages": turns})
    assert len(sequences) == 2
    for (ids, mask), asked in zip(sequences, (turns[:1], turns[:3]), strict=True):
        assert ids[: mask.index(True)] == encode_prompt(tokenizer, asked)
        assert ids[-1] == tokenizer.eos_id
        assert all(mask[mask.index(True) :])


@pytest.mark.parametrize("arguments", ["not json", "5"])
def test_arguments_that_are_no_object_are_refused(arguments, tmp_path) -> None:
    call = {"function": {"name": "add", "arguments": arguments}}
    turns = [turn("user", "Hello"), {**turn("assistant", ""), "tool_calls": [call]}]
    with pytest.raises(UserError, match=r"^messages\[1\]\.tool_calls\[0\]\.arguments: expected an object"):
        tokenize_row(tokenizer_with(tmp_path, FULL), {"messages": turns})
