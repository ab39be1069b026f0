"""Bringing a rollout engine up to date, and the proof that it is: do both agree on log-probabilities?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from megatron_sftrl.config.schema import GrpoConfig
from megatron_sftrl.data.prompts import PromptRow
from megatron_sftrl.engine.optimizer import TrainingState
from megatron_sftrl.engine.policy import PolicyEngine
from megatron_sftrl.observability.watch import take_device_peak
from megatron_sftrl.rl.rewards import Scored
from megatron_sftrl.rollout.api import RolloutEngine
from megatron_sftrl.trainers.experience import ExperienceBatches, Response, score_responses
from megatron_sftrl.types import Prompt, SamplingParams

# Trainer and rollout engine share one device's memory: each leaves it to the other for its turn.


class MemoryTurns:
    """Whose turn it is, and the most memory that each took; the trainer begins.

    Args:
        engine: asleep.
        training_state: what the trainer gives up for the engine's turn; None if it gives up nothing.
        take_peak: bytes of the device that were in use at the worst moment since the last call; None on the
            CPU, whose peak cannot be started anew.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        training_state: TrainingState | None,
        *,
        take_peak: Callable[[], int] | None,
    ) -> None:
        self._engine, self._training_state, self._take_peak = engine, training_state, take_peak
        self._peaks: dict[str, int] = {}

    def to_engine(self) -> None:
        """The trainer leaves, then the engine wakes."""
        self._note("train")
        if self._training_state is not None:
            self._training_state.leave()
        self._engine.wake()

    def to_trainer(self) -> None:
        """The engine sleeps, then the trainer comes back."""
        self._note("generate")
        self._engine.sleep()
        if self._training_state is not None:
            self._training_state.come_back()

    def peaks(self) -> dict[str, int]:
        """Most bytes in use in each one's turns since the last call; in the trainer's turn."""
        self._note("train")
        peaks, self._peaks = self._peaks, {}
        return peaks

    def _note(self, whose: str) -> None:
        if self._take_peak is not None:
            self._peaks[whose] = max(self._peaks.get(whose, 0), self._take_peak())


_NUM_PROMPTS, _NUM_TOKENS = 2, 8
_FIRST_ID = 2**40
"""Far above the ids of a run's prompts: the probe draws from streams of its own."""


class EngineUpdates:
    """Updates of one engine from one policy.

    Args:
        config: of the run.
        engine, policy: of the run; the engine sleeps.
        rows: prompts; the first ones are the probe's.
        batches: layout of the trainer.
        sampling: of the run.
    """

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
        self._turns = MemoryTurns(
            engine,
            policy.training_state if config.rollout.offload else None,
            take_peak=(lambda: take_device_peak(device)) if device.type == "cuda" else None,
        )

    def refresh(self, version: int) -> None:
        """Leave the memory to the engine, hand it the weights, and compare; every rank calls it.

        Until release() only the policy's forward works.

        Args:
            version: steps behind the weights.
        Raises:
            RuntimeError: on every rank: the engine did not take every weight, or does not agree.
        """
        self._policy.gather_parameters()
        self._turns.to_engine()
        self._engine.update(self._policy, version=version)
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

    def release(self) -> None:
        """The engine sleeps and the trainer has the memory again; the next generation needs a refresh()."""
        self._turns.to_trainer()

    def numbers(self) -> dict[str, float]:
        """What the last update cost this rank, the probe, and the memory that each turn of the step took."""
        numbers: dict[str, float] = {} if self._probed is None else {"mismatch/probe": self._probed}
        numbers |= {f"memory/{whose}_peak_bytes": peak for whose, peak in self._turns.peaks().items()}
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
    """Mean |difference| in nats between engine and trainer, over a few tokens that the engine generates.

    A stale prefix cache, a lost or misplaced weight and a tied head that was forgotten show as whole nats.

    Args:
        engine: just updated.
        policy: with the same weights.
        rows: of the run's prompts; the first ones are continued, the same in every step.
        batches: layout of the trainer.
        sampling: of the run.
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
