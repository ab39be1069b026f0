"""One face for every tokenizer: ids of a text, text of ids, the special ids, and a fingerprint.

A `Tokenizer` never adds tokens by itself: what builds a sequence places the first and the end token.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sftrl.config.schema import TokenizerSection
from megatron_sftrl.data.template import ChatTemplate
from megatron_sftrl.data.tokenizer_backends import TokenizerBackend, examine
from megatron_sftrl.errors import UserError, error_of
from megatron_sftrl.models.tokenizer_files import TEMPLATE, find_tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenizer:
    """Text to ids and back, with the facts about the vocabulary that training needs.

    Args:
        vocab_size: largest id + 1, added tokens included: the smallest V a model needs.
        bos_id: id that opens every sequence when no chat template does it; None when there is none.
        pad_id: a valid id for positions that carry nothing.
        special_ids: ids that stand for control tokens (end of turn, end of text, ...).
        chat_template: renders messages; None when the tokenizer has no template.
        fingerprint: hash of vocabulary, rules and template; equal means the same ids for the same rows.
        drops_text: some characters have no token, so that every text is compared with its tokens.
        notes: what a user should know about these files, for a command to print.
    """

    backend: TokenizerBackend
    vocab_size: int
    bos_id: int | None
    eos_id: int
    pad_id: int
    special_ids: frozenset[int]
    chat_template: ChatTemplate | None
    fingerprint: str
    drops_text: bool
    notes: tuple[str, ...]

    def encode(self, text: str) -> list[int]:
        """Ids of `text` at the start of a sequence, nothing added; UserError where a character has none."""
        ids = self.backend.encode(text)
        if self.drops_text and not self.backend.unknown_ids & set(ids):
            back = self.backend.decode(ids)
            if back != text:
                raise UserError(
                    f"the tokenizer has no tokens for a part of this text: {text!r} would be learned as "
                    f"{back!r}; use a tokenizer that knows these characters, or remove them"
                )
        return ids

    def encode_continuation(self, text: str, *, behind: int | None = None) -> list[int]:
        """Ids of `text` that continues earlier tokens, the last of them `behind` if given; nothing added."""
        return self.backend.encode_continuation(text, behind=behind)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens included.

        An id without a token has no text: a model's rows may be padded past its tokenizer, and be drawn.
        """
        return self.backend.decode([int(i) for i in ids if 0 <= i < self.vocab_size])


def load_tokenizer(section: TokenizerSection) -> Tokenizer:
    """Load a Hugging Face directory, a raw SentencePiece model or a tekken.json; never from a network.

    Code that lies beside a tokenizer is never executed. A Jinja file may replace its chat template.

    Raises:
        UserError: the path is not there, cannot be read as a tokenizer, does not give texts back, has no end
            token, or the template does not compile.
    """
    # Late: transformers and sentencepiece cost seconds, and `import megatron_sftrl` must not need them.
    from megatron_sftrl.data import tokenizer_backends

    path = Path(section.path)
    kind, place = find_tokenizer(path)
    if kind == "hugging face":
        loaded = tokenizer_backends.load_hugging_face(place)
    elif kind == "tekken":
        loaded = tokenizer_backends.load_tekken(place)
    else:
        loaded = tokenizer_backends.load_sentencepiece(place)
    if loaded.eos_id is None:
        raise UserError(
            f"tokenizer.path: {path} has no end token, so a model could never learn to stop; "
            'set "eos_token" in its tokenizer_config.json'
        )
    backend = loaded.backend
    trip = examine(
        backend.encode,
        backend.decode,
        normalize=backend.normalize,
        unknown_ids=backend.unknown_ids,
        origin=str(path),
    )
    source, origin = loaded.template_source, f"the chat template of {path}"
    if kind != "hugging face" and path.is_dir() and (path / TEMPLATE).is_file():
        source = _read_template(path / TEMPLATE)
    if section.chat_template is not None:
        source, origin = _read_template(section.chat_template), str(section.chat_template)
    template = None
    if source is not None:
        template = ChatTemplate(
            source,
            special_tokens=loaded.special_tokens,
            origin=origin,
            switches=section.chat_template_kwargs,
            date=section.date,
        )
    elif section.chat_template_kwargs or section.date:
        raise UserError(
            f"tokenizer.{'date' if section.date else 'chat_template_kwargs'}: {path} has no chat template "
            "that reads it; remove the key, or name a Jinja file as tokenizer.chat_template"
        )
    digest = hashlib.sha256(backend.identity().encode())
    digest.update(b"\0" + (source or "").encode())
    if section.chat_template_kwargs or section.date:
        digest.update(json.dumps([section.chat_template_kwargs, str(section.date)], sort_keys=True).encode())
    return Tokenizer(
        backend=backend,
        vocab_size=loaded.vocab_size,
        bos_id=loaded.bos_id,
        eos_id=loaded.eos_id,
        pad_id=loaded.eos_id if loaded.pad_id is None else loaded.pad_id,
        special_ids=loaded.special_ids,
        chat_template=template,
        fingerprint=digest.hexdigest(),
        drops_text=trip.drops_text,
        notes=(*loaded.notes, *trip.notes, *_notes_on_dates(template, section)),
    )


def _notes_on_dates(template: ChatTemplate | None, section: TokenizerSection) -> tuple[str, ...]:
    if template is None or section.date is not None or not template.asks_the_clock:
        return ()
    return (
        f"{template.origin} asks for today's date and is given none: where it can do without, it prints a "
        "date of its own; tokenizer.date sets one",
    )


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise UserError where the tokenizer has ids beyond `vocab_size`, V of the model before padding."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"model vocabulary: expected at least {tokenizer.vocab_size} (the tokenizer's largest id + 1), "
            f"got {vocab_size}; raise vocab_size in model.architecture or in the config.json, "
            "or use the tokenizer that belongs to the model"
        )


def _read_template(path: Path) -> str:
    """Text of a Jinja file."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise error_of(f"tokenizer.chat_template: cannot read {path}: {error}", error) from error
