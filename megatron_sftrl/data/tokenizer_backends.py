"""The two tokenizer libraries behind `Tokenizer`: Hugging Face directories and raw SentencePiece models."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sftrl.data.tokenizer import TokenizerBackend
from megatron_sftrl.errors import UserError


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


def load_hugging_face(path: Path) -> LoadedTokenizer:
    """Read a tokenizer directory without the network and without executing code from it.

    Args:
        path: directory with tokenizer.json or the files of a slow tokenizer.
    Returns:
        The backend and its facts; `bos_id` only when the tokenizer itself puts it in front of a text.
    Raises:
        UserError: the directory is not a tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise UserError(
            f"tokenizer.path: {path} cannot be loaded as a Hugging Face tokenizer: {error}"
        ) from error
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
    )


def load_sentencepiece(path: Path) -> LoadedTokenizer:
    """Read a raw SentencePiece model.

    The file does not say whether its model was trained with a first token; as Llama, Mistral and Gemma all
    were, one that the vocabulary defines is used.

    Args:
        path: the .model file.
    Returns:
        The backend and its facts; there is no chat template in such a file.
    Raises:
        UserError: the file is not a SentencePiece model.
    """
    import sentencepiece

    data = path.read_bytes()
    try:
        processor = sentencepiece.SentencePieceProcessor()
        processor.LoadFromSerializedProto(data)
    except (RuntimeError, OSError) as error:
        raise UserError(f"tokenizer.path: {path} is not a SentencePiece model: {error}") from error
    backend = _SentencePieceBackend(processor, hashlib.sha256(data).hexdigest())
    named = {
        "bos_token": processor.bos_id(),
        "eos_token": processor.eos_id(),
        "pad_token": processor.pad_id(),
    }
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


class _HuggingFaceBackend:
    """A transformers tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # None for a tokenizer written in Python.
        self._fast = getattr(tokenizer, "backend_tokenizer", None)
        if self._fast is not None:
            # A tokenizer.json may carry the settings of whoever saved it; data.max_length alone cuts here.
            self._fast.no_truncation()
            self._fast.no_padding()

    def encode(self, text: str) -> list[int]:
        if self._fast is not None:
            # Directly, since transformers sets options on the shared object, which threads must not do.
            return self._fast.encode(text, add_special_tokens=False).ids
        return self._tokenizer.encode(text, add_special_tokens=False)

    def encode_continuation(self, text: str) -> list[int]:
        # Tokenizers that put a space in front of a text do it once: behind a newline the text gets none.
        anchor = self.encode("\n")
        anchored = self.encode("\n" + text)
        if anchor and anchored[: len(anchor)] == anchor:
            return anchored[len(anchor) :]
        return self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def identity(self) -> str:
        if self._fast is None:
            return json.dumps(sorted(self._tokenizer.get_vocab().items()))
        rules = json.loads(self._fast.to_str())
        # State of past calls, not part of the rules.
        return json.dumps(
            {k: v for k, v in rules.items() if k not in ("truncation", "padding")}, sort_keys=True
        )


class _SentencePieceBackend:
    """A SentencePiece processor that also recognises control tokens written out in a text.

    SentencePiece itself reads `</s>` in a text as four characters, and chat templates write it so. It also
    puts a space in front of whatever it is given, which only the start of a sequence is to have.
    """

    def __init__(self, processor: Any, digest: str) -> None:
        self._processor = processor
        self._digest = digest
        ids = range(processor.get_piece_size())
        self._control = {processor.id_to_piece(i): i for i in ids if processor.IsControl(i)}
        names = sorted(self._control, key=len, reverse=True)
        self._splitter = (
            re.compile("(" + "|".join(re.escape(name) for name in names) + ")") if names else None
        )
        # A private-use character: no vocabulary merges it with what follows.
        self._anchor = "\ue000"
        self._anchor_ids = processor.encode(self._anchor)
        self._has_dummy_prefix = processor.id_to_piece(self._anchor_ids)[0].startswith(_SPACE)

    def encode(self, text: str) -> list[int]:
        return self._encode(text, at_start=True)

    def encode_continuation(self, text: str) -> list[int]:
        return self._encode(text, at_start=False)

    def decode(self, ids: Sequence[int]) -> str:
        text = bytearray()
        is_at_start = self._has_dummy_prefix
        for i in ids:
            piece = self._processor.id_to_piece(i)
            if self._processor.IsByte(i):
                text.append(int(piece[1:-1], 16))
                continue
            if is_at_start and i not in self._control.values():
                is_at_start, piece = False, piece.removeprefix(_SPACE)
            text += piece.replace(_SPACE, " ").encode()
        return text.decode(errors="replace")

    def identity(self) -> str:
        return self._digest

    def _encode(self, text: str, *, at_start: bool) -> list[int]:
        ids: list[int] = []
        for piece in self._splitter.split(text) if self._splitter else [text]:
            if piece in self._control:
                ids.append(self._control[piece])
            elif piece:
                ids += self._processor.encode(piece) if at_start else self._encode_inside(piece)
                at_start = False
        return ids

    def _encode_inside(self, text: str) -> list[int]:
        """Ids of a text that has something in front of it."""
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
