"""Loading tokenizers: facts about the vocabulary, fingerprints, and what is refused."""

from __future__ import annotations

import contextlib
import json
import shutil

import pytest

from megatron_sftrl.config.schema import TokenizerSection
from megatron_sftrl.data.tokenizer import check_vocabulary, load_tokenizer
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
