"""Bringing a rollout engine up to date, and the proof that it is: do both agree on log-probabilities?"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

from megatron_sftrl.config.schema import GrpoConfig
from megatron_sftrl.data.prompts import PromptRow
from megatron_sftrl.engine.policy import PolicyEngine
from megatron_sftrl.observability.watch import take_device_peak
from megatron_sftrl.rl.rewards import Scored
from megatron_sftrl.rollout.api import RolloutEngine
from megatron_sftrl.rollout.separate import RemoteEngine
from megatron_sftrl.trainers.experience import ExperienceBatches, Response, score_responses
from megatron_sftrl.types import Prompt, SamplingParams

_NUM_PROMPTS, _NUM_TOKENS = 2, 8
_FIRST_ID = 2**40
"""Far above the ids of a run's prompts: the probe draws from streams of its own."""


class EngineUpdates:
    """Updates of one engine, asleep, from one policy; the first prompts of `rows` are the probe's."""

    def __init__(
        self,
        config: GrpoConfig,
        engine: RolloutEngine,
        policy: PolicyEngine,
        rows: Sequence[PromptRow],
        batches: ExperienceBatches,
        sampling: SamplingParams,
    ) -> None:
        self._config, self._engine, self._policy = config, engine, policy
        self._rows, self._batches, self._sampling = rows, batches, sampling
        self._probed: float | None = None
        device = policy.parallel.device
        self._take_peak = (lambda: take_device_peak(device)) if device.type == "cuda" else None
        self._peaks: dict[str, int] = {}

    @contextlib.contextmanager
    def engine_turn(self, version: int, *, timed: AbstractContextManager) -> Iterator[None]:
        """The engine has the device's memory and the policy's weights for the block; every rank enters it.

        Inside, only the policy's forward works. After a failure nothing is brought back: the run ends.

        Args:
            version: steps behind the weights.
            timed: entered while the engine is brought up to date.
        Raises:
            RuntimeError: on every rank: the engine did not take every weight, or does not agree.
        """
        self._note("train")
        with contextlib.ExitStack() as turn:
            with timed:
                self._policy.gather_parameters()
                turn.enter_context(self._policy.lent_memory(offload=self._config.rollout.offload))
                self._engine.update(self._policy, version=version)
                self._compare(version)
            yield
            self._note("generate")
            self._engine.sleep()

    def _compare(self, version: int) -> None:
        if self._config.rollout.engine == "in_process":
            return
        limit = self._config.rollout.vllm.probe_limit
        self._probed = probe_engine(self._engine, self._policy, self._rows, self._batches, self._sampling)
        if not self._probed <= limit:
            raise RuntimeError(
                f"after the update of step {version} the engine's log-probabilities are {self._probed:.3f} "
                f"nats from the trainer's on average, more than rollout.vllm.probe_limit = {limit}: its "
                "weights are not the policy's, and nothing was trained on its responses. The last checkpoint "
                "is sound"
            )

    def _note(self, whose: str) -> None:
        """The most memory of the device in the turn that ends; the CPU's peak cannot be started again."""
        if self._take_peak is not None:
            self._peaks[whose] = max(self._peaks.get(whose, 0), self._take_peak())

    def numbers(self) -> dict[str, float]:
        """What the last update cost this rank, the probe, and the memory that each turn of the step took."""
        numbers: dict[str, float] = {} if self._probed is None else {"mismatch/probe": self._probed}
        self._note("train")
        numbers |= {f"memory/{whose}_peak_bytes": peak for whose, peak in self._peaks.items()}
        self._peaks = {}
        if isinstance(self._engine, RemoteEngine):
            numbers |= self._engine.numbers()
        if (report := self._engine.last_report) is not None:
            numbers |= {
                "reshard/received_bytes": report.received_bytes,
                "reshard/copied_bytes": report.copied_bytes,
                "reshard/peak_bytes": report.peak_bytes,
                "reshard/gigabytes_per_second": report.gigabytes_per_second,
            }
        return numbers


def probe_engine(
    engine: RolloutEngine,
    policy: PolicyEngine,
    rows: Sequence[PromptRow],
    batches: ExperienceBatches,
    sampling: SamplingParams,
) -> float:
    """Mean |difference| in nats of an updated engine from the trainer, over a few tokens that it generates.

    A stale prefix cache, a lost or misplaced weight and a tied head that was forgotten show as whole nats.
    The first prompts of `rows` are continued, the same in every step.
    """
    short = replace(sampling, num_samples=1, max_new_tokens=min(_NUM_TOKENS, sampling.max_new_tokens))
    asked = [
        Prompt(id=_FIRST_ID + number, tokens=row.tokens) for number, row in enumerate(rows[:_NUM_PROMPTS])
    ]
    groups = engine.generate(asked, short)
    nothing = Scored(reward=0.0, lenient=0.0, parts=())
    responses = [
        Response(group=group.prompt.id, row=row, rollout=group.rollouts[0], scored=nothing)
        for group, row in zip(groups, rows, strict=False)
    ]
    data = batches.lay_out(responses, everything=True)
    assert data is not None, "an engine generates at least one token"
    ours = score_responses(policy, data, temperature=sampling.temperature)
    differences = [
        abs(mine - theirs)
        for number, response in enumerate(responses)
        for mine, theirs in zip(ours[number], response.rollout.logprobs, strict=True)
    ]
    return sum(differences) / len(differences)
