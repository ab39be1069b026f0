"""Gates: limits on what a step measured, and those that say whether RL has something to learn from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_sftrl.config.data import Section
from megatron_sftrl.errors import UserError


class GateSection(Section):
    """A limit on one number of a step."""

    metric: str
    """Name in metrics.jsonl."""
    below: float | None = None
    """The gate is crossed below this."""
    above: float | None = None
    """The gate is crossed above this."""
    falls_by: float | None = Field(default=None, gt=0, lt=1)
    """The gate is crossed when the number has lost more than this share of what it was in the first step of
    `between` that has it; a resumed run remembers that value."""
    between: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = None
    """First and last step in which the gate looks; in all of them when not given."""
    steps: int = Field(default=1, ge=1)
    """Consecutive steps that it takes."""
    action: Literal["warn", "stop"] = "warn"
    """Print a warning, or end the run with a checkpoint."""

    @model_validator(mode="after")
    def _one_limit(self) -> GateSection:
        if sum(limit is not None for limit in (self.below, self.above, self.falls_by)) != 1:
            raise UserError(f"gate on {self.metric}: give exactly one of below, above and falls_by")
        if self.falls_by is not None and self.between is None:
            raise UserError(
                f"gate on {self.metric}: falls_by is of the value at a step: give between: [first, last]"
            )
        if self.between is not None and self.between[0] > self.between[1]:
            raise UserError(f"gate on {self.metric}: between: expected first <= last, got {self.between}")
        return self


MIN_ENTROPY = 0.18
"""Nats at temperature 1 before RL, below which the policy has nothing left to try (arXiv:2606.18487)."""
MAX_EQUAL_GROUPS = 0.8
"""Share of groups with equal rewards: with more, the four rounds of filters.max_rounds do not fill a step."""
MIN_FINISHED = 0.9
"""Share of responses that reach their end; the rewards of the others are those of other texts
(arXiv:2503.14476 masks or punishes them)."""
MAX_FORMAT_LOSS = 0.1
"""Lenient less strict share of right responses, beyond which RL would first teach the format. Ours."""
WORST_FALL = 0.5
"""Share of its value at step 10 that the entropy of the most uncertain tokens may lose until step 150
(arXiv:2606.18487). Which tokens these are is our definition: the fifth with the highest entropy in a step."""

_FEW_STEPS = 5
"""A step has fewer prompts than an evaluation: a single one may be beyond a limit by chance. Ours."""

GRPO_GATES = (
    GateSection(metric="entropy", below=MIN_ENTROPY, between=(1, 1)),
    GateSection(metric="reward/zero_variance_groups", above=MAX_EQUAL_GROUPS, steps=_FEW_STEPS),
    GateSection(metric="rollout/truncated", above=round(1 - MIN_FINISHED, 6), steps=_FEW_STEPS),
    GateSection(metric="reward/format_loss", above=MAX_FORMAT_LOSS, steps=_FEW_STEPS),
    GateSection(metric="rollout/entropy_top_fifth", falls_by=WORST_FALL, between=(10, 150)),
)
"""What `sftrl handoff` asks of a checkpoint, asked of a run of `sftrl grpo`; each warns. Head-room is not
among them: a step has none exactly where all its groups are equal."""
