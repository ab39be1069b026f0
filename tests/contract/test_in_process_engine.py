"""The contract of rollout engines, held by the training engine itself in every layout."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from tests.contract.models import save_versions
from tests.contract.rollout_contract import Observed, RolloutContract, decode, observe
from tests.ranks import run_ranks

if TYPE_CHECKING:
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.rollout.in_process import InProcessEngine


@dataclass(frozen=True)
class Scenario:
    model: str
    parallel: dict[str, Any] = field(default_factory=dict)
    world_size: int = 2
    has_large_logits: bool = False


# tp2 with sequence parallelism, vp2 and dp2 generate in tests/e2e/test_grpo_layouts.py.
SCENARIOS = {
    "llama_tied": Scenario("llama_tied", world_size=1, has_large_logits=True),
    "qwen3_moe": Scenario("qwen3_moe", world_size=1),
    "tp2": Scenario("qwen2", {"tp": 2}),
    "pp2": Scenario("llama_tied", {"pp": 2}),
    "cp2": Scenario("qwen3", {"cp": 2}),
    "ep2": Scenario("mixtral", {"ep": 2}),
}


def make_engine(policy: PolicyEngine) -> InProcessEngine:
    """Seven responses at once: fewer than there are, and no multiple of a group."""
    from megatron_sftrl.rollout.in_process import InProcessEngine

    return InProcessEngine(policy.parallel, max_responses=7, decode=decode)


@pytest.fixture(scope="module", params=SCENARIOS)
def observed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Observed:
    scenario = SCENARIOS[request.param]
    versions = save_versions(
        scenario.model,
        tmp_path_factory.mktemp("versions"),
        num_versions=2,
        has_large_logits=scenario.has_large_logits,
    )
    ranks = run_ranks(
        scenario.world_size, observe, make_engine, versions.directories, scenario.parallel, timeout_s=300
    )
    return Observed(versions=versions, ranks=ranks)


class TestInProcessEngine(RolloutContract):
    # The promised bound.
    tolerance = 1e-6
