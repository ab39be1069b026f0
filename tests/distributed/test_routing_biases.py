"""model.moe_bias_update_rate: biases follow the visits of each step's real tokens, in every layout."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.engine_outputs import _loaded_policy, engine_config
from tests.distributed.test_layouts import step_batches
from tests.grid import cases
from tests.hf_models import read_tensors, write_model
from tests.ranks import run_ranks

RATE, NUM_STEPS = 0.125, 3  # large enough to send tokens elsewhere
NAME = ".e_score_correction_bias"
SPLIT = {"tp": 2, "sequence_parallel": True}
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {},
    "sp2": SPLIT,
    "sp2 etp1 ep2": {**SPLIT, "ep": 2, "etp": 1},
    "cp2": {"cp": 2},
    "pp2": {"pp": 2},
    "ep2": {"ep": 2, "distributed_optimizer": True},
}


@dataclass(frozen=True, kw_only=True)
class Moved:
    """Of one rank's layers with experts, by number of the layer.

    Args:
        biases: [steps + 1, E] before the first step and behind each.
        visits: [steps, E] of real tokens, counted by the test at the routers' outputs; one process alone.
    """

    biases: dict[int, Tensor]
    visits: dict[int, Tensor]


def moved(directory: Path, parallel: dict[str, Any], recompute: str = "none", loss: float = 0.0) -> Moved:
    """Train some steps, each of two micro-batches with padding; `loss` is what the optimizer is told."""
    from megatron.core import parallel_state

    from megatron_sftrl.losses.registry import build_loss
    from megatron_sftrl.models import architecture_of

    run = engine_config(directory, parallel, "fp32")
    model = run.model.model_copy(update={"moe_bias_update_rate": RATE})
    train = run.train.model_copy(update={"recompute": recompute})
    run = run.model_copy(update={"model": model, "train": train})
    context, policy = _loaded_policy(run, architecture_of(run.model), with_optimizer=True)
    policy.reload_optimizer_weights()
    routers = {
        layer.layer_number: layer.mlp.router
        for chunk in policy.chunks
        for layer in chunk.decoder.layers  # type: ignore[union-attr]
        if hasattr(layer.mlp, "router")
    }
    seen: dict[int, list[Tensor]] = {number: [] for number in routers}
    for number, router in routers.items():
        router.register_forward_hook(
            lambda _, __, output, number=number: seen[number].append(output[1].detach().cpu())
        )
    biases = {number: [router.expert_bias.detach().clone()] for number, router in routers.items()}
    visits: dict[int, list[Tensor]] = {number: [] for number in routers}
    for step in range(NUM_STEPS):
        batches = step_batches(
            step,
            num_groups=context.dp_size,
            group=context.dp_rank,
            multiple=2 * context.cp_size * context.tp_size,
            num_microbatches=2,
        )
        for each in seen.values():
            each.clear()
        policy.forward_backward(batches, build_loss("sft", {}))
        policy.optim_step(step, num_steps=NUM_STEPS, loss=loss)
        real = [
            torch.ones(b.num_tokens, dtype=torch.bool) if b.is_padding is None else ~b.is_padding
            for b in batches
        ]
        for number, router in routers.items():
            biases[number].append(router.expert_bias.detach().clone())
            if context.world_size == 1 and recompute == "none":
                counts = [each[mask].sum(dim=0) for each, mask in zip(seen[number], real, strict=True)]
                visits[number].append(torch.stack(counts).sum(dim=0))
    parallel_state.destroy_model_parallel()
    return Moved(
        biases={number: torch.stack(each) for number, each in biases.items()},
        visits={number: torch.stack(each) for number, each in visits.items() if each},
    )


@pytest.fixture(scope="module", params=cases(["glm4_moe", "minimax_m2"], rarely=["minimax_m2"]))
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("hf"), request.param)


@functools.cache
def alone(directory: Path) -> Moved:
    return run_ranks(1, moved, directory, {})[0]


def test_a_bias_rises_where_fewer_tokens_came_than_on_average_and_falls_where_more_did(
    directory: Path,
) -> None:
    found = alone(directory)
    assert found.biases, "a mixture"
    for number, biases in found.biases.items():
        visits = found.visits[number].double()
        expected = RATE * torch.sign(visits.mean(dim=1, keepdim=True) - visits)
        assert torch.equal(biases[1:], biases[:-1] + expected.float())
        assert (expected != 0).any(dim=1).all()
    loaded = {name: each for name, each in read_tensors(directory).items() if name.endswith(NAME)}
    assert len(loaded) == len(found.biases)
    for name, bias in loaded.items():
        assert torch.equal(bias, found.biases[int(name.split(".")[2]) + 1][0]), "they start where the file is"


@pytest.mark.parametrize("layout", cases(LAYOUTS, rarely=["dp2", "sp2", "cp2", "pp2"]))
def test_every_layout_moves_them_as_one_process(directory: Path, layout: str) -> None:
    expected = alone(directory).biases
    ranks = run_ranks(2, moved, directory, LAYOUTS[layout])
    assert {number for each in ranks for number in each.biases} == expected.keys()
    for each in ranks:
        for number, biases in each.biases.items():
            assert torch.equal(biases, expected[number]), number


def test_recomputation_counts_a_visit_once(directory: Path) -> None:
    found = run_ranks(1, moved, directory, {}, "full")[0]
    for number, biases in found.biases.items():
        assert torch.equal(biases, alone(directory).biases[number])


def test_a_step_that_is_skipped_moves_nothing(directory: Path) -> None:
    found = run_ranks(1, moved, directory, {}, "none", float("nan"))[0]
    for biases in found.biases.values():
        assert not biases.diff(dim=0).any()
