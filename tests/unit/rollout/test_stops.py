"""A response ends with the token that completes a stop text, at the earliest and at the latest."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from megatron_sftrl.rollout.api import Stops
from megatron_sftrl.types import SamplingParams


def decode(ids: Sequence[int]) -> str:
    """An id below 128 is a character, one above it two, and 200 nothing at all."""
    return "".join("" if i == 200 else chr(i) if i < 128 else chr(i - 128) * 2 for i in ids)


def length_of(text: Sequence[int], **ends: object) -> int:
    """Tokens up to the one that ends the response; all of them when none does."""
    stops = Stops(SamplingParams(**ends), decode)  # type: ignore[arg-type]
    return next((n for n in range(1, len(text) + 1) if stops(text[:n])), len(text))


WORDS = [*b"one two three"]
TWICE = ord("e") + 128


@pytest.mark.parametrize(
    ("tokens", "ends", "length"),
    [
        (WORDS, {}, 13),
        (WORDS, {"stop": ("two",)}, 7),
        (WORDS, {"stop": ("three!",)}, 13),
        (WORDS, {"stop": ("three", "tw")}, 6),
        (WORDS, {"stop": ("e",), "stop_ids": frozenset({ord("n")})}, 2),
        # The text begins or ends inside of a token.
        ([*b"on", TWICE, *b" two"], {"stop": ("ne",)}, 3),
        ([TWICE, *b" two"], {"stop": ("e t",)}, 3),
        # Far in, and over tokens that have no text.
        ([*WORDS * 40, *b"s", 200, 200, *b"top", *b"more"], {"stop": ("stop",)}, 13 * 40 + 6),
        ([*"aé".encode("latin-1")[:1], *b"b"], {"stop": ("ab" * 9,)}, 2),
    ],
)
def test_a_response_ends_with_the_token_that_completes_a_text(
    tokens: list[int], ends: dict, length: int
) -> None:
    assert length_of(tokens, **ends) == length


def test_an_empty_text_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a text to stop at, got an empty one"):
        SamplingParams(stop=("a", ""))
