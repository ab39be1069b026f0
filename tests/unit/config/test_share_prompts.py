"""What keeps a run from sharing prompts is said by name, and the plan knows what sharing costs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_sftrl.apps.plan.activations import microbatch_of
from megatron_sftrl.apps.plan.job import Workload, workload_of
from megatron_sftrl.apps.plan.model_state import grid_of
from megatron_sftrl.config.checks import check_run
from megatron_sftrl.errors import UserError
from megatron_sftrl.models import from_hf_config
from tests.unit.config.test_checks import MIXTURE
from tests.unit.config.test_router_replay import problems_of, run_with
from tests.unit.models.hf_files import values

SHARED = ("rollout.share_prompts=true", "rollout.router_replay=false")
PACKED = ("batch={global_size: 8, packing: true, max_tokens: 128}",)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (PACKED, ""),
        ((*PACKED, *MIXTURE), ""),
        (("batch={global_size: 8}",), "rollout.share_prompts puts the responses to a prompt into one packed"),
        ((*PACKED, "rollout.group_size=1"), "rollout.share_prompts has no effect: rollout.group_size = 1"),
        ((*PACKED, *MIXTURE, "model.moe_aux_loss_coeff=0.1"), "model.moe_aux_loss_coeff balances experts"),
    ],
)
def test_what_sharing_does_not_know_is_named(overrides: tuple[str, ...], said: str) -> None:
    found = problems_of(run_with(*SHARED, *overrides))
    assert said in found
    assert ("rollout.share_prompts" in found) == bool(said)


def test_a_plan_counts_the_copies_that_attention_makes_of_a_shared_prompt() -> None:
    def prompts_read(*overrides: str) -> float:
        run = run_with(*PACKED, *overrides, "rollout.router_replay=false", "rollout.group_size=4")
        return microbatch_of(run, grid_of(run.parallel, 1), "torch").prompts_read

    assert prompts_read() == 0
    # 31 of a prompt's 32 tokens stand once in front of 4 responses of 33 positions.
    assert prompts_read(*SHARED) == pytest.approx(4 * 31 / (31 + 4 * 33))


def test_a_plan_estimates_a_shared_prompt_once_for_its_group() -> None:
    def work(*overrides: str) -> Workload:
        run = run_with(*PACKED, *overrides, "rollout.router_replay=false", "rollout.group_size=4")
        return workload_of(run, grid_of(run.parallel, 1))

    # 64 tokens a sequence, 32 of them the prompt's: of a group of 4 each takes 40.
    assert (work().microbatch_tokens, work().num_microbatches) == (2 * 64, 4)
    assert (work(*SHARED).microbatch_tokens, work(*SHARED).num_microbatches) == (3 * 40, 3)


def test_a_state_does_not_begin_behind_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(values("qwen3_5_text")))
    with pytest.raises(UserError, match=r"share_prompts: a gated delta net \(qwen3_5_text\) begins every"):
        check_run(run_with(*SHARED, *PACKED), from_hf_config(tmp_path), 1, loss_needs=())
