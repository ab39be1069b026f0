"""When a response has come to its end: the same rule for every engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_sftrl.types import SamplingParams

Decode = Callable[[Sequence[int]], str]
"""Text of token ids, special tokens written out."""

_SPARE_TOKENS = 16
"""More than a decoder changes at the start of its input, and than tokens without a text stand in a row."""


class Stops:
    """Whether the last token of a response ends it.

    Args:
        sampling: its stop_ids and stop.
        decode: needed for sampling.stop only.
    """

    def __init__(self, sampling: SamplingParams, decode: Decode | None) -> None:
        assert decode is not None or not sampling.stop, "an engine without decode() knows no texts"
        self._ids, self._texts, self._decode = sampling.stop_ids, sampling.stop, decode
        # Every token of the text holds at least a byte of it.
        self._window = max((len(text.encode()) for text in self._texts), default=0) + _SPARE_TOKENS

    def __call__(self, tokens: Sequence[int]) -> bool:
        """Asked after every token: it is an end token, or completes a text."""
        if tokens[-1] in self._ids:
            return True
        if not self._texts:
            return False
        assert self._decode is not None
        text = self._decode(tokens[-self._window :])
        return any(each in text for each in self._texts)
