"""Loading tokenizers: facts about the vocabulary, fingerprints, and what is refused."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers

from megatron_sftrl.config.schema import TokenizerSection
from megatron_sftrl.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from megatron_sftrl.data.tokenizer_backends import PROBES
from megatron_sftrl.errors import UserError
from tests.unit.data.tokenizers_for_tests import SENTENCEPIECE_MODEL, template_path, write_byte_level


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(tmp_path) -> None:
    tokenizer = load_tokenizer(TokenizerSection(path=write_byte_level(tmp_path)))
    check_vocabulary(tokenizer, tokenizer.vocab_size)
    with pytest.raises(ValueError, match=f"at least {tokenizer.vocab_size}.*got {tokenizer.vocab_size - 1}"):
        check_vocabulary(tokenizer, tokenizer.vocab_size - 1)


def test_the_vocabulary_size_covers_an_added_token_with_a_high_id(tmp_path) -> None:
    path = write_byte_level(tmp_path)
    rules = json.loads((path / "tokenizer.json").read_text())
    token = {**rules["added_tokens"][0], "content": "<|far|>", "id": 500}
    rules["added_tokens"].append(token)
    rules["model"]["vocab"]["<|far|>"] = 500
    (path / "tokenizer.json").write_text(json.dumps(rules))
    tokenizer = load_tokenizer(TokenizerSection(path=path))
    assert tokenizer.vocab_size == 501
    assert tokenizer.encode("<|far|>") == [500]


def test_the_first_token_is_used_only_when_the_tokenizer_puts_it_there(tmp_path) -> None:
    assert load_tokenizer(TokenizerSection(path=write_byte_level(tmp_path / "a"))).bos_id is None
    with_bos = load_tokenizer(TokenizerSection(path=write_byte_level(tmp_path / "b", adds_bos=True)))
    assert with_bos.decode([with_bos.bos_id or 0]) == "<s>"
    assert "<s>" not in with_bos.decode(with_bos.encode("Hello"))


def test_text_survives_a_round_trip_through_ids(tmp_path) -> None:
    hugging_face = load_tokenizer(TokenizerSection(path=write_byte_level(tmp_path)))
    for text in ("Hello  there\n\n", " é漢\U0001f600", "<|im_end|>\nuser"):
        assert hugging_face.decode(hugging_face.encode(text)) == text
    sentencepiece = load_tokenizer(TokenizerSection(path=SENTENCEPIECE_MODEL))
    for text in ("Hello there", "<s>the answer</s>the answer", "</s></s>"):
        assert sentencepiece.decode(sentencepiece.encode(text)) == text


def test_an_id_that_no_token_has_is_decoded_to_nothing(tmp_path) -> None:
    for path in (write_byte_level(tmp_path), SENTENCEPIECE_MODEL):
        tokenizer = load_tokenizer(TokenizerSection(path=path))
        ids = tokenizer.encode("the answer")
        beyond = [tokenizer.vocab_size, tokenizer.vocab_size + 1000, 2**40, -1]
        assert tokenizer.decode([*ids[:1], *beyond, *ids[1:]]) == tokenizer.decode(ids)


def test_a_sentencepiece_continuation_keeps_an_unknown_first_character() -> None:
    tokenizer = load_tokenizer(TokenizerSection(path=SENTENCEPIECE_MODEL))
    unknown = tokenizer.encode("[")[-1]
    assert tokenizer.encode_continuation("[the") == [unknown, *tokenizer.encode_continuation("the")]
    assert tokenizer.encode(" the")[-1:] == tokenizer.encode_continuation(" the")[-1:]


def test_the_fingerprint_follows_vocabulary_rules_and_template(tmp_path) -> None:
    def fingerprint(**options) -> str:
        return load_tokenizer(TokenizerSection(**options)).fingerprint

    plain = write_byte_level(tmp_path / "a")
    copy = tmp_path / "b"
    shutil.copytree(plain, copy)
    assert fingerprint(path=plain) == fingerprint(path=copy)
    other = [
        fingerprint(path=write_byte_level(tmp_path / "c", template="chatml")),
        fingerprint(path=plain, chat_template=template_path("llama3")),
        fingerprint(path=SENTENCEPIECE_MODEL),
        fingerprint(path=write_byte_level(tmp_path / "d", adds_bos=True)),
    ]
    assert len({fingerprint(path=plain), *other}) == 5


def test_a_path_that_is_no_tokenizer_is_refused(tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.model").write_text("not a model")
    (tmp_path / "tokenizer.json").write_text("{}")
    for name, message in [
        ("nowhere", "does not exist"),
        ("empty", "tokenizer"),
        ("text.model", "not a SentencePiece model"),
        ("tokenizer.json", "give the directory"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_tokenizer(TokenizerSection(path=tmp_path / name))


@pytest.mark.parametrize("name", ["tokenizer.model.v3", "spiece.model", "sentencepiece.bpe.model", "m_tok"])
def test_a_sentencepiece_model_is_known_by_its_content(name: str, tmp_path) -> None:
    shutil.copy(SENTENCEPIECE_MODEL, tmp_path / name)
    (tmp_path / "notes.txt").write_text("\n\n\nnot a model")
    (tmp_path / "config.json").write_text("{}")
    expected = load(SENTENCEPIECE_MODEL)
    for path in (tmp_path / name, tmp_path):
        tokenizer = load(path)
        assert tokenizer.encode("<s>the answer") == expected.encode("<s>the answer")
        assert tokenizer.fingerprint == expected.fingerprint
    assert expected.chat_template is None
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    template = load(tmp_path).chat_template
    assert template is not None
    assert template.render([{"role": "user", "content": "a"}]) == "a"


def test_two_sentencepiece_models_in_a_directory_are_refused_by_name(tmp_path) -> None:
    for name in ("tokenizer.model", "tokenizer.model.v3"):
        shutil.copy(SENTENCEPIECE_MODEL, tmp_path / name)
    with pytest.raises(
        ValueError, match=r"2 SentencePiece models \(tokenizer\.model, tokenizer\.model\.v3\)"
    ):
        load(tmp_path)
    write_byte_level(tmp_path)
    assert load(tmp_path).vocab_size == load(write_byte_level(tmp_path / "t")).vocab_size


def test_text_behind_a_control_token_has_one_space_in_front_written_or_not() -> None:
    tokenizer = load(SENTENCEPIECE_MODEL)
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    red = tokenizer.encode("red")
    assert tokenizer.decode(red[:1]) == "", "the space has to be a token of its own"
    for text in ("<s>red</s>red", "<s> red</s> red"):
        ids = tokenizer.encode(text)
        assert ids == [bos, *red, eos, *red]
        assert tokenizer.decode(ids) == "<s>red</s>red"
    assert tokenizer.encode_continuation("red", behind=eos) == red
    assert tokenizer.encode_continuation("red", behind=red[-1]) == red[1:]
    assert tokenizer.encode_continuation("red</s>red") == [*red[1:], eos, *red]


def test_a_tekken_file_without_mistral_common_is_refused_with_the_extra(tmp_path, monkeypatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "mistral_common"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mistral_common", None)
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(ValueError, match=r"needs the package mistral-common.*megatron-sftrl\[mistral\]"):
        load(tmp_path)


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path) -> None:
    path = write_byte_level(tmp_path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no end token"):
        load_tokenizer(TokenizerSection(path=path))


def test_code_beside_a_tokenizer_is_not_executed(tmp_path) -> None:
    path = write_byte_level(tmp_path / "t")
    witness = tmp_path / "executed"
    (path / "evil.py").write_text(f"open({str(witness)!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((path / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    config["tokenizer_class"] = "Evil"
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    with contextlib.suppress(ValueError):
        load_tokenizer(TokenizerSection(path=path))
    assert not witness.exists()


def test_truncation_and_padding_that_a_tokenizer_file_carries_are_not_applied(tmp_path) -> None:
    path = write_byte_level(tmp_path / "t")
    expected = load_tokenizer(TokenizerSection(path=path)).encode("Hello there, how are you?")
    rules = json.loads((path / "tokenizer.json").read_text())
    rules["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    rules["padding"] = {
        "strategy": {"Fixed": 50},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<unk>",
    }
    (path / "tokenizer.json").write_text(json.dumps(rules))
    assert load_tokenizer(TokenizerSection(path=path)).encode("Hello there, how are you?") == expected


def change_config(directory: Path, **changes: object) -> Path:
    """Keys of tokenizer_config.json set; None removes one."""
    file = directory / "tokenizer_config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return directory


def change_rules(directory: Path, **changes: object) -> Path:
    """Sections of tokenizer.json replaced."""
    file = directory / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return directory


def load(path: Path) -> Tokenizer:
    return load_tokenizer(TokenizerSection(path=path))


@pytest.mark.parametrize("model_type", [None, "llama", "qwen2", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("name", ["LlamaTokenizerFast", "Qwen2Tokenizer", "GemmaTokenizer", "T5Tokenizer"])
def test_the_ids_are_those_of_tokenizer_json_whatever_class_is_named(tmp_path, name, model_type) -> None:
    path = change_config(write_byte_level(tmp_path), tokenizer_class=name)
    if model_type is not None:
        (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    tokenizer, own = load(path), tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    for text in (*PROBES.values(), "<|im_start|>user\njq <s> zx<|im_end|>"):
        assert tokenizer.encode(text) == own.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.notes == ()


def test_special_tokens_that_only_the_class_knows_are_kept(tmp_path) -> None:
    path = write_byte_level(tmp_path, template="inst")
    change_config(path, tokenizer_class="LlamaTokenizerFast", bos_token=None, eos_token=None, unk_token=None)
    tokenizer = load(path)
    assert tokenizer.decode([tokenizer.eos_id]) == "</s>"
    assert tokenizer.chat_template is not None
    rendered = tokenizer.chat_template.render([{"role": "user", "content": "a"}])
    assert rendered == "<s>[INST] a [/INST]"


def test_control_tokens_in_a_template_stay_tokens_when_a_file_asks_to_split_them(tmp_path) -> None:
    path = change_config(write_byte_level(tmp_path), split_special_tokens=True)
    assert len(load(path).encode("<|im_end|>")) == 1


def test_a_token_that_two_files_number_differently_is_refused(tmp_path) -> None:
    token = {"content": "<|far|>", "special": True, "lstrip": False, "rstrip": False}
    path = change_config(write_byte_level(tmp_path / "a"), added_tokens_decoder={"500": token})
    with pytest.raises(ValueError, match=r"<\|far\|>' the id 500, but with its tokenizer.json it has 377"):
        load(path)
    path = change_config(write_byte_level(tmp_path / "b"), added_tokens_decoder={"377": token})
    assert load(path).encode("a<|far|>")[-1] == 377


def test_a_first_token_that_two_files_disagree_about_is_said(tmp_path) -> None:
    path = change_config(write_byte_level(tmp_path), add_bos_token=True)
    (note,) = load(path).notes
    assert "add_bos_token: true, but tokenizer.json puts nothing in front" in note


def test_a_tokenizer_that_does_not_give_a_text_back_is_refused_with_the_text(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"single spaces.*'jq zx' becomes tokens that read 'j q .* z x'"):
        load(change_rules(write_byte_level(tmp_path / "a"), decoder=None))
    with pytest.raises(ValueError, match=r"single spaces.*'jq zx' becomes tokens that read 'jqzx'"):
        load(
            change_rules(
                write_byte_level(tmp_path / "b"),
                normalizer=None,
                pre_tokenizer={
                    "type": "Split",
                    "pattern": {"String": " "},
                    "behavior": "Removed",
                    "invert": False,
                },
            )
        )


def test_what_the_normalizer_rewrites_is_said(tmp_path) -> None:
    (note,) = load(change_rules(write_byte_level(tmp_path), normalizer={"type": "Lowercase"})).notes
    assert "'JQzx' as 'jqzx'" in note


def test_characters_without_any_token_are_said_and_refused_where_they_stand(tmp_path) -> None:
    path = write_byte_level(tmp_path)
    rules = json.loads((path / "tokenizer.json").read_text())
    letters = {letter: i for i, letter in enumerate("jqzx ")}
    model = {**rules["model"], "vocab": letters, "merges": [], "unk_token": None}
    end = {**rules["added_tokens"][0], "content": "</s>", "id": len(letters), "special": True}
    change_rules(path, model=model, added_tokens=[end], pre_tokenizer=None, decoder={"type": "Fuse"})
    tokenizer = load(change_config(path, bos_token=None, unk_token=None))
    assert "no token for: newlines, tabs, digits" in tokenizer.notes[0]
    assert tokenizer.decode(tokenizer.encode("jq zx</s>")) == "jq zx</s>"
    with pytest.raises(ValueError, match=r"'jq 7' would be learned as 'jq '"):
        tokenizer.encode("jq 7")


def test_characters_that_a_sentencepiece_model_does_not_know_are_said() -> None:
    (note,) = load(SENTENCEPIECE_MODEL).notes
    assert "only the unknown token for: " in note
    assert "Greek" in note


def test_a_generic_class_has_no_defaults_and_the_import_of_autotokenizer_is_spared(tmp_path) -> None:
    path = change_config(write_byte_level(tmp_path), bos_token=None)
    look = (
        "import sys; from megatron_sftrl.config.schema import TokenizerSection;"
        "from megatron_sftrl.data.tokenizer import load_tokenizer;"
        f"load_tokenizer(TokenizerSection(path={str(path)!r}));"
        "print('transformers.models.auto.tokenization_auto' in sys.modules)"
    )
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", look], capture_output=True, text=True, timeout=300
    )
    assert ended.stdout.splitlines() == ["False"], ended.stderr


def test_a_tokenizer_that_is_a_program_is_refused_with_what_to_do(tmp_path: Path) -> None:
    """Kimi K2's and Moonlight's: tiktoken's ranks and a file of Python."""
    config = {
        "tokenizer_class": "TikTokenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "tiktoken.model").write_text("YQ== 0\n")
    with pytest.raises(UserError, match="a program of its own, which is never run; add a tokenizer"):
        load_tokenizer(TokenizerSection(path=str(tmp_path)))
