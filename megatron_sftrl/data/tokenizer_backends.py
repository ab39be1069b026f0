"""The libraries behind `Tokenizer`: Hugging Face directories, SentencePiece models, tekken.json."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from megatron_sftrl.errors import UserError, error_of


class TokenizerBackend(Protocol):
    """What a library must offer to stand behind a `Tokenizer`; unknown_ids stand for text without a token."""

    unknown_ids: frozenset[int]

    def encode(self, text: str) -> list[int]:
        """Ids of `text` at the start of a sequence, special tokens in the text recognised, none added."""
        ...

    def encode_continuation(self, text: str, *, behind: int | None = None) -> list[int]:
        """Ids of `text` in the middle of a sequence, behind the id `behind` where that is known.

        No invented space in front, unless the vocabulary has one behind each control token.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens included, without any cleaning up."""
        ...

    def normalize(self, text: str) -> str:
        """`text` as the tokenizer's normalizer leaves it."""
        ...

    def identity(self) -> str:
        """Text that changes whenever the same input could give other ids."""
        ...


# Whether a tokenizer gives a text back: the first thing to know about files that a library put together.

PROBES = {
    "single spaces": "jq zx",
    "runs of spaces": "jq  zx   jq",
    "a space in front": " jq",
    "a space at the end": "jq ",
    "newlines": "jq\n\nzx\n",
    "tabs": "jq\tzx",
    "digits": "0123456789",
    "upper case": "JQzx",
    "punctuation": "jq , (zx) ! it's 'jq' . zx ?",
    "accents": "\u00c7a va \u00e9t\u00e9",
    "Greek": "\u0395\u03bb\u03bb\u03b7\u03bd\u03b9\u03ba\u03ac",
    "Cyrillic": "\u041f\u0440\u0438\u0432\u0435\u0442",
    "Hebrew": "\u05e9\u05dc\u05d5\u05dd",
    "Arabic": "\u0645\u0631\u062d\u0628\u0627",
    "Devanagari": "\u0928\u092e\u0938\u094d\u0924\u0947",
    "Thai": "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "Chinese": "\u4f60\u597d",
    "Japanese": "\u3053\u3093\u306b\u3061\u306f",
    "Korean": "\uc548\ub155",
    "rare characters": "\ue000\U00010348",
}
"""Texts in Unicode's composed form, each with a name for what it tries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundTrip:
    """What becomes of a text that a tokenizer reads and writes.

    Args:
        drops_text: some characters have no token, not even an unknown one: texts are compared with tokens.
        notes: what is lost or changed, for people; empty when every text comes back as it was.
    """

    drops_text: bool
    notes: tuple[str, ...]


def examine(
    encode: Callable[[str], list[int]],
    decode: Callable[[Sequence[int]], str],
    *,
    normalize: Callable[[str], str],
    unknown_ids: frozenset[int],
    origin: str,
) -> RoundTrip:
    """Read and write the probes.

    A vocabulary may say that it does not know a character, and a normalizer may rewrite a text (lower case,
    one space for many): both are the tokenizer's own and are noted. Anything else that does not come back is
    a tokenizer whose parts do not belong together. `encode` adds nothing, `decode` removes nothing.

    Raises:
        UserError: a text comes back as another one.
    """
    unknown, dropped, changed = [], [], []
    for name, text in PROBES.items():
        ids = encode(text)
        back = decode(ids)
        if back == text:
            continue
        vanishing = {character for character in text if not encode(character)}
        if unknown_ids & set(ids):
            unknown.append(name)
        elif back.strip() == normalize(text).strip():
            changed.append(f"{text!r} as {back!r}")
        elif back == "".join(c for c in text if c not in vanishing) and not (back and " " in vanishing):
            dropped.append(name)
        else:
            raise UserError(
                f"tokenizer.path: {origin} does not give a text back ({name}): {text!r} becomes tokens that "
                f"read {back!r}; its files do not fit each other (a decoder or pre-tokenizer that belongs to "
                "another vocabulary, say): use those that the model was published with"
            )
    notes = []
    if unknown:
        notes.append(f"the vocabulary of {origin} has only the unknown token for: {', '.join(unknown)}")
    if dropped:
        notes.append(
            f"the vocabulary of {origin} has no token for: {', '.join(dropped)}; rows with it are refused"
        )
    if changed:
        notes.append(f"the normalizer of {origin} rewrites text, it reads {'; '.join(changed)}")
    return RoundTrip(drops_text=bool(dropped), notes=tuple(notes))


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedTokenizer:
    """A backend and what its files say about the vocabulary; the fields are those of `Tokenizer`."""

    backend: TokenizerBackend
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    special_ids: frozenset[int]
    special_tokens: Mapping[str, str]
    template_source: str | None
    notes: tuple[str, ...] = ()


def load_hugging_face(path: Path) -> LoadedTokenizer:
    """Read a tokenizer directory without the network and without executing code from it.

    With a tokenizer.json the ids are the ones that this file itself gives: transformers' AutoTokenizer
    builds another tokenizer out of its vocabulary where `tokenizer_class` names one. `bos_id` is set only
    when the tokenizer itself puts it in front of a text.

    Raises:
        UserError: the directory is not a tokenizer, or its files contradict each other.
    """
    notes: list[str] = []
    tokenizer: Any
    if (path / "tokenizer.json").is_file():
        tokenizer = _read_tokenizer_json(path, notes)
    else:
        tokenizer = _auto_tokenizer(path)
    # transformers 5 answers a directory without tokenizer files with an empty tokenizer.
    ids = list(tokenizer.get_vocab().values())
    if not ids:
        raise UserError(
            f"tokenizer.path: {path} holds no vocabulary; expected tokenizer.json (or the files of a slow "
            "tokenizer) in it"
        )
    opening = tokenizer.encode("a", add_special_tokens=True)[:1]
    wants_bos = tokenizer.bos_token_id is not None and opening == [tokenizer.bos_token_id]
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    # The unknown token is listed among the special ones, but it ends nothing.
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return LoadedTokenizer(
        backend=_HuggingFaceBackend(tokenizer),
        vocab_size=max(ids) + 1,
        bos_id=tokenizer.bos_token_id if wants_bos else None,
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        special_ids=frozenset((added | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id}),
        special_tokens={name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        template_source=template,
        notes=tuple(notes),
    )


def class_defaults(
    path: Path, config: Mapping[str, object], named: Collection[str], vocabulary: Mapping[str, int]
) -> dict[str, str]:
    """Special tokens by name that no file names and transformers takes from the class of the tokenizer.

    What the files name, also as null, is left alone. A default that the vocabulary does not know belongs to
    another tokenizer.
    """
    # AutoTokenizer, a second of imports, is not asked where no config.json can name another class than this.
    is_generic = config.get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast")
    if is_generic and not (path / "config.json").exists():
        return {}
    missing = [name for name in ("bos_token", "eos_token", "unk_token", "pad_token") if name not in named]
    if "bos_token" not in missing and "eos_token" not in missing:
        return {}
    try:
        own_class = _auto_tokenizer(path)
    except UserError:
        return {}
    tokens = {name: getattr(own_class, name) for name in missing}
    return {name: str(token) for name, token in tokens.items() if token and str(token) in vocabulary}


def _auto_tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        reason: object = error
        if "trust_remote_code" in str(error):
            reason = "it is a program of its own, which is never run; add a tokenizer.json of its vocabulary"
        raise error_of(
            f"tokenizer.path: {path} cannot be loaded as a Hugging Face tokenizer: {reason}", error
        ) from error


def _read_tokenizer_json(path: Path, notes: list[str]) -> Any:
    """transformers' wrapper around tokenizer.json as it is, with the names and tokens of its other files."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    try:
        own = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(str(path), local_files_only=True)
    except Exception as error:
        raise error_of(
            f"tokenizer.path: {path} cannot be loaded as a Hugging Face tokenizer: {error}", error
        ) from error
    config = _optional_object(path / "tokenizer_config.json")
    named = {*config, *(name for name, token in tokenizer.special_tokens_map.items() if token)}
    for name, token in class_defaults(path, config, named, tokenizer.get_vocab()).items():
        setattr(tokenizer, name, token)
    # A chat template writes its special tokens out. transformers sets the second from the first in each call.
    tokenizer.split_special_tokens = False
    tokenizer.backend_tokenizer.encode_special_tokens = False
    added = [f"jq {token.content} zx" for token in own.get_added_tokens_decoder().values()]
    for text in (*PROBES.values(), *added):
        expected = own.encode(text, add_special_tokens=False).ids
        found = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        if expected != found:
            raise UserError(
                f"tokenizer.path: {path}: the other files change what tokenizer.json makes of {text!r}: "
                f"expected {expected}, got {found}; write the tokens that tokenizer_config.json adds into "
                "tokenizer.json, or remove them"
            )
    _check_added_tokens(path, config, tokenizer)
    puts_bos = tokenizer.encode("a", add_special_tokens=True)[:1] == [tokenizer.bos_token_id]
    if isinstance(asked := config.get("add_bos_token"), bool) and asked != puts_bos and tokenizer.bos_token:
        notes.append(
            f"{path}: tokenizer_config.json says add_bos_token: {str(asked).lower()}, but tokenizer.json "
            f"puts {tokenizer.bos_token if puts_bos else 'nothing'} in front of a text; rows without a chat "
            "template follow tokenizer.json, as transformers 5 does"
        )
    return tokenizer


def _check_added_tokens(path: Path, config: Mapping[str, object], tokenizer: Any) -> None:
    """A token that a file gives an id has that id: transformers appends it under the next free one."""
    wanted: dict[str, object] = {}
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        for i, token in decoder.items():
            content = token.get("content") if isinstance(token, dict) else token
            wanted[str(content)] = int(i)
    wanted = _optional_object(path / "added_tokens.json") | wanted
    vocabulary = tokenizer.get_vocab()
    for content, i in wanted.items():
        if vocabulary.get(content) != i:
            raise UserError(
                f"tokenizer.path: {path} gives the token {content!r} the id {i}, but with its tokenizer.json "
                f"it has {vocabulary.get(content)}; add it to the added_tokens of tokenizer.json under the "
                "id that the model was trained with"
            )


def _optional_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file that need not be there."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"tokenizer.path: {path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"tokenizer.path: {path}: expected a JSON object, got {type(values).__name__}")
    return values


def load_sentencepiece(path: Path) -> LoadedTokenizer:
    """Read a raw SentencePiece model; a chat template comes from a chat_template.jinja beside it only.

    The file does not say whether its model was trained with a first token; as Llama, Mistral and Gemma all
    were, one that the vocabulary defines is used.

    Raises:
        UserError: the file is not a SentencePiece model.
    """
    import sentencepiece

    data = path.read_bytes()
    try:
        processor = sentencepiece.SentencePieceProcessor()
        processor.LoadFromSerializedProto(data)
    except (RuntimeError, OSError) as error:
        raise error_of(f"tokenizer.path: {path} is not a SentencePiece model: {error}", error) from error
    backend = _SentencePieceBackend(processor, hashlib.sha256(data).hexdigest())
    named = {f"{name}_token": getattr(processor, f"{name}_id")() for name in ("bos", "eos", "pad")}
    defined = {name: i for name, i in named.items() if i >= 0}
    return LoadedTokenizer(
        backend=backend,
        vocab_size=processor.get_piece_size(),
        bos_id=defined.get("bos_token"),
        eos_id=defined.get("eos_token"),
        pad_id=defined.get("pad_token"),
        special_ids=frozenset(i for i in range(processor.get_piece_size()) if processor.IsControl(i)),
        special_tokens={name: processor.id_to_piece(i) for name, i in defined.items()},
        template_source=None,
    )


def load_tekken(path: Path) -> LoadedTokenizer:
    """Read Mistral's tekken.json by the package mistral-common, whose ids these are.

    Raises:
        UserError: the package is not installed, or the file is not one that it reads.
    """
    try:
        from mistral_common.tokens.tokenizers.tekken import Tekkenizer
    except ModuleNotFoundError as error:
        raise UserError(
            f"tokenizer.path: {path} needs the package mistral-common, and {error.name} is not installed: "
            "pip install 'megatron-sftrl[mistral]', or give a directory with a tokenizer.json"
        ) from error
    try:
        tekken = Tekkenizer.from_file(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except Exception as error:  # it asserts, and looks keys up
        reason = f"{type(error).__name__}: {error}"
        raise error_of(f"tokenizer.path: mistral-common cannot read {path}: {reason}", error) from error
    backend = _TekkenBackend(tekken, digest)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    defined = {name: text for name, text in names.items() if text in backend.control}
    ids = {name: backend.control[text] for name, text in defined.items()}
    return LoadedTokenizer(
        backend=backend,
        vocab_size=tekken.n_words,
        bos_id=ids.get("bos_token"),
        eos_id=ids.get("eos_token"),
        pad_id=ids.get("pad_token"),
        special_ids=frozenset(backend.control.values()) - {ids.get("unk_token")},
        special_tokens=defined,
        template_source=None,
    )


_PARTS = 64
"""Parts of the last texts whose ids are kept."""
_PRE_TOKENIZERS = {"Sequence", "Split", "ByteLevel", "Digits"}
"""Those that look at a part alone; Metaspace asks whether it is the first one."""


def splitter_of(fast: Any) -> re.Pattern[str] | None:
    """What splits a text where its added tokens stand, so that its ids are those of the parts, each alone.

    The library itself does so before it looks at anything else. None where a token takes white space or
    letters around it into account, or the parts depend on where they stand.
    """
    rules = json.loads(fast.to_str())
    added, pre_tokenizer = rules["added_tokens"], rules["pre_tokenizer"]
    depends = ("single_word", "lstrip", "rstrip", "normalized")
    names = {
        part["type"]
        for part in (pre_tokenizer, *((pre_tokenizer or {}).get("pretokenizers") or ()))
        if part is not None
    }
    if (
        not added
        or any(token[name] for token in added for name in depends)
        or not names <= _PRE_TOKENIZERS
        or rules["model"].get("dropout")
        or fast.encode_special_tokens
    ):
        return None
    longest_first = sorted((token["content"] for token in added), key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})")


class _HuggingFaceBackend:
    """A transformers tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        # None for a tokenizer written in Python.
        fast = getattr(tokenizer, "backend_tokenizer", None)
        if fast is not None:
            # A tokenizer.json may carry the settings it was saved with; data.max_length alone cuts here.
            fast.no_truncation()
            fast.no_padding()
        named = None if fast is None else getattr(fast.model, "unk_token", None)
        unknown = {tokenizer.unk_token_id, tokenizer.get_vocab().get(named)}
        self._hold(tokenizer, fast, frozenset(i for i in unknown if i is not None))

    def _hold(self, tokenizer: Any, fast: Any, unknown_ids: frozenset[int]) -> None:
        self._tokenizer, self._fast, self.unknown_ids = tokenizer, fast, unknown_ids
        # A conversation is encoded whole and up to each turn: its parts are the same each time.
        self._splitter = None if fast is None else splitter_of(fast)
        self._encode_part = lru_cache(maxsize=_PARTS)(self._encode_whole)

    def __getstate__(self) -> tuple[Any, Any, frozenset[int]]:
        # What the library alone can do is done without transformers, which takes a second to import.
        return (self._tokenizer if self._fast is None else None), self._fast, self.unknown_ids

    def __setstate__(self, state: tuple[Any, Any, frozenset[int]]) -> None:
        self._hold(*state)

    def encode(self, text: str) -> list[int]:
        if self._splitter is None:
            return list(self._encode_whole(text))
        ids: list[int] = []
        for part in filter(None, self._splitter.split(text)):
            ids += self._encode_part(part)
        return ids

    def _encode_whole(self, text: str) -> Sequence[int]:
        if self._fast is None:
            return self._tokenizer.encode(text, add_special_tokens=False)
        # Directly, since transformers sets options on the shared object, which threads must not do.
        if os.environ.get("TOKENIZERS_PARALLELISM") == "false":
            # Without offsets, a fifth faster; where it may, the library starts threads of its own for it.
            return self._fast.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return self._fast.encode(text, add_special_tokens=False).ids

    def encode_continuation(self, text: str, *, behind: int | None = None) -> list[int]:
        # Tokenizers that put a space in front of a text do it once: behind a newline the text gets none.
        anchor = self.encode("\n")
        anchored = self.encode("\n" + text)
        if anchor and anchored[: len(anchor)] == anchor:
            return anchored[len(anchor) :]
        return self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        if self._fast is not None:
            return self._fast.decode(list(ids), skip_special_tokens=False)
        return self._tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def normalize(self, text: str) -> str:
        normalizer = None if self._fast is None else self._fast.normalizer
        return text if normalizer is None else normalizer.normalize_str(text).replace(_SPACE, " ")

    def identity(self) -> str:
        if self._fast is None:
            return json.dumps(sorted(self._tokenizer.get_vocab().items()))
        rules = json.loads(self._fast.to_str())
        # State of past calls, not part of the rules.
        return json.dumps(
            {k: v for k, v in rules.items() if k not in ("truncation", "padding")}, sort_keys=True
        )


class _ControlTokens:
    """Splits a text at the control tokens written out in it, as chat templates write them.

    The libraries themselves read `</s>` in a text as four characters.
    """

    def __init__(self, ids: Mapping[str, int]) -> None:
        self.ids = dict(ids)
        names = sorted(self.ids, key=len, reverse=True)
        self._splitter = re.compile("(" + "|".join(map(re.escape, names)) + ")") if names else None

    def split(self, text: str) -> list[str]:
        """Control tokens and what stands between them, in order, nothing empty."""
        return [part for part in (self._splitter.split(text) if self._splitter else [text]) if part]


class _TekkenBackend:
    """mistral-common's tokenizer of a tekken.json: bytes, without invented spaces."""

    unknown_ids: frozenset[int] = frozenset()

    def __init__(self, tekken: Any, digest: str) -> None:
        self._tekken = tekken
        self._digest = digest
        self.control = {tekken.id_to_piece(i): i for i in range(tekken.num_special_tokens)}
        self._tokens = _ControlTokens(self.control)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self._tokens.split(text):
            control = self.control.get(part)
            ids += self._tekken.encode(part, bos=False, eos=False) if control is None else [control]
        return ids

    def encode_continuation(self, text: str, *, behind: int | None = None) -> list[int]:
        return self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy

        return self._tekken.decode(list(ids), special_token_policy=SpecialTokenPolicy.KEEP)

    def normalize(self, text: str) -> str:
        return text

    def identity(self) -> str:
        return self._digest


class _SentencePieceBackend:
    """A SentencePiece processor that also recognises control tokens written out in a text.

    SentencePiece puts a space in front of whatever it is given (if its model says so). Each text between
    control tokens gets it, as in mistral-common and in Llama 2's own code, which encode these texts one by
    one; a space that a chat template writes behind a control token is that space, and not a second one.
    """

    def __init__(self, processor: Any, digest: str) -> None:
        self._processor = processor
        self._digest = digest
        ids = range(processor.get_piece_size())
        self._tokens = _ControlTokens({processor.id_to_piece(i): i for i in ids if processor.IsControl(i)})
        self._control_ids = frozenset(self._tokens.ids.values())
        # A private-use character: no vocabulary merges it with what follows.
        self._anchor = "\ue000"
        self._anchor_ids = processor.encode(self._anchor)
        self.unknown_ids = frozenset({processor.unk_id()})
        self._has_dummy_prefix = processor.id_to_piece(self._anchor_ids)[0].startswith(_SPACE)

    def encode(self, text: str) -> list[int]:
        return self._encode(text, self._processor.encode)

    def encode_continuation(self, text: str, *, behind: int | None = None) -> list[int]:
        return self._encode(text, self._encode_behind if behind in self._control_ids else self._encode_inside)

    def decode(self, ids: Sequence[int]) -> str:
        text = bytearray()
        has_invented_space = self._has_dummy_prefix
        for i in ids:
            piece = self._processor.id_to_piece(i)
            if i in self._control_ids:
                has_invented_space = self._has_dummy_prefix
                text += piece.encode()
                continue
            if self._processor.IsByte(i):
                text.append(int(piece[1:-1], 16))
            else:
                piece = piece.removeprefix(_SPACE) if has_invented_space else piece
                text += piece.replace(_SPACE, " ").encode()
            has_invented_space = False
        return text.decode(errors="replace")

    def normalize(self, text: str) -> str:
        return self._processor.normalize(text).replace(_SPACE, " ")

    def identity(self) -> str:
        return f"{self._digest}, one space behind control tokens"

    def _encode(self, text: str, encode_first: Callable[[str], list[int]]) -> list[int]:
        """Ids of a text, what stands in front of its first control token by `encode_first`."""
        ids: list[int] = []
        encode = encode_first
        for part in self._tokens.split(text):
            control = self._tokens.ids.get(part)
            ids += encode(part) if control is None else [control]
            encode = self._encode_behind
        return ids

    def _encode_behind(self, text: str) -> list[int]:
        """Ids of a text that has a control token in front of it."""
        return self._encode_inside(text) if text.startswith(" ") else self._processor.encode(text)

    def _encode_inside(self, text: str) -> list[int]:
        """Ids of a text that has other text in front of it."""
        anchored = self._processor.encode(self._anchor + text)
        if anchored[: len(self._anchor_ids)] != self._anchor_ids:
            return self._processor.encode(text)
        # Neighbouring unknown characters become one unknown token: the text's share of it stays.
        first, unknown = text[0], self._processor.unk_id()
        swallowed = self._processor.encode(self._anchor + first) == self._anchor_ids
        share = [unknown] if swallowed and unknown in self._processor.encode(first) else []
        return share + anchored[len(self._anchor_ids) :]


_SPACE = "\u2581"
"""How SentencePiece writes a space inside its pieces."""
