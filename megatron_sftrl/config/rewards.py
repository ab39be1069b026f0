"""What a run says about its rewards: named functions with weights, and the limits of their workers."""

from __future__ import annotations

from collections import Counter
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from megatron_sftrl.config.data import Section
from megatron_sftrl.config.paths import ModuleName
from megatron_sftrl.errors import UserError


class RewardSection(BaseModel):
    """One reward. Keys other than name, weight and modules are the reward's own options."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    name: str
    """A registered reward: math, multiple_choice, exact_match, reasoning_gym, format, length, or one of your
    own."""
    weight: float = Field(default=1.0, ge=-1e15, le=1e15, allow_inf_nan=False)
    """Factor of this reward in the sum that is trained; 0: measured and logged only."""
    modules: list[ModuleName] = []
    """Python files or importable modules that register rewards, imported before the name is looked up, here
    and in each worker."""

    @property
    def options(self) -> dict[str, object]:
        """The reward's own options, as written."""
        return dict(self.model_extra or {})


class RewardWorkersSection(Section):
    """The processes in which rewards are computed, and what one sample may cost there."""

    num_workers: int = Field(default=2, ge=1)
    """Processes per rank that scores."""
    seconds: float = Field(default=10.0, gt=0, le=3600)
    """Wall-clock time of one reward of one sample. One that takes longer is killed and tried once more; if it
    is late again, the sample is left out of the loss and of its group. Processor time is limited to the next
    whole second above it."""
    memory_gb: float = Field(default=4.0, ge=0.5, allow_inf_nan=False)
    """Address space of one worker, in GiB; its libraries count as well. A sample that wants more fails alone.
    The rewards of this package need a tenth of the default."""


_OWN_NUMBERS = ("mean", "lenient_mean", "std", "zero_variance_groups", "format_loss", "slowest_seconds")
"""Under reward/ in metrics.jsonl, of all rewards together."""


def check_rewards(rewards: list[RewardSection]) -> list[RewardSection]:
    """The list itself, if it says what is to be trained.

    Raises:
        UserError: it is empty, names a reward twice or as a number that every step has, or gives none of them
            a weight.
    """
    if not rewards:
        raise UserError("rewards: expected at least one, got an empty list; add one, such as {name: math}")
    twice = [name for name, count in Counter(reward.name for reward in rewards).items() if count > 1]
    if twice:
        raise UserError(
            f"rewards: expected each name once, got {twice[0]!r} twice; its metrics could not be told apart: "
            "remove one, or register a variant under a name of its own"
        )
    names = [reward.name for reward in rewards]
    for name in names:
        outer = [other for other in names if name.startswith(f"{other}/")]
        if name in _OWN_NUMBERS or name.startswith("pass_at_") or outer:
            of_whom = f"{outer[0]!r} writes under its own name" if outer else "every step writes"
            raise UserError(
                f"rewards: reward {name!r} would be written as reward/{name}, among the numbers that "
                f"{of_whom}; register it under another name"
            )
    if all(reward.weight == 0 for reward in rewards):
        raise UserError(
            "rewards: every weight is 0, so that nothing would be trained; give one of "
            f"{', '.join(reward.name for reward in rewards)} a weight"
        )
    return rewards


RewardList = Annotated[list[RewardSection], AfterValidator(check_rewards)]
