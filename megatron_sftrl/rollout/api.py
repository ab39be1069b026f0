"""What a rollout engine is: anything that generates groups of responses with the policy's current weights.

Every method is collective: each rank of the job calls it with equal arguments. How prompts are spread over
replicas, and which ranks form an engine, is the engine's own business.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from megatron_sftrl.engine.policy import PolicyEngine
from megatron_sftrl.engine.weight_stream import ReshardReport
from megatron_sftrl.types import Prompt, RolloutGroup, SamplingParams


class RolloutEngine(Protocol):
    """Generates with the weights of the last update.

    Log-probabilities are of the sampled tokens over the whole vocabulary at the sampling temperature, before
    top-k and top-p cut it: what the trainer recomputes, so that the ratio of both is 1. An engine that cannot
    report them under a cut refuses the cut.
    """

    @property
    def last_report(self) -> ReshardReport | None:
        """What the last update cost this rank; None where no weight moves."""
        ...

    def update(self, policy: PolicyEngine, *, version: int) -> None:
        """Take over the policy's weights, and forget everything computed with earlier ones.

        Args:
            policy: between two steps, after gather_parameters.
            version: optimizer steps behind these weights; groups generated from now on carry it.
        Raises:
            UserError: on every rank, before anything is generated: a parameter of the engine that was not
                received exactly once.
        """
        ...

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[RolloutGroup]:
        """`sampling.num_samples` responses for each prompt, in order, on every rank.

        Raises:
            UserError: on every rank: a prompt that is empty or too long for the engine.
        """
        ...

    def wake(self) -> None:
        """Make the engine ready for update() and generate(): bring its memory back."""
        ...

    def sleep(self) -> None:
        """Free the memory that training needs; weights and caches of the engine may be lost."""
        ...

    def close(self) -> None:
        """Release everything."""
        ...
