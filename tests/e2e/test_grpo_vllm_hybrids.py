"""`sftrl grpo` of a hybrid with vLLM, in bf16: it learns, and engine and trainer stay together."""

from __future__ import annotations

import importlib.util
import statistics
from pathlib import Path

import pytest

from tests.contract.models import SIZES
from tests.contract.test_vllm_hybrids import CHANGES
from tests.e2e.grpo_project import GrpoProject, assert_no_null, samples_of
from tests.e2e.product import sftrl, sftrl_each
from tests.e2e.project import VOCAB_SIZE, Metrics, make_tokenizer, metrics_of, without_timing
from tests.e2e.test_bad_input import assert_one_message
from tests.grid import HOW_TO_RUN_ALL, is_full
from tests.hf_models import write_model

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vLLM is not here: bash tests/oracles.sh installs it"
    ),
    pytest.mark.skipif(not is_full(), reason=HOW_TO_RUN_ALL),
]

NUM_STEPS = 10
SAME_LOGPROBS = 0.1
"""Nats between engine and trainer in bf16, the mean; of a token 1.7 where they choose other experts."""


def assert_together(metrics: Metrics) -> None:
    for row in metrics:
        print({name: row[name] for name in row if name.startswith("mismatch/")})
        assert 0 < row["mismatch/mean"] <= SAME_LOGPROBS
        assert 0 < row["mismatch/probe"] <= SAME_LOGPROBS


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """A Qwen3-Next of one layer of each kind."""
    sizes = {**SIZES, **CHANGES["qwen3_next"], "vocab_size": VOCAB_SIZE, "num_hidden_layers": 2}
    base = write_model(tmp_path_factory.mktemp("hybrid") / "base", "qwen3_next", std=0.1, **sizes)
    make_tokenizer(base)
    return (
        "model.architecture=null",
        f"model.hf={base}",
        "model.dtype=bf16",
        "rollout.engine=vllm",
        "rollout.vllm.max_num_seqs=16",
        "optim.lr=0.01",
        f"train.steps={NUM_STEPS}",
    )


def test_the_reward_rises_and_engine_and_trainer_stay_together(
    model: tuple[str, ...], grpo: GrpoProject, tmp_path: Path
) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    for each in ((whole,), (halves, "train.steps=4"), (halves,)):
        sftrl(*grpo.command(each[0], *model, *each[1:]))
    metrics = metrics_of(whole)
    assert_no_null(metrics)
    assert len(metrics) == NUM_STEPS
    rewards = [row["reward/mean"] for row in metrics]
    print(f"rewards {rewards}")
    assert_together(metrics)
    assert statistics.mean(rewards[-3:]) > statistics.mean(rewards[:2]) + 0.05
    assert samples_of(halves) == samples_of(whole)
    assert without_timing(metrics_of(halves)) == without_timing(metrics)


def test_fp32_is_refused_by_name(model: tuple[str, ...], grpo: GrpoProject, tmp_path: Path) -> None:
    (done,) = sftrl_each([grpo.command(tmp_path / "run", *model, "model.dtype=fp32")])
    assert_one_message(done, ("on the CPU in bf16 alone", "set model.dtype: bf16"))
    assert not (tmp_path / "run").exists()


TWO = {
    "an engine over both": ("parallel={tp: 2, sequence_parallel: true}", "rollout.vllm.tp=2"),
    "two engines": ("parallel.pp=2",),
    "a generator": ("rollout.devices=1",),
    "adapters": ("parallel={tp: 2, sequence_parallel: true}", "lora={rank: 4, alpha: 8}"),
}


@pytest.mark.parametrize("name", TWO)
def test_two_processes_stay_together(
    name: str, model: tuple[str, ...], grpo: GrpoProject, tmp_path: Path
) -> None:
    sftrl(*grpo.command(tmp_path / "run", *model, "train.steps=3", *TWO[name]), ranks=2)
    metrics = metrics_of(tmp_path / "run")
    assert_together(metrics)
    assert all(row["reshard/received_bytes"] > 0 for row in metrics)
