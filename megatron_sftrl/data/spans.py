"""From characters that an assistant wrote to tokens that are learned, its end tokens included."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_sftrl.data.tokenizer import Tokenizer
from megatron_sftrl.errors import UserError

Span = tuple[int, int]
"""[start, end), in characters or in tokens."""


def tokenize_spans(tokenizer: Tokenizer, text: str, spans: Sequence[Span]) -> tuple[list[int], list[Span]]:
    """Tokens of a text, none of which crosses the border of a span, and the spans in tokens.

    Where the tokens of text[:border] are the first tokens of the text, they are taken as they are. Where
    the tokenizer would merge across a border (a response that starts with a newline behind a header that
    ends in one), the parts are tokenized apart, as they are when a model generates: it is given the
    tokens of text[:border] and continues.

    Args:
        tokenizer: text to ids.
        text: the whole sequence.
        spans: in characters, ascending, not overlapping.
    Returns:
        Ids [n] and each span in tokens.
    Raises:
        UserError: the parts, tokenized apart, no longer read as the same text.
    """
    cuts = [cut for span in spans for cut in span]
    whole = tokenizer.encode(text)
    prefixes = [_encode_prefix(tokenizer, text, cut, whole) for cut in cuts]
    if all(whole[: len(prefix)] == prefix for prefix in prefixes):
        borders = [len(prefix) for prefix in prefixes]
        return whole, list(zip(borders[::2], borders[1::2], strict=True))
    ids: list[int] = []
    borders = []
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        if start < end:
            part = text[start:end]
            ids += tokenizer.encode_continuation(part) if start else tokenizer.encode(part)
        borders.append(len(ids))
    if tokenizer.decode(ids) != tokenizer.decode(whole):
        raise UserError(
            "a token crosses the border between prompt and response, and tokenized apart they read as "
            "another text; end the prompt (or the template's assistant header) where a new token starts"
        )
    return ids, list(zip(borders[:-1:2], borders[1::2], strict=True))


def learn_ends(
    tokenizer: Tokenizer, ids: Sequence[int], spans: Sequence[Span]
) -> tuple[list[int], list[bool]]:
    """The mask of a conversation whose last turn is the assistant's: its spans and the token that ends each.

    An end token printed directly behind a span (a `{% generation %}` block that closes before it) belongs
    to the turn. White space printed behind an end token does not: generation has stopped there. Tokens
    behind the last learned one are left out. Where the template ends the last turn with no special token,
    the tokenizer's end token is appended.

    Args:
        tokenizer: knows the special ids.
        ids: [n].
        spans: in tokens, ascending.
    Returns:
        Ids [m] and mask [m], ending with a learned end token.
    Raises:
        UserError: text that nobody learns stands between the last span and the end.
    """
    tail = next((i for i in ids[spans[-1][1] :] if i in tokenizer.special_ids), tokenizer.eos_id)
    ends = {tokenizer.eos_id, tail}
    mask = [False] * len(ids)
    stop = 0
    for start, end in spans:
        if start < end:
            stop = _end_of_turn(tokenizer, ids, start, end, ends)
            mask[start:stop] = [True] * (stop - start)
    if ids[stop - 1] in tokenizer.special_ids:
        return list(ids[:stop]), mask[:stop]
    rest = tokenizer.decode(ids[stop:])
    if rest.strip():
        raise UserError(
            f"the chat template prints {rest!r} behind the last assistant turn, outside of its generation "
            "block, so that no end would be learned; close the block behind that text"
        )
    return [*ids[:stop], tokenizer.eos_id], [*mask[:stop], True]


def _encode_prefix(tokenizer: Tokenizer, text: str, cut: int, whole: list[int]) -> list[int]:
    """Tokens of text[:cut]."""
    if cut == len(text):
        return whole
    return tokenizer.encode(text[:cut]) if cut else []


def _end_of_turn(tokenizer: Tokenizer, ids: Sequence[int], start: int, end: int, ends: set[int]) -> int:
    """Where the learned tokens of the turn that occupies [start, end) stop."""
    last_special = next((i for i in range(end - 1, start - 1, -1) if ids[i] in tokenizer.special_ids), None)
    if last_special is not None and not tokenizer.decode(ids[last_special + 1 : end]).strip():
        return last_special + 1
    behind = end
    while behind < len(ids) and ids[behind] not in tokenizer.special_ids:
        if tokenizer.decode([ids[behind]]).strip():
            return end
        behind += 1
    return behind + 1 if behind < len(ids) and ids[behind] in ends else end
