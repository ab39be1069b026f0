"""After an update the engine is probed: one that does not agree with the trainer ends the run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from megatron_sftrl.config.schema import BatchSection
from megatron_sftrl.data.loader import BatchLayout
from megatron_sftrl.data.prompts import PromptRow
from megatron_sftrl.rollout.reshard import ReshardReport
from megatron_sftrl.trainers import engine_updates
from megatron_sftrl.trainers.engine_updates import EngineUpdates
from megatron_sftrl.trainers.experience import ExperienceBatches
from megatron_sftrl.types import Prompt, Rollout, RolloutGroup, SamplingParams

ROWS = [PromptRow(tokens=tokens, values={}, source="rows.jsonl:1") for tokens in ((3, 4), (5,), (6,))]
LIMIT = 0.25
REPORT = ReshardReport(
    seconds=2.0,
    received_bytes=3 * 10**9,
    sent_bytes=0,
    copied_bytes=10**9,
    peak_bytes=7,
    num_tensors=1,
    num_rounds=1,
)


class Engine:
    """Answers every prompt with two tokens of -1 nat."""

    last_report = REPORT

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.asked: list[tuple[list[Prompt], SamplingParams]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: self.calls.append(name)

    def generate(self, prompts: list[Prompt], sampling: SamplingParams) -> list[RolloutGroup]:
        self.calls.append("generate")
        self.asked.append((prompts, sampling))
        return [
            RolloutGroup(
                prompt=prompt,
                rollouts=(
                    Rollout(
                        prompt_tokens=prompt.tokens,
                        response_tokens=(7, 8),
                        logprobs=(-1.0, -1.0),
                        is_finished=False,
                    ),
                ),
                version=0,
            )
            for prompt in prompts
        ]


@contextmanager
def lent_memory(calls: list[str], *, offload: bool) -> Iterator[None]:
    calls.append("lent")
    yield
    calls.append("back")


def turn(updates: EngineUpdates, version: int) -> None:
    with updates.engine_turn(version, timed=nullcontext()):
        pass


def updates_of(
    engine: Engine, apart: tuple[float, ...], monkeypatch: pytest.MonkeyPatch, *, kind: str = "vllm"
) -> EngineUpdates:
    """The trainer's log-probabilities of both responses are the engine's + `apart`, at temperature 0.7."""

    def score(_policy: object, _data: object, *, temperature: float) -> dict[int, list[float]]:
        assert temperature == 0.7
        values = [value - 1 for value in apart]
        return {0: values[:2], 1: values[2:]}

    monkeypatch.setattr(engine_updates, "score_responses", score)
    rollout = SimpleNamespace(engine=kind, offload=False, vllm=SimpleNamespace(probe_limit=LIMIT))
    policy = SimpleNamespace(
        parallel=SimpleNamespace(device=torch.device("cpu")),
        gather_parameters=lambda: engine.calls.append("gather_parameters"),
        lent_memory=partial(lent_memory, engine.calls),
    )
    batches = ExperienceBatches(
        batch=BatchSection.model_validate({"global_size": 3, "micro_size": 3}),
        layout=BatchLayout(),
        max_length=20,
        pad_id=0,
        # Neither response has its end token: masked, there would be nothing to compare.
        mask_truncated=True,
    )
    sampling = SamplingParams(temperature=0.7, max_new_tokens=100, num_samples=8)
    return EngineUpdates(
        cast(Any, SimpleNamespace(rollout=rollout)), engine, cast(Any, policy), ROWS, batches, sampling
    )


def test_the_probe_is_the_mean_difference_over_a_few_tokens_of_the_updated_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Engine()
    updates = updates_of(engine, (0.5, -0.25, 0.0, 0.0), monkeypatch)
    with updates.engine_turn(3, timed=nullcontext()):
        assert engine.calls == ["gather_parameters", "lent", "update", "generate"]
    assert engine.calls[4:] == ["sleep", "back"]
    assert updates.numbers()["mismatch/probe"] == (0.5 + 0.25) / 4
    ((prompts, sampling),) = engine.asked
    assert [prompt.tokens for prompt in prompts] == [(3, 4), (5,)]
    # Streams that no prompt of the run has, and no more tokens than a probe needs.
    assert min(prompt.id for prompt in prompts) >= 2**40
    assert (sampling.num_samples, sampling.max_new_tokens, sampling.temperature) == (1, 8, 0.7)


@pytest.mark.parametrize("apart", [(1.0, -1.0, 1.0, -1.0), (0.0, 0.0, 0.0, 1.01), (math.nan, 0.0, 0.0, 0.0)])
def test_an_engine_that_does_not_agree_ends_the_run(
    apart: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    updates = updates_of(Engine(), apart, monkeypatch)
    with pytest.raises(
        RuntimeError, match=r"after the update of step 3 .* rollout\.vllm\.probe_limit = 0\.25"
    ):
        turn(updates, 3)


def test_a_difference_at_the_limit_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    updates = updates_of(Engine(), (LIMIT, -LIMIT, LIMIT, LIMIT), monkeypatch)
    turn(updates, 0)
    assert updates.numbers()["mismatch/probe"] == LIMIT


def test_an_engine_that_reads_the_policy_s_own_weights_is_not_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine()
    updates = updates_of(engine, (9.0,) * 4, monkeypatch, kind="in_process")
    turn(updates, 0)
    assert engine.calls == ["gather_parameters", "lent", "update", "sleep", "back"]
    assert "mismatch/probe" not in updates.numbers()


def test_the_cost_of_the_update_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    updates = updates_of(Engine(), (0.0,) * 4, monkeypatch)
    turn(updates, 0)
    numbers = updates.numbers()
    # What reached the engine, from other ranks or from its own: 4 GB in 2 s.
    assert {name: numbers[name] for name in numbers if name.startswith("reshard/")} == {
        "reshard/received_bytes": 3 * 10**9,
        "reshard/copied_bytes": 10**9,
        "reshard/peak_bytes": 7,
        "reshard/gigabytes_per_second": 2.0,
    }
