"""The values that travel between rooms: immutable, typed, and free of any process group.

Shapes use one alphabet everywhere: T packed tokens, S sequences, V vocabulary, H hidden.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_sftrl.errors import UserError

OWN_CHOICE = -1
"""In TokenBatch.experts: a token that no engine has seen, whose experts its router chooses."""


def experts_dtype(num_experts: int) -> np.dtype:
    """Of the experts that a response carries (Rollout.experts)."""
    return np.dtype(np.uint8 if num_experts <= 256 else np.uint16)


class Prefix(NamedTuple):
    """What stands in front of a sequence of a batch: the first `length` tokens of the sequence `of` in it."""

    of: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """One packed micro-batch, aligned on the predicting position: `labels[t]` follows `tokens[t]`.

    Sequences stand one behind the other; sequence `s` occupies `cu_seqlens[s]:cu_seqlens[s + 1]`.
    Positions that carry no loss (prompt, padding) hold finite values everywhere, so that
    `value * mask` is always defined.

    Args:
        tokens: [T] int64, the model's input.
        labels: [T] int64, the token to predict at each position; any valid id where masked.
        positions: [T] int64, position of the token inside its own sequence, its prefix included.
        loss_mask: [T] bool, True where the label is trained.
        cu_seqlens: [S + 1] int32, cumulative sequence lengths, first 0 and last T.
        token_weight: [T] fp32, sums to 1 over one optimizer step and all ranks; 0 where masked.
        behavior_logprobs: [T] fp32 nats, log-probability of the label under the model that wrote the data.
        old_logprobs: [T] fp32 nats, under the policy before this rollout's first update. A loss always finds
            them: in the first update they are the policy's own in the same forward, as constants.
        rollout_logprobs: [T] fp32 nats, as the rollout engine reported them (see Rollout.logprobs).
        advantages: [T] fp32.
        is_demonstration: [T] bool, True where a demonstration stands in a group of the policy's responses;
            old_logprobs and rollout_logprobs mean nothing there. No token's does when not given.
        is_padding: [T] bool, True where no real token stands; none does when not given.
        experts: [T, layers with experts, k] int16, those that the policy's forward visits, OWN_CHOICE where
            its routers choose. They choose everywhere when not given.
        prefixes: [S] what each sequence continues: responses to one prompt may stand behind one copy of it.
            None continues another when empty.
    Raises:
        UserError: a field whose shape is not [T], or cu_seqlens that do not end at T.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    loss_mask: Tensor
    cu_seqlens: Tensor
    token_weight: Tensor
    behavior_logprobs: Tensor | None = None
    old_logprobs: Tensor | None = None
    rollout_logprobs: Tensor | None = None
    advantages: Tensor | None = None
    is_demonstration: Tensor | None = None
    is_padding: Tensor | None = None
    experts: Tensor | None = None
    prefixes: tuple[Prefix | None, ...] = ()

    def __post_init__(self) -> None:
        for name, value in self.tensors().items():
            if name == "cu_seqlens":
                continue
            shape = value.shape[:1] if name == "experts" else value.shape
            if shape != self.tokens.shape or len(shape) != 1:
                raise UserError(
                    f"TokenBatch.{name}: expected shape [T] = {list(self.tokens.shape)}, "
                    f"got {list(value.shape)}"
                )
        if self.cu_seqlens.dim() != 1 or self.cu_seqlens.numel() < 2:
            raise UserError(
                f"TokenBatch.cu_seqlens: expected [S + 1] with S >= 1, got {list(self.cu_seqlens.shape)}"
            )

    @property
    def num_tokens(self) -> int:
        """T, padding included."""
        return self.tokens.numel()

    @property
    def num_sequences(self) -> int:
        """S."""
        return self.cu_seqlens.numel() - 1

    def lengths(self) -> tuple[int, ...]:
        """[S] tokens of each sequence; on a device it is waited for: ask before the batch goes there."""
        return tuple(self.cu_seqlens.diff().tolist())

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that is there, by its field."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def complete(self) -> list[int]:
        """The sequences that end here, in order: all but those that are a prefix of others."""
        prefixes = {prefix.of for prefix in self.prefixes if prefix is not None}
        return [sequence for sequence in range(self.num_sequences) if sequence not in prefixes]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> TokenBatch:
        """The same batch with every tensor on `device`; `non_blocking` as torch's."""
        return self.map(lambda value: value.to(device, non_blocking=non_blocking))

    def map(self, function: Callable[[Tensor], Tensor], **replaced: Any) -> TokenBatch:
        """The same batch with `function` applied to every tensor that is there, but those in `replaced`."""
        changed = {name: function(value) for name, value in self.tensors().items() if name not in replaced}
        return dataclasses.replace(self, **changed, **replaced)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is drawn.

    Args:
        temperature: logits are divided by it; 0 means the most likely token.
        top_p: the smallest set of likeliest tokens that holds at least this probability is kept; 1 keeps all.
        top_k: the k most likely tokens are kept, before top_p; 0 keeps all.
        max_new_tokens: tokens generated at most, the end token included.
        num_samples: responses per prompt.
        stop_ids: a response ends with the first of them.
        stop: a response ends with the token that completes one of these texts, special tokens written out.
        seed: stream of random numbers; the same seed gives the same tokens on the same layout.
    Raises:
        UserError: a number outside its range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 256
    num_samples: int = 1
    stop_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.top_p <= 1 or self.top_k < 0 or self.num_samples < 1:
            raise UserError(
                "sampling: expected 0 < top_p <= 1, top_k >= 0 and num_samples >= 1, got "
                f"{self.top_p}, {self.top_k} and {self.num_samples}"
            )
        if "" in self.stop:
            raise UserError("sampling: expected a text to stop at, got an empty one, which stands everywhere")
        if self.temperature < 0 or self.max_new_tokens < 1 or self.seed < 0:
            raise UserError(
                "sampling: expected temperature >= 0, max_new_tokens >= 1 and seed >= 0, got "
                f"{self.temperature}, {self.max_new_tokens} and {self.seed}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What a group of responses continues: at least one token.

    With the sample's number, `id` (its number in the run) names the random stream of a response, so that
    neither batching nor the number of replicas changes what is drawn.
    """

    id: int
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One generated response.

    Args:
        response_tokens: ids generated, the end token (or the one that completes a stop text) included.
        logprobs: nats, of each response token over the whole vocabulary at the sampling temperature (1 when
            greedy), before top_k and top_p cut it.
        is_finished: an end token or a stop text was reached.
        experts: [n, layers with experts, k] of experts_dtype: what the engine visited with
            each token of prompt and response but the last, which it never computed; None where it is not
            asked (rollout.router_replay).
    """

    prompt_tokens: tuple[int, ...]
    response_tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    is_finished: bool
    experts: NDArray[np.integer] | None = dataclasses.field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutGroup:
    """The responses to one prompt by sample number; `version` is the optimizer steps behind the weights."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    version: int
