"""The search proposes what the run's own checks accept and what fits, and nothing that fits is left out."""

from __future__ import annotations

import itertools
from pathlib import Path

from megatron_sftrl.apps.plan.job import Hardware
from megatron_sftrl.apps.plan.memory import plan_memory
from megatron_sftrl.apps.plan.search import plan_run, search_layouts
from megatron_sftrl.config.checks import check_run
from megatron_sftrl.config.schema import ParallelSection
from megatron_sftrl.models.architecture import Architecture, from_section
from megatron_sftrl.models.hf_config import from_hf_config
from tests.unit.config.example import example
from tests.unit.plan.public_models import model_directory

H100 = Hardware(gpu_memory=80e9)
SHARDED = ("parallel.distributed_optimizer=true",)


def small() -> Architecture:
    section = example().model.architecture
    assert section is not None
    return from_section(section)


def test_every_accepted_layout_of_a_small_model_is_found_fastest_first() -> None:
    """None of them needs recomputation."""
    run = example()
    found = search_layouts(small(), run, 8, H100, loss_needs=("reference",))
    ends = [(p.grid.first_stage_layers, p.grid.last_stage_layers) for p in found]
    even = [plan for plan, end in zip(found, ends, strict=True) if end == (None, None)]
    layouts = {(p.grid.tp, p.grid.pp, p.grid.vp, p.grid.cp) for p in even}
    assert {*ends} == {(None, None), (None, 1)}  # 4 layers
    assert len(found) == len({p.overrides for p in found})
    assert {p.config.train.recompute for p in found} == {"none"}
    expected = set()
    for tp, pp, vp, cp in itertools.product((1, 2, 4, 8), repeat=4):
        parallel = ParallelSection(tp=tp, pp=pp, vp=vp, cp=cp, sequence_parallel=tp > 1)
        try:
            check_run(run.model_copy(update={"parallel": parallel}), small(), 8, loss_needs=("reference",))
        except ValueError:
            continue
        expected.add((tp, pp, vp, cp))
    assert layouts == expected
    assert len(expected) > 20
    times = [plan.estimate.total for plan in found]
    assert times == sorted(times)


def test_less_memory_leaves_fewer_layouts_and_all_of_them_fit(tmp_path: Path) -> None:
    architecture = from_hf_config(model_directory("Llama-3.3-70B-Instruct", tmp_path))
    run = example(
        "model.dtype=bf16",
        "data.max_length=8192",
        "parallel.distributed_optimizer=true",
        "batch.global_size=64",
    )
    counts = []
    for size in (140e9, 80e9, 40e9, 20e9):
        hardware = Hardware(gpu_memory=size)
        found = search_layouts(architecture, run, 64, hardware, loss_needs=("reference",))
        assert all(plan.memory.fullest.fullest.total <= size for plan in found)
        again = [plan_run(architecture, p.config, 64, hardware, loss_needs=("reference",)) for p in found]
        assert [plan.estimate for plan in again] == [plan.estimate for plan in found]
        counts.append(len(found))
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[1] > counts[2] > counts[3] == 0


def test_a_layout_recomputes_no_more_than_it_has_to(tmp_path: Path) -> None:
    architecture = from_hf_config(model_directory("Llama-3.3-70B-Instruct", tmp_path))
    run = example("model.dtype=bf16", "data.max_length=8192", "batch.global_size=64", *SHARDED)
    found = search_layouts(architecture, run, 64, H100, loss_needs=("reference",))
    ways = {(p.config.train.recompute, p.config.train.recompute_layers is None) for p in found}
    assert ways == {("none", True), ("selective", True), ("full", False), ("full", True)}
    for plan in found:
        train = plan.config.train
        if train.recompute == "none":
            continue
        deepest = plan.grid.deepest_stage(architecture)
        layers = train.recompute_layers or plan.grid.chunk_layers(architecture, stage=deepest)
        less: dict[str, object] = {"recompute": "none"}
        if train.recompute == "full":
            less = {"recompute_layers": layers - 1} if layers > 1 else {"recompute": "selective"}
        cheaper = plan.config.model_copy(update={"train": train.model_copy(update=less)})
        memory = plan_memory(architecture, cheaper, plan.grid, H100)
        assert memory.fullest.fullest.total > 80e9, plan.overrides


def test_tensor_parallelism_stays_inside_a_node() -> None:
    found = search_layouts(
        small(), example(), 8, Hardware(gpu_memory=80e9, gpus_per_node=2), loss_needs=("reference",)
    )
    assert {plan.grid.tp for plan in found} == {1, 2}
