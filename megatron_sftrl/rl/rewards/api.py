"""What a reward is given, what it returns, and how it shows that it can tell right from wrong.

No tensor comes near a reward: its processes start without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from megatron_sftrl.config.schema import Section

# The largest number that a reward may return: times a weight that is no larger, it is still one in fp32, and
# so are sums and squares of it in float64.
LARGEST = 1e15

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"


class RewardConfig(Section):
    """Options of a reward: frozen, strict about unknown names; the text below a field documents it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardInputs:
    """One response as a reward sees it.

    Args:
        prompt: the text that was to be answered.
        response: the generated text, without the end token; any characters, of any length.
        row: the prompt's row of the data: answer, metadata and whatever else stands there.
        num_response_tokens: tokens generated, the end token included.
        is_finished: the end token was reached; otherwise the response was cut off.
    """

    prompt: str
    response: str
    row: Mapping[str, Json]
    num_response_tokens: int
    is_finished: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardOutput:
    """What a reward returns; every number finite, or the sample has no reward and is not trained on.

    Args:
        reward: what is trained, by the strict reading of the response.
        lenient: what it would be if the format were forgiven; measured, never trained. None: the same.
        metrics: further numbers by name, averaged over samples.
    """

    reward: float
    lenient: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Canary:
    """A response of which it is known whether it is right; each right one must score above each wrong one.

    Args:
        response: the text.
        is_right: what a working reward says about it.
        prompt: as in RewardInputs, and so are the following.
        row: what the reward needs of it.
        num_response_tokens: tokens generated.
        is_finished: the end token was reached.
    """

    response: str
    is_right: bool
    prompt: str = ""
    row: Mapping[str, Json] = field(default_factory=dict)
    num_response_tokens: int = 1
    is_finished: bool = True

    @property
    def inputs(self) -> RewardInputs:
        """The same as a sample to score."""
        return RewardInputs(
            prompt=self.prompt,
            response=self.response,
            row=self.row,
            num_response_tokens=self.num_response_tokens,
            is_finished=self.is_finished,
        )
