"""Rows to tokens and masks: golden files that a person has read, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_sftrl.config.schema import TokenizerSection
from megatron_sftrl.data.chat import encode_prompt, read_messages, tokenize_row
from megatron_sftrl.data.template import ChatTemplate
from megatron_sftrl.data.tokenizer import load_tokenizer
from tests.unit.data.tokenizers_for_tests import CHAT, load_by_name, reading, write_byte_level

CASES = json.loads((CHAT / "cases.json").read_text())


def turn(role: str, content: str) -> dict[str, str]:
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
    messages = read_messages(case["row"])
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


def test_a_template_that_prints_earlier_turns_differently_is_refused_and_not_guessed(tmp_path) -> None:
    tokenizer = load_by_name(tmp_path / "t", kind="byte_level", template="forgets_thoughts")
    turns = [turn("user", "Hello"), turn("assistant", "<think>red</think>fine")]
    assert tokenize_row(tokenizer, {"messages": turns})
    more = [*turns, turn("user", "Hello"), turn("assistant", "Blue")]
    with pytest.raises(ValueError, match=r"message 1 \(assistant\).*generation"):
        tokenize_row(tokenizer, {"messages": more})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Hello"}, "no response"),
        ({"response": "Hello"}, "no prompt"),
        ({"prompt": "Hello", "response": None}, "no response"),
        ({"prompt": "Hello", "response": " \n"}, "response is empty"),
        ({"prompt": "Hello", "response": 4}, "expected text, got int"),
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
