"""What keeps a run from router replay is said by name."""

from __future__ import annotations

import pytest

from megatron_sftrl.apps.plan.job import Hardware
from megatron_sftrl.apps.plan.search import plan_run
from megatron_sftrl.config.checks import check_run
from megatron_sftrl.config.load import config_from_text
from megatron_sftrl.config.schema import GrpoConfig
from megatron_sftrl.errors import UserError
from megatron_sftrl.models import architecture_of
from tests.unit.config.example import EXAMPLE
from tests.unit.config.test_checks import MIXTURE

RUN = (
    EXAMPLE.replace("data: {train: [train.jsonl], max_length: 128}", "data: {train: [prompts.jsonl]}")
    .replace("loss: {name: gift, beta: 5}", "loss: {name: grpo}")
    .replace("reference: {kind: frozen}", "rewards: [{name: format, pattern: x}]")
)
ROLLOUT = (
    "data.max_prompt_length=32",
    "rollout={prompts_per_step: 1, max_new_tokens: 32, router_replay: true}",
)
MOE = ("train.recompute=selective", "train.recompute_modules=[moe]")
FP8 = ("model.dtype=bf16", "train.fp8={}")


def run_with(*overrides: str) -> GrpoConfig:
    return config_from_text(RUN, source="run.yaml", overrides=[*ROLLOUT, *overrides], schema=GrpoConfig)


def problems_of(run: GrpoConfig) -> str:
    try:
        check_run(run, architecture_of(run.model), 1, loss_needs=())
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ((), "rollout.router_replay: a qwen3 without experts has no routers"),
        ((*MIXTURE, "parallel.moe_router_fusion=true"), "the fused router of parallel.moe_router_fusion"),
        ((*MIXTURE, *FP8, *MOE), "train.recompute_modules = moe under train.fp8"),
        ((*MIXTURE, *FP8), ""),
        ((*MIXTURE, *MOE), ""),
        (("rollout.router_replay=false",), ""),
    ],
)
def test_what_router_replay_does_not_know_is_named(overrides: tuple[str, ...], said: str) -> None:
    found = problems_of(run_with(*overrides))
    assert said in found
    assert ("rollout.router_replay" in found) == bool(said)


def test_a_plan_refuses_a_dense_model_as_its_run_does() -> None:
    run = run_with()
    with pytest.raises(UserError, match=r"rollout\.router_replay: a qwen3 without experts"):
        plan_run(architecture_of(run.model), run, 1, Hardware(gpu_memory=80e9), loss_needs=())
