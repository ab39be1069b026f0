"""Whether a tokenizer gives a text back: the first thing to know about files that a library put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_sftrl.errors import UserError

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
        drops_text: some characters have no token at all, not even an unknown one: every text has to be
            compared with its tokens.
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
    a tokenizer whose parts do not belong together.

    Args:
        encode: text to ids, nothing added.
        decode: ids to text, nothing removed.
        normalize: the text as the tokenizer's normalizer leaves it.
        unknown_ids: ids that stand for characters the vocabulary does not have.
        origin: the tokenizer's path, for messages.
    Returns:
        What was seen.
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
