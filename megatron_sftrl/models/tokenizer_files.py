"""Which file of a path says the ids, told by what is in it: SentencePiece models have many names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from megatron_sftrl.errors import UserError, error_of, hub_hint

TokenizerKind = Literal["hugging face", "tekken", "sentencepiece"]

TEMPLATE = "chat_template.jinja"
RULES, CONFIG, TEKKEN = "tokenizer.json", "tokenizer_config.json", "tekken.json"
_TEMPLATES = frozenset({TEMPLATE, "chat_template.json"})
TOKENIZER_FILES = _TEMPLATES | {
    RULES,
    CONFIG,
    TEKKEN,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
}
"""Any of them makes a directory one that holds a tokenizer; so does a SentencePiece model by any name."""


def find_tokenizer(path: Path) -> tuple[TokenizerKind, Path]:
    """The kind of tokenizer and where it is: a directory for Hugging Face's, a file for the others.

    In a directory tokenizer.json comes first, then tekken.json; without these and without a
    tokenizer_config.json, a single SentencePiece model is the tokenizer.

    Raises:
        UserError: nothing there, two SentencePiece models in a directory, or a file of another kind.
    """
    if not path.exists():
        raise UserError(
            f"tokenizer.path: {path} does not exist; give a Hugging Face tokenizer directory, a "
            f"SentencePiece model or a tekken.json{hub_hint(path)}"
        )
    if path.is_dir():
        if (path / RULES).is_file():
            return "hugging face", path
        if (path / TEKKEN).is_file():
            return "tekken", path / TEKKEN
        model = None if (path / CONFIG).is_file() else single_sentencepiece(path)
        return ("hugging face", path) if model is None else ("sentencepiece", model)
    if path.suffix == ".json" and "tekken" in path.name:
        return "tekken", path
    if is_sentencepiece(path):
        return "sentencepiece", path
    hint = f"; for a {RULES} give the directory that holds it" if path.suffix == ".json" else ""
    raise UserError(
        f"tokenizer.path: {path} is not a SentencePiece model; expected a directory, a SentencePiece model "
        f"by any name, or a tekken.json{hint}"
    )


def has_tokenizer(directory: Path) -> bool:
    """Whether a model directory holds a tokenizer; many directories of weights do not."""
    return any((directory / name).is_file() for name in TOKENIZER_FILES) or bool(_models(directory))


def has_vocabulary(names: set[str]) -> bool:
    """Whether one of these names of files says ids, and not templates alone."""
    return not (TOKENIZER_FILES - _TEMPLATES).isdisjoint(names)


def single_sentencepiece(directory: Path) -> Path | None:
    """The SentencePiece model of a directory, None where there is none.

    Raises:
        UserError: there are several.
    """
    found = _models(directory)
    if len(found) > 1:
        raise UserError(
            f"tokenizer.path: {directory} holds {len(found)} SentencePiece models "
            f"({', '.join(file.name for file in found)}); give the file itself"
        )
    return found[0] if found else None


def is_sentencepiece(path: Path) -> bool:
    """Whether the file's content is a SentencePiece model, whatever its name."""
    import sentencepiece  # late: commands that read no tokenizer start without it

    try:
        with path.open("rb") as file:
            # A model starts with its first piece, which starts with its text: weights are not read for this.
            head = file.read(16)
            if not head.startswith(b"\n") or b"\n" not in head[2:4]:
                return False
            data = head + file.read()
    except OSError as error:
        raise error_of(f"tokenizer.path: cannot read {path}: {error}", error) from error
    try:
        sentencepiece.SentencePieceProcessor().LoadFromSerializedProto(data)
    except RuntimeError:
        return False
    return True


def _models(directory: Path) -> list[Path]:
    # What this user may not read is another's: it must not keep the directory from being used.
    files = (file for file in sorted(directory.iterdir()) if file.is_file() and os.access(file, os.R_OK))
    return [file for file in files if is_sentencepiece(file)]
