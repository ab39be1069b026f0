"""Sizes of real models: the ranks' parts add up to the published number of parameters."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sftrl.apps.plan.memory import _engine_elements
from megatron_sftrl.apps.plan.model_state import grid_of, model_state
from megatron_sftrl.config.schema import ParallelSection
from megatron_sftrl.models.architecture import num_parameters
from megatron_sftrl.models.hf_config import from_hf_config
from tests.unit.config.example import example
from tests.unit.models.published import architecture as read_architecture
from tests.unit.models.published import config
from tests.unit.plan.public_models import PARAMETERS, model_directory

LAYOUTS = {
    "Llama-3.3-70B-Instruct": {"tp": 8, "pp": 4, "vp": 5},
    "Qwen2.5-72B-Instruct": {"tp": 4, "pp": 8},
    "Qwen3-30B-A3B": {"tp": 2, "pp": 2, "ep": 8, "etp": 1},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_parts_of_all_ranks_are_the_published_parameters(name: str, tmp_path: Path) -> None:
    architecture = from_hf_config(model_directory(name, tmp_path))
    parallel = ParallelSection.model_validate(LAYOUTS[name])
    grid = grid_of(parallel, 64)
    run = example("model.dtype=bf16", "loss={name: sft}", "reference=null").model_copy(
        update={"parallel": parallel}
    )
    states = [model_state(architecture, run, grid, stage=stage) for stage in range(grid.pp)]
    # Norms and routers stand on every tensor-parallel rank, and attention in a mixture on more ranks than an
    # expert: less than 4 % of these models in all.
    per_rank = sum(state.parameters for state in states) / 2
    if architecture.mixture is None:
        assert per_rank * grid.tp == pytest.approx(PARAMETERS[name], rel=1e-3)
    a, mixture = architecture, architecture.mixture
    if mixture is not None:
        experts = a.num_layers * mixture.num_experts * 3 * a.hidden_size * a.ffn_hidden_size
        dense = PARAMETERS[name] - experts
        assert per_rank == pytest.approx(experts / grid.ep + dense / grid.tp, rel=5e-3)


def test_bytes_follow_the_dtypes_and_the_distributed_optimizer_divides_the_optimizer(tmp_path: Path) -> None:
    architecture = from_hf_config(model_directory("Llama-3.3-70B-Instruct", tmp_path))
    for dtype, sharded, expected in (
        ("bf16", False, (2, 4, 12)),
        ("fp32", False, (4, 4, 8)),
        ("bf16", True, (2, 4, 12 / 4)),
        ("fp32", True, (4, 4, 8 / 4)),
    ):
        parallel = ParallelSection(tp=8, pp=2, distributed_optimizer=sharded)
        run = example(f"model.dtype={dtype}", "reference.placement=offload").model_copy(
            update={"parallel": parallel}
        )
        state = model_state(architecture, run, grid_of(parallel, 64), stage=0)
        elements = state.reference / {"bf16": 2, "fp32": 4}[dtype]
        found = [size / elements for size in (state.parameters, state.gradients, state.optimizer)]
        # Tensors of 8192 columns need next to no padding.
        assert found == pytest.approx(expected, rel=1e-6)


def test_moments_in_bf16_offloaded_shares_and_copies_for_fp8_are_counted(tmp_path: Path) -> None:
    architecture = from_hf_config(model_directory("Llama-3.3-70B-Instruct", tmp_path))
    parallel = ParallelSection(tp=8, pp=2, distributed_optimizer=True)
    half = ParallelSection(tp=8, pp=2, distributed_optimizer=True, grad_reduce_dtype="bf16")
    grid = grid_of(parallel, 64)

    def found(parallel: ParallelSection, *overrides: str) -> list[float]:
        run = example("model.dtype=bf16", *overrides).model_copy(update={"parallel": parallel})
        state = model_state(architecture, run, grid, stage=1)
        sizes = (state.gradients, state.fp32_gradients, state.optimizer, state.optimizer_on_host)
        return [size / (state.reference / 2) for size in sizes]

    low = "optim={lr: 1e-5, exp_avg_dtype: bf16, exp_avg_sq_dtype: bf16}"
    away = "optim={lr: 1e-5, cpu_offload: 0.75}"
    assert found(parallel) == pytest.approx([4, 0, 12 / 4, 0], rel=1e-6)
    assert found(half) == pytest.approx([2, 4 / 4, 12 / 4, 0], rel=1e-6)
    assert found(half, low) == pytest.approx([2, 0, 8 / 4, 0], rel=1e-6)
    assert found(parallel, "optim={lr: 1e-5, exp_avg_sq_dtype: bf16}")[2] == pytest.approx(10 / 4, rel=1e-6)
    # Three quarters, each weight with a copy of its gradient.
    assert found(half, away) == pytest.approx([2, 1 / 4, 3 / 4, 0.75 * 16 / 4], rel=1e-6)

    plain, eight = (
        model_state(architecture, example("model.dtype=bf16", *words), grid, stage=1).eight_bit
        for words in ([], ["train.fp8={}"])
    )
    a = architecture
    block = a.hidden_size * (2 * 8192 + 2 * 1024 + 3 * a.ffn_hidden_size)
    assert (plain, eight) == (0, 3 * 40 * block // 8)  # with the transpose, and the reference's


@pytest.mark.parametrize(("family", "tp"), [("phi3", 1), ("phi3", 2), ("phi3", 8), ("glm4", 2), ("glm4", 8)])
def test_an_engine_holds_its_part_of_tensors_that_files_fuse(tmp_path: Path, family: str, tp: int) -> None:
    """vLLM reads them whole and keeps its rows: as many as of a Llama's, whose files have them apart."""
    sizes = (512, 1024, 3, 16, 2, 1024)
    fused, apart = (
        read_architecture(tmp_path, config(name, sizes, attention_bias=False, head_dim=32))
        for name in (family, "llama")
    )
    norms = num_parameters(fused) - num_parameters(apart)  # of a GLM-4, behind attention and MLP
    assert _engine_elements(fused, tp)[0] == _engine_elements(apart, tp)[0] + norms
