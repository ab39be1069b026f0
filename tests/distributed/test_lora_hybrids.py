"""Adapters of hybrids, on attention with gates and on gated delta nets: answers, and a run that goes on.

What they are trained to is in tests/contract/test_peft_agrees.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.engine_outputs import _greedy
from tests.distributed.hf_models import auto_model, save_model, transformers_logits
from tests.distributed.test_layouts import step_batches
from tests.distributed.test_lora import LORA, policy_over, write_merged
from tests.grid import cases
from tests.ranks import run_ranks

EVERY = {**LORA, "targets": "all-linear"}
SP2 = {"tp": 2, "sequence_parallel": True}
PROMPTS = [(5,), tuple(range(1, 41)), tuple(range(60, 95))]
NUM_NEW = 24
LAYOUTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "one process": ("qwen3_5_text", 1, {}),
    "sp2": ("qwen3_next", 2, SP2),
    "pp2": ("qwen3_5_text", 2, {"pp": 2}),
    "ep2": ("qwen3_5_moe_text", 2, {"ep": 2}),
}


def answered(directory: Path, parallel: dict[str, Any]) -> list[tuple[int, ...]]:
    """Greedy, with the cache."""
    from megatron.core import parallel_state

    policy, _ = policy_over(directory, parallel, EVERY)
    responses = _greedy(policy, PROMPTS, NUM_NEW)
    parallel_state.destroy_model_parallel()
    return responses


@pytest.mark.parametrize("layout", cases(LAYOUTS, rarely=["one process", "ep2"]))
def test_greedy_tokens_are_those_of_the_merged_model_in_transformers(tmp_path: Path, layout: str) -> None:
    from megatron_sftrl.config.lora import ALL_TARGETS

    name, world_size, parallel = LAYOUTS[layout]
    save_model(name, tmp_path / "base")
    merged = write_merged(tmp_path / "base", {"targets": ALL_TARGETS}, tmp_path / "merged")
    models = [
        auto_model().from_pretrained(path, dtype=torch.float32).eval() for path in (merged, tmp_path / "base")
    ]
    is_other = []
    for responses in run_ranks(world_size, answered, tmp_path / "base", parallel):
        for prompt, response in zip(PROMPTS, responses, strict=True):
            whole = torch.tensor([*prompt, *response])
            ours, base = (
                tuple(
                    transformers_logits(model, whole, [len(whole)]).argmax(1)[len(prompt) - 1 : -1].tolist()
                )
                for model in models
            )
            assert response == ours
            is_other.append(response != base)
    assert all(is_other), "the adapters change nothing"


def went_on(directory: Path, parallel: dict[str, Any], checkpoints: str, from_step: int) -> list[list[float]]:
    """Loss and gradient norm of each step up to the fourth; behind the second a checkpoint is written."""
    from megatron.core import parallel_state

    from megatron_sftrl.engine.checkpoint import CheckpointStore, TrainerState
    from megatron_sftrl.engine.policy import Base
    from megatron_sftrl.losses.registry import build_loss

    optim = {"lr": 0.01, "eps": 1e-4}
    policy, _ = policy_over(directory, parallel, EVERY, optim=optim)
    policy.base, context = Base(path=str(directory), weights="of the test"), policy.parallel
    curve = []
    with CheckpointStore(Path(checkpoints), context, keep_last=1) as store:
        if from_step:
            latest = store.latest()
            assert latest is not None
            store.load(latest, policy, None)
        for step in range(from_step, 4):
            batches = step_batches(
                step,
                num_groups=context.dp_size,
                group=context.dp_rank,
                multiple=2 * context.tp_size,
                num_microbatches=4 if context.pp_size > 1 else 2,
            )
            report = policy.forward_backward(batches, build_loss("sft", {}))
            curve.append([report.loss, policy.optim_step(step, num_steps=4).grad_norm])
            if step == 1 and not from_step:
                store.save(TrainerState(step=2), policy, None)
    parallel_state.destroy_model_parallel()
    return curve


RESUMED = {"qwen3_5_text": (SP2, {"pp": 2}), "qwen3_next": ({"pp": 2}, {**SP2, "etp": 1, "ep": 2})}


@pytest.mark.parametrize("name", cases(RESUMED, rarely=["qwen3_next"]))
def test_a_run_goes_on_in_another_layout(tmp_path: Path, name: str) -> None:
    save_model(name, tmp_path / "base")
    first, second = RESUMED[name]
    whole = run_ranks(2, went_on, tmp_path / "base", first, str(tmp_path / "checkpoints"), 0)[0]
    for rest in run_ranks(2, went_on, tmp_path / "base", second, str(tmp_path / "checkpoints"), 2):
        torch.testing.assert_close(torch.tensor(rest), torch.tensor(whole[2:]), rtol=1e-5, atol=1e-5)
    assert whole[-1][0] != pytest.approx(whole[0][0], abs=1e-2), "nothing was learned"
