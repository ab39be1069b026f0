"""Raw SentencePiece models and tekken.json against mistral-common, whose own files these are.

A chat template writes control tokens and text into one string, mistral-common encodes each text by itself.
"""

from __future__ import annotations

import base64
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_sftrl.config.schema import TokenizerSection
from megatron_sftrl.data.chat import encode_prompt, tokenize_row
from megatron_sftrl.data.tokenizer import Tokenizer, load_tokenizer

mistral_common = pytest.importorskip("mistral_common", reason="mistral-common comes with vLLM")

FILES = Path(mistral_common.__file__).parent / "data"
FILE = {
    "v1": "tokenizer.model.v1",
    "v2": "mistral_instruct_tokenizer_240216.model.v2",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "v7": "mistral_instruct_tokenizer_241114.model.v7",
    "tekken": "tekken_240911.json",
}
TEXTS = [
    "hello",
    " a space in front",
    "  two",
    "\nnewline in front\n\n  indented",
    "\ttab",
    "\u00dcn\u00efc\u00f6de \u6f22\u5b57 \U0001f600",
    "(42 * 7) = ?",
    "a\u2581b",
    "\ue000x",
    "\r\nq",
    "<0x0A>",
]

# How a template has to write a turn so that its ids are mistral-common's: what stands in front of each text.
SPACED = {
    "v1": ("[INST] {} [/INST]", " {}</s>"),
    "v2": ("[INST] {}[/INST]", " {}</s>"),
    "v3": ("[INST] {}[/INST]", " {}</s>"),
    "v7": ("[INST] {}[/INST]", " {}</s>"),
    "tekken": ("[INST]{}[/INST]", "{}</s>"),
}
# The same without the spaces: SentencePiece invents them, except in front of a text that starts with one.
UNSPACED = {
    "v2": ("[INST]{}[/INST]", "{}</s>"),
    "v3": ("[INST]{}[/INST]", "{}</s>"),
    "v7": ("[INST]{}[/INST]", "{}</s>"),
}


def load(version: str, **options: Any) -> Tokenizer:
    return load_tokenizer(TokenizerSection(path=FILES / FILE[version], **options))


@pytest.fixture(scope="module", params=FILE)
def pair(request: pytest.FixtureRequest) -> tuple[str, Tokenizer, Any]:
    """A version, our tokenizer of its file, and mistral-common's."""
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    path = FILES / FILE[request.param]
    return request.param, load(request.param), MistralTokenizer.from_file(str(path)).instruct_tokenizer


def their_ids(instruct: Any, texts: tuple[str, ...]) -> list[int]:
    from mistral_common.protocol.instruct.messages import AssistantMessage, UserMessage
    from mistral_common.protocol.instruct.request import InstructRequest

    turns = [
        UserMessage(content=text) if i % 2 == 0 else AssistantMessage(content=text)
        for i, text in enumerate(texts)
    ]
    return instruct.encode_instruct(InstructRequest(messages=turns)).tokens


def written(form: tuple[str, str], texts: tuple[str, ...]) -> str:
    return "<s>" + "".join(form[i % 2].format(text) for i, text in enumerate(texts))


def test_a_conversation_has_mistral_commons_ids(pair: tuple[str, Tokenizer, Any]) -> None:
    version, ours, theirs = pair
    for first, second in itertools.product(TEXTS, repeat=2):
        for texts in [(first,), (first, second), (first, second, second, first)]:
            expected = their_ids(theirs, texts)
            assert ours.encode(written(SPACED[version], texts)) == expected, texts
            is_safe = not any(text.startswith(" ") for text in texts)
            if version in UNSPACED and is_safe:
                assert ours.encode(written(UNSPACED[version], texts)) == expected, texts


# What differs from mistral-common, and why: (versions, form of the template, texts, texts with the same ids).
DIFFERENCES = [
    # A space that is written behind a control token counts as the one that SentencePiece invents.
    ("v2 v3 v7", UNSPACED, (" a space in front",), ("a space in front",)),
    # mistral-common strips the end of an assistant's text, a row's text is learned as it is.
    ("v2 v3 v7", SPACED, ("hello", "trailing  "), None),
    # A control token that a user writes is one, as with every Hugging Face tokenizer.
    ("v1 v2 v3 v7 tekken", SPACED, ("a </s> b",), None),
]


@pytest.mark.parametrize(
    ("pair", "forms", "texts", "same_as"),
    [(version, *rest) for versions, *rest in DIFFERENCES for version in versions.split()],
    indirect=["pair"],
)
def test_what_differs_from_mistral_common(
    pair: tuple[str, Tokenizer, Any],
    forms: dict[str, tuple[str, str]],
    texts: tuple[str, ...],
    same_as: tuple[str, ...] | None,
) -> None:
    version, ours, theirs = pair
    ids = ours.encode(written(forms[version], texts))
    assert ids != their_ids(theirs, texts)
    assert same_as is None or ids == their_ids(theirs, same_as)


# The same model as transformers converts it: (text, its ids equal ours with legacy true, with legacy false).
TRANSFORMERS = [
    ("hello", True, True),
    ("<s>[INST] hello[/INST] Hi</s>[INST] more[/INST]", True, True),
    ("<s>[INST]hello[/INST]Hi</s>[INST]more[/INST]", True, False),
    ("<s>hello", True, False),
    ("a</s>\nb", True, False),
    (" a space in front of the whole text, which transformers drops", False, False),
]


@pytest.mark.parametrize("legacy", [True, False])
def test_a_raw_model_has_the_ids_of_transformers_legacy_tokenizer(legacy: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    shutil.copy(FILES / FILE["v3"], tmp_path / "tokenizer.model")
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": legacy,
        **{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        "additional_special_tokens": ["[INST]", "[/INST]"],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    ours = load_tokenizer(TokenizerSection(path=tmp_path / "tokenizer.model"))
    for text, *expected in TRANSFORMERS:
        same = ours.encode(text) == theirs.encode(text, add_special_tokens=False)
        assert same == expected[0 if legacy else 1], text


def test_the_facts_of_the_vocabulary_are_those_of_the_file(pair: tuple[str, Tokenizer, Any]) -> None:
    _, ours, theirs = pair
    raw = theirs.tokenizer
    assert (ours.vocab_size, ours.bos_id, ours.eos_id) == (raw.n_words, raw.bos_id, raw.eos_id)
    assert ours.special_ids == raw.special_ids - {raw.unk_id}
    assert ours.pad_id == (raw.pad_id if raw.pad_id >= 0 else raw.eos_id)


@pytest.mark.parametrize("pair", ["v3", "tekken"], indirect=True)
def test_a_row_through_a_template_learns_the_answer_behind_mistral_commons_prompt(
    pair: tuple[str, Tokenizer, Any], tmp_path: Path
) -> None:
    version, _, theirs = pair
    template = tmp_path / "inst.jinja"
    template.write_text(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
        "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    tokenizer = load(version, chat_template=template)
    ids, mask = tokenize_row(tokenizer, {"prompt": "6 * 7?", "response": "42"})
    assert ids == their_ids(theirs, ("6 * 7?", "42"))
    prompt = ids[: mask.index(True)]
    assert prompt == encode_prompt(tokenizer, "6 * 7?") == their_ids(theirs, ("6 * 7?",))


# A tekken file small enough to look at: the bytes, a few merges, and the control tokens of version 7.

MERGES = (b"th", b"the", b" the")


def write_tekken(directory: Path, *, special: int = 24, **config: Any) -> Path:
    """A tekken.json of 256 bytes, MERGES and `special` control tokens, 20 of them named by mistral-common."""
    directory.mkdir(parents=True, exist_ok=True)
    pieces = [bytes([i]) for i in range(256)] + list(MERGES)
    vocabulary = [
        {"rank": i, "token_bytes": base64.b64encode(piece).decode(), "token_str": None}
        for i, piece in enumerate(pieces)
    ]
    settings = {
        "pattern": r" ?\p{L}+|\p{N}|[^\p{L}\p{N}]",
        "num_vocab_tokens": len(pieces),
        "default_vocab_size": len(pieces) + special,
        "default_num_special_tokens": special,
        "version": "v7",
    }
    content = {"vocab": vocabulary, "special_tokens": None, "config": {**settings, **config}}
    path = directory / "tekken.json"
    path.write_text(json.dumps({**content, "version": 1, "type": "Tekken"}))
    return path


def test_a_tekken_file_and_its_directory_are_read(tmp_path: Path) -> None:
    file = write_tekken(tmp_path)
    assert file.name == "tekken.json"
    for path in (file, tmp_path):
        tokenizer = load_tokenizer(TokenizerSection(path=path))
        assert tokenizer.vocab_size == 24 + 256 + len(MERGES)
        text = "<s>[INST]the the\u00e9[/INST]the</s><SPECIAL_23>"
        ids = tokenizer.encode(text)
        assert ids == [1, 3, 281, 282, 24 + 0xC3, 24 + 0xA9, 4, 281, 2, 23]
        assert tokenizer.encode_continuation(text) == ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([*ids, tokenizer.vocab_size]) == text
        assert tokenizer.chat_template is None
        assert tokenizer.notes == ()


def test_the_fingerprint_of_a_tekken_file_follows_its_content(tmp_path: Path) -> None:
    paths = [
        write_tekken(tmp_path / "a"),
        write_tekken(tmp_path / "b"),
        write_tekken(tmp_path / "c", special=25),
    ]
    one, two, other = [load_tokenizer(TokenizerSection(path=path)).fingerprint for path in paths]
    assert one == two != other


def test_a_template_beside_a_tekken_file_is_its_template(tmp_path: Path) -> None:
    write_tekken(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}")
    template = load_tokenizer(TokenizerSection(path=tmp_path)).chat_template
    assert template is not None
    assert template.render([{"role": "user", "content": "a"}]) == "<s>a</s>"


def test_a_damaged_tekken_file_is_refused_by_name(tmp_path: Path) -> None:
    path = write_tekken(tmp_path, version="v0")
    with pytest.raises(
        ValueError, match=r"mistral-common cannot read .*tekken\.json: ValueError: Unknown ver"
    ):
        load_tokenizer(TokenizerSection(path=path))
    path.write_text("{")
    with pytest.raises(ValueError, match=r"mistral-common cannot read .*tekken\.json: JSONDecodeError"):
        load_tokenizer(TokenizerSection(path=path))
