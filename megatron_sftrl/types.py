"""The values that travel between rooms: immutable, typed, and free of any process group.

Shapes use one alphabet everywhere: T packed tokens, S sequences, V vocabulary, H hidden.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """One packed micro-batch, aligned on the predicting position: `labels[t]` follows `tokens[t]`.

    Sequences stand one behind the other; sequence `s` occupies `cu_seqlens[s]:cu_seqlens[s + 1]`.
    Positions that carry no loss (prompt, padding) hold finite values everywhere, so that
    `value * mask` is always defined.

    Args:
        tokens: [T] int64, the model's input.
        labels: [T] int64, the token to predict at each position; any valid id where masked.
        positions: [T] int64, position of the token inside its own sequence.
        loss_mask: [T] bool, True where the label is trained.
        cu_seqlens: [S + 1] int32, cumulative sequence lengths, first 0 and last T.
        token_weight: [T] fp32, sums to 1 over one optimizer step and all ranks; 0 where masked.
        behavior_logprobs: [T] fp32 nats, log-probability of the label under whoever wrote the data.
        old_logprobs: [T] fp32 nats, under the policy before this rollout's first update.
        rollout_logprobs: [T] fp32 nats, as the rollout engine reported them.
        advantages: [T] fp32.

    Raises:
        ValueError: a field whose shape is not [T], or cu_seqlens that do not end at T.
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

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "cu_seqlens" or value is None:
                continue
            if value.shape != self.tokens.shape or value.dim() != 1:
                raise ValueError(
                    f"TokenBatch.{field.name}: expected shape [T] = {list(self.tokens.shape)}, "
                    f"got {list(value.shape)}"
                )
        if self.cu_seqlens.dim() != 1 or self.cu_seqlens.numel() < 2:
            raise ValueError(
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

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same batch with every tensor on `device`."""
        return self.map(lambda value: value.to(device))

    def map(self, function: Callable[[Tensor], Tensor], **replaced: Tensor) -> TokenBatch:
        """The same batch with `function` applied to every tensor that is there, but those in `replaced`."""
        changed = {
            field.name: function(value)
            for field in dataclasses.fields(self)
            if field.name not in replaced and (value := getattr(self, field.name)) is not None
        }
        return dataclasses.replace(self, **changed, **replaced)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is drawn.

    Args:
        temperature: logits are divided by it; 0 means the most likely token.
        max_new_tokens: tokens generated at most, the end token included.
        seed: stream of random numbers; the same seed gives the same tokens on the same layout.

    Raises:
        ValueError: a negative temperature or seed, or no token to generate.
    """

    temperature: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.max_new_tokens < 1 or self.seed < 0:
            raise ValueError(
                "sampling: expected temperature >= 0, max_new_tokens >= 1 and seed >= 0, got "
                f"{self.temperature}, {self.max_new_tokens} and {self.seed}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One generated response.

    Args:
        prompt_tokens: ids the response continues.
        response_tokens: ids generated, the end token included when it was reached.
        logprobs: nats, of each response token at the sampling temperature (at 1 when greedy).
        is_finished: the end token was reached.
    """

    prompt_tokens: tuple[int, ...]
    response_tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    is_finished: bool
