"""What the planner says a rank will hold is what small real runs do hold."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from megatron_sftrl.apps.plan.activations import microbatch_of, step_peak
from megatron_sftrl.apps.plan.model_state import (
    ModelState,
    buffer_layout,
    chunk_parameters,
    grid_of,
    model_state,
)
from megatron_sftrl.config.schema import RunConfig
from megatron_sftrl.models import architecture_of
from megatron_sftrl.models.architecture import from_section
from megatron_sftrl.models.hf_families import hf_family
from tests.distributed.hf_models import CONFIGS
from tests.distributed.memory_runs import Held, measure
from tests.distributed.test_layouts import make_config
from tests.grid import cases
from tests.ranks import run_ranks

SHARDED = {"distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
MIXTURE = {"family": "qwen3_moe", "num_experts": 4, "experts_per_token": 2, "ffn_hidden_size": 24}
STATES: dict[str, tuple[int, dict[str, Any], dict[str, Any], str]] = {
    "one process, fp32": (1, {}, {}, "fp32"),
    "one process, bf16, distributed": (1, SHARDED, {}, "bf16"),
    "tp 2, bf16, biases": (2, {"tp": 2}, {"family": "qwen2"}, "bf16"),
    "dp 2, fp32, distributed": (2, SHARDED, {"tie_embeddings": True}, "fp32"),
    "dp 3, bf16, distributed": (3, SHARDED, {}, "bf16"),
    "tied pp 2, bf16, distributed, dp 2": (4, {"pp": 2, **SHARDED}, {"tie_embeddings": True}, "bf16"),
    "pp 2 vp 2, bf16, distributed": (2, {"pp": 2, "vp": 2, **SHARDED}, {}, "bf16"),
    "pp 2, 1 + 3 layers, gradients in bf16": (
        2,
        {"pp": 2, "first_stage_layers": 1, "grad_reduce_dtype": "bf16", **SHARDED},
        {},
        "bf16",
    ),
    "dp 2, gradients in bf16": (2, {"grad_reduce_dtype": "bf16", **SHARDED}, {}, "bf16"),
    "cp 2, bf16, distributed": (2, {"cp": 2, **SHARDED}, {}, "bf16"),
    "ep 2 of dp 2, bf16, distributed": (2, {"ep": 2, **SHARDED}, MIXTURE, "bf16"),
    "tp 2 etp 1 dp 2, fp32, distributed": (
        4,
        {"tp": 2, "sequence_parallel": True, "etp": 1, "ep": 2, **SHARDED},
        MIXTURE,
        "fp32",
    ),
    "ep 2 tp 2, bf16": (4, {"tp": 2, "sequence_parallel": True, "ep": 2}, MIXTURE, "bf16"),
}


def make_run(parallel: dict[str, Any], model: dict[str, Any], dtype: str, /, **sections: Any) -> RunConfig:
    """The toy run of test_layouts, with other sections."""
    tree = make_config(parallel, **model).model_dump(exclude_unset=True)
    tree["model"]["dtype"] = dtype
    return RunConfig.model_validate({**tree, **sections})


ADAPTED = {"rank": 4, "alpha": 8, "targets": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]}
ADAPTERS = {
    "tp 2, bf16, biases": ADAPTED,
    "pp 2 vp 2, bf16, distributed": {"rank": 8, "alpha": 8, "modules_to_save": ["embed_tokens", "lm_head"]},
    "ep 2 of dp 2, bf16, distributed": {"rank": 4, "alpha": 8},
}


@pytest.mark.parametrize(
    "name", cases(ADAPTERS, rarely=["tp 2, bf16, biases", "ep 2 of dp 2, bf16, distributed"])
)
def test_adapters_are_planned_to_the_byte(name: str) -> None:
    world_size, parallel, model, dtype = STATES[name]
    sections = {"loss": {"name": "curiosft", "top_k": 16}, "reference": {"kind": "moving_average"}}
    run = make_run(parallel, model, dtype, lora=ADAPTERS[name], **sections)
    for held, planned in planned_and_held(run, world_size):
        assert (planned.parameters, planned.gradients) == (held.parameters, held.gradients)
        assert planned.optimizer == held.optimizer
        assert (planned.reference, planned.reference_average) == (held.reference, held.average) != (0, 0)
        assert planned.gradients > 0
        assert 0 < planned.frozen < planned.parameters


MOVING = ("one process, fp32", "pp 2 vp 2, bf16, distributed")


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "frozen") for name in STATES), *((name, "moving_average") for name in MOVING)]
)
def test_parameters_gradients_and_optimizer_are_planned_to_the_byte(name: str, kind: str) -> None:
    world_size, parallel, model, dtype = STATES[name]
    run = make_run(parallel, model, dtype, loss={"name": "gift", "beta": 4.0}, reference={"kind": kind})
    for held, planned in planned_and_held(run, world_size):
        assert (planned.parameters, planned.gradients) == (held.parameters, held.gradients)
        assert planned.optimizer == held.optimizer
        assert (planned.reference, planned.reference_average) == (held.reference, held.average)
        assert (held.average > 0) == (kind == "moving_average" and dtype == "bf16")


def planned_and_held(run: RunConfig, world_size: int) -> list[tuple[Held, ModelState]]:
    """Of each rank."""
    architecture, grid = architecture_of(run.model), grid_of(run.parallel, world_size)
    return [
        (
            held,
            model_state(
                architecture,
                run,
                grid,
                stage=held.pp_rank,
                dp_cp_rank=held.dp_cp_rank,
                edp_rank=held.edp_rank,
            ),
        )
        for held in run_ranks(world_size, measure_small, run)
    ]


FAMILIES = {
    "glm4_moe": {"pp": 2, "ep": 2, **SHARDED},
    "minimax_m2": {"tp": 2, "sequence_parallel": True, "ep": 2, "etp": 1, **SHARDED},
    "gpt_oss": {"tp": 2, "sequence_parallel": True, "etp": 1, "ep": 2, **SHARDED},
    "gemma3_text": {"tp": 2, "pp": 2, **SHARDED},
    "qwen3_5_text": {"tp": 2, "pp": 2, **SHARDED},
}


@pytest.mark.parametrize("family", cases(FAMILIES, rarely=FAMILIES.keys() - {"glm4_moe"}))
def test_the_state_of_other_families_is_planned_to_the_byte(family: str, tmp_path: Path) -> None:
    model = write_config(tmp_path, family)
    sections = {"loss": {"name": "gift", "beta": 4.0}, "reference": {"kind": "frozen"}, "model": model}
    run = make_run(FAMILIES[family], {}, "bf16", **sections)
    for held, planned in planned_and_held(run, 4):
        assert (planned.parameters, planned.gradients) == (held.parameters, held.gradients)
        assert (planned.optimizer, planned.reference) == (held.optimizer, held.reference)


HYBRIDS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "qwen3_5_text": (2, {"tp": 2, **SHARDED}, {}),
    "qwen3_next": (
        4,
        {"pp": 2, "ep": 2, **SHARDED},
        {"targets": ["q_proj", "in_proj_ba", "out_proj", "up_proj"]},
    ),
}


@pytest.mark.parametrize("family", cases(HYBRIDS, rarely=["qwen3_next"]))
def test_adapters_of_a_hybrid_are_planned_to_the_byte(family: str, tmp_path: Path) -> None:
    world_size, parallel, lora = HYBRIDS[family]
    sections = {"loss": {"name": "curiosft", "top_k": 16}, "reference": {"kind": "moving_average"}}
    sections |= {"model": write_config(tmp_path, family), "lora": {"rank": 4, "alpha": 8, **lora}}
    for held, planned in planned_and_held(make_run(parallel, {}, "bf16", **sections), world_size):
        assert (planned.parameters, planned.gradients) == (held.parameters, held.gradients)
        assert (planned.optimizer, planned.reference_average) == (held.optimizer, held.average)
        assert planned.gradients > 0
        assert 0 < planned.frozen < planned.parameters


def write_config(directory: Path, family: str, dtype: str = "bf16", **sizes: Any) -> dict[str, Any]:
    """The section `model` of a run whose model hf_models describes, with other sizes."""
    config = {**CONFIGS[family], **sizes, "architectures": [hf_family(family).architecture]}  # type: ignore[arg-type]
    (directory / "config.json").write_text(json.dumps(config))
    return {"hf_config": directory, "dtype": dtype}


def measure_small(run: RunConfig) -> Held:
    return measure(run, num_tokens=32, num_sequences=2, num_microbatches=2)


@pytest.mark.parametrize("bucket_size", [1, 3000, 10**9])
def test_buckets_are_cut_and_padded_where_megatron_cuts_and_pads_them(bucket_size: int) -> None:
    run = make_run(SHARDED, MIXTURE, "bf16")
    assert run.model.architecture is not None
    architecture, grid = from_section(run.model.architecture), grid_of(run.parallel, 3)
    kinds = (architecture.kind(0),) * 4
    members = chunk_parameters(architecture, grid, kinds=kinds, has_embedding=True, has_output=True)
    planned = [
        buffer_layout([p for p in members if p.is_expert == is_expert], 3, bucket_size=bucket_size)
        for is_expert in (False, True)
    ]
    found = run_ranks(3, megatron_buckets, run, bucket_size)[0]
    assert [(buffer.num_elements, [*buffer.buckets]) for buffer in planned] == found
    assert bucket_size > 3000 or len(planned[0].buckets) > 3


def megatron_buckets(run: RunConfig, bucket_size: int) -> list[tuple[int, list[tuple[int, int]]]]:
    """Elements and bucket bounds of the dense and the experts' buffers of Megatron's own DDP."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from megatron_sftrl.engine.megatron_config import transformer_config
    from megatron_sftrl.engine.model import build_model_chunks
    from megatron_sftrl.engine.parallel import initialize_parallel

    assert run.model.architecture is not None
    architecture = from_section(run.model.architecture)
    context = initialize_parallel(run.parallel)
    config = transformer_config(architecture, run.model, run.parallel, run.train, is_cuda=False)
    (chunk,) = build_model_chunks(architecture, config, context)
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=True,
        use_distributed_optimizer=True,
        bucket_size=bucket_size,
    )
    wrapped = DistributedDataParallel(config=config, ddp_config=settings, module=chunk)
    buffers = [*wrapped.buffers, *wrapped.expert_parallel_buffers]
    parallel_state.destroy_model_parallel()
    return [(buffer.numel, [*buffer.bucket_indices]) for buffer in buffers]


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step whose activations are large beside whatever else it allocates.

    Args:
        hf: a model of hf_models, whose sizes `model` has, in place of the toy.
        prompt: tokens that stand once in front of all sequences.
    """

    hf: str | None = None
    world_size: int = 1
    parallel: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    dtype: str = "bf16"
    recompute: str = "none"
    recompute_modules: list[str] | None = None
    recompute_layers: int | None = None
    lora: dict[str, Any] | None = None
    loss: dict[str, Any] = field(default_factory=lambda: {"name": "sft"})
    reference: dict[str, Any] | None = None
    num_tokens: int = 1024
    num_sequences: int = 4
    num_microbatches: int = 2
    prompt: int = 0


SIZES = {"hidden_size": 64, "ffn_hidden_size": 192, "vocab_size": 600, "max_position_embeddings": 4096}
WIDE_MIXTURE = {"family": "qwen3_moe", "num_experts": 8, "experts_per_token": 2, "ffn_hidden_size": 64}
HYBRID = {
    **{"hidden_size": 64, "intermediate_size": 192, "vocab_size": 600, "max_position_embeddings": 4096},
    **{"linear_key_head_dim": 16, "linear_value_head_dim": 16},
}
OLMO = {"hidden_size": 64, "intermediate_size": 192, "vocab_size": 600, "max_position_embeddings": 4096}
DEEP_HYBRID = {**HYBRID, "num_hidden_layers": 12}
DEEP = {"num_layers": 12}
SPLIT = {"tp": 2, "sequence_parallel": True}
STEPS = {
    "fp32": Step(dtype="fp32"),
    "few long sequences": Step(num_tokens=4096, num_sequences=2),
    "a large vocabulary": Step(model={"vocab_size": 8000}),
    "a large vocabulary, fused": Step(
        dtype="fp32",
        model={"vocab_size": 8000, "num_layers": 2},
        loss={"name": "gift", "beta": 4.0, "fused": "on"},
        reference={"kind": "frozen"},
        num_tokens=512,
    ),
    "a large vocabulary, fused at tp 2 in four chunks": Step(
        world_size=2,
        parallel={"tp": 2},
        dtype="fp32",
        model={"vocab_size": 16000, "num_layers": 2},
        loss={"name": "sft", "fused": "on", "chunk_mb": 4},
        num_tokens=512,
    ),
    "recomputed": Step(model={"num_layers": 12, "hidden_size": 128}, recompute="full", num_tokens=2048),
    "a reference": Step(
        model={"vocab_size": 2000},
        loss={"name": "gift", "beta": 4.0},
        reference={"kind": "frozen"},
        recompute="full",
        num_microbatches=4,
    ),
    "a moving average": Step(
        model={"vocab_size": 2000},
        loss={"name": "curiosft", "top_k": 64, "pivot": 3.0},
        reference={"kind": "moving_average"},
    ),
    "tp 2": Step(world_size=2, parallel={"tp": 2}),
    "sequence parallelism": Step(world_size=2, parallel=SPLIT),
    "sequence parallelism, recomputed": Step(
        world_size=2,
        parallel=SPLIT,
        model={"family": "qwen2", "hidden_size": 128},
        recompute="full",
        num_tokens=2048,
    ),
    # The reference keeps [T, H] of four micro-batches, 0.5 MB; logits of one are 16 of the 45 MB planned.
    "a reference at pp 2": Step(
        world_size=2,
        parallel={"pp": 2},
        dtype="fp32",
        model={"vocab_size": 8000},
        loss={"name": "gift", "beta": 4.0, "fused": "on"},
        reference={"kind": "frozen"},
        num_tokens=512,
        num_microbatches=4,
    ),
    # Deep, so that what is kept is most of the peak; FREED has more of them.
    "layernorm, fp32": Step(
        model=DEEP, recompute="selective", recompute_modules=["layernorm"], dtype="fp32", num_tokens=512
    ),
    "all that is elementwise, tp 2": Step(
        world_size=2, parallel=SPLIT, model={"family": "qwen2", **DEEP}, recompute="selective"
    ),
    "uneven stages": Step(
        world_size=2,
        parallel={"pp": 2, "last_stage_layers": 2},
        model={"num_layers": 8},
        num_microbatches=4,
    ),
    "experts' SwiGLU": Step(
        world_size=2,
        parallel={**SPLIT, "ep": 2, "etp": 1},
        model={**WIDE_MIXTURE, "num_layers": 8},
        recompute="selective",
        recompute_modules=["moe_act"],
    ),
    "experts, all": Step(
        world_size=2,
        parallel={**SPLIT, "ep": 2, "etp": 1},
        model={**WIDE_MIXTURE, "num_layers": 8},
        recompute="selective",
        recompute_modules=["layernorm", "moe"],
    ),
    "adapters": Step(
        world_size=2,
        parallel=SPLIT,
        lora={"rank": 8, "alpha": 8},
        loss={"name": "gift", "beta": 4.0},
        reference={"kind": "frozen"},
    ),
    "adapters of a hybrid": Step(
        hf="qwen3_5_text", model=DEEP_HYBRID, lora={"rank": 8, "alpha": 8}, num_tokens=512, num_sequences=2
    ),
    "adapters of a hybrid with dropout, tp 2": Step(
        hf="qwen3_5_text",
        model=DEEP_HYBRID,
        world_size=2,
        parallel=SPLIT,
        lora={"rank": 8, "alpha": 8, "dropout": 0.1},
    ),
    "adapters of a hybrid with experts, fp32": Step(
        hf="qwen3_next", model=DEEP_HYBRID, lora={"rank": 8, "alpha": 8}, dtype="fp32", num_tokens=512
    ),
    "prompts shared": Step(num_tokens=1024, num_sequences=4, prompt=512),
    "long prompts shared, windows": Step(
        hf="olmo3", model=OLMO, dtype="fp32", num_tokens=1280, num_sequences=8, prompt=1024
    ),
    "prompts shared, recomputed at cp 2": Step(
        world_size=2, parallel={"cp": 2}, recompute="full", num_tokens=2048, num_sequences=8, prompt=1024
    ),
    "pp 2, recomputed": Step(world_size=2, parallel={"pp": 2}, recompute="full", num_microbatches=4),
    "pp 2 vp 2": Step(world_size=2, parallel={"pp": 2, "vp": 2}, num_microbatches=4),
    "cp 2": Step(world_size=2, parallel={"cp": 2}, num_tokens=2048, num_sequences=2),
    "experts": Step(world_size=2, parallel={**SPLIT, "ep": 2, "etp": 1}, model=WIDE_MIXTURE),
    "a hybrid": Step(hf="qwen3_5_text", model=HYBRID, num_tokens=512, num_sequences=2),
    "a hybrid, fp32": Step(hf="qwen3_5_text", model=HYBRID, dtype="fp32"),
    "a hybrid, one long sequence": Step(hf="qwen3_5_text", model=HYBRID, num_tokens=2048, num_sequences=1),
    "a hybrid, tp 2": Step(hf="qwen3_5_text", model=HYBRID, world_size=2, parallel=SPLIT),
    "a hybrid, selective": Step(hf="qwen3_5_text", model=DEEP_HYBRID, recompute="selective", num_tokens=512),
    "a hybrid, recomputed": Step(hf="qwen3_5_text", model=DEEP_HYBRID, recompute="full"),
    "a hybrid at pp 2": Step(
        hf="qwen3_5_text",
        model={**HYBRID, "num_hidden_layers": 8},
        world_size=2,
        parallel={"pp": 2},
        num_microbatches=4,
    ),
    "a hybrid with experts": Step(hf="qwen3_next", model=HYBRID),
    "a hybrid with experts, ep 2": Step(
        hf="qwen3_next", model=HYBRID, world_size=2, parallel={**SPLIT, "ep": 2, "etp": 1}
    ),
    "cut experts, recomputed": Step(
        world_size=2,
        parallel={**SPLIT, "etp": 2},
        model=WIDE_MIXTURE,
        recompute="full",
        num_tokens=2048,
    ),
}


def run_of(step: Step, directory: Path) -> RunConfig:
    train: dict[str, Any] = {"steps": 2, "recompute": step.recompute}
    if step.recompute_modules is not None:
        train["recompute_modules"] = step.recompute_modules
    if step.recompute_layers is not None:
        train["recompute_layers"] = step.recompute_layers
    model = {}
    if step.hf is not None:
        model["model"] = write_config(directory, step.hf, step.dtype, **step.model)
    return make_run(
        step.parallel,
        {} if model else {**SIZES, **step.model},
        step.dtype,
        **model,
        loss=step.loss,
        reference=step.reference,
        lora=step.lora,
        train=train,
        data={
            "train": ["unused"],
            "max_length": step.prompt + (step.num_tokens - step.prompt) // step.num_sequences,
        },
        batch={"global_size": 8, "packing": True, "max_tokens": step.num_tokens},
    )


def planned_peak(run: RunConfig, step: Step, pp_rank: int) -> int:
    grid = grid_of(run.parallel, step.world_size)
    planned = step_peak(
        architecture_of(run.model),
        run,
        grid,
        replace(microbatch_of(run, grid, "torch"), prompt=step.prompt, group=step.num_sequences),
        stage=pp_rank,
        num_microbatches=step.num_microbatches,
    )
    return max(planned.training, planned.reference_forward)


SELDOM = [
    "fp32",
    "few long sequences",
    "a large vocabulary",
    "a large vocabulary, fused at tp 2 in four chunks",
    "a reference",
    "tp 2",
    "sequence parallelism",
    "layernorm, fp32",
    "uneven stages",
    "experts' SwiGLU",
    "pp 2, recomputed",
    *(name for name in STEPS if name.startswith("adapters")),
    "experts",
    "cut experts, recomputed",
    "recomputed",
    "prompts shared",
    "prompts shared, recomputed at cp 2",
    "all that is elementwise, tp 2",
    "a reference at pp 2",
    *(name for name in STEPS if name.startswith("a hybrid") and name != "a hybrid"),
]


@pytest.mark.parametrize("name", cases(STEPS, rarely=SELDOM))
def test_the_planned_peak_is_within_15_percent_of_the_measured_one(name: str, tmp_path: Path) -> None:
    step = STEPS[name]
    run = run_of(step, tmp_path)
    for held in run_ranks(step.world_size, measure_step, run, step):
        planned = planned_peak(run, step, held.pp_rank)
        print(f"{name}: {planned / held.peak:.2f}")
        # Measured: 0.92 to 1.09. A plan that is too small is the one that ends a run.
        assert 0.9 * held.peak <= planned <= 1.15 * held.peak


FREED = {
    "mlp_act": {"recompute_modules": ["mlp_act"]},
    "layernorm": {"recompute_modules": ["layernorm"]},
    "mlp": {"recompute_modules": ["mlp"]},
    "layernorm, mlp": {"recompute_modules": ["layernorm", "mlp"]},
    "four of twelve blocks": {"recompute": "full", "recompute_layers": 4},
}


@pytest.mark.parametrize("name", cases(FREED, rarely=["layernorm", "mlp", "mlp_act"]))
def test_recomputing_frees_what_the_plan_says(name: str, tmp_path: Path) -> None:
    # Megatron keeps the state of random numbers, 10 KB, for each norm that it makes again.
    plain = Step(model=DEEP, num_tokens=2048)
    step = replace(plain, **{"recompute": "selective", **FREED[name]})
    runs = [(run_of(each, tmp_path), each) for each in (plain, step)]
    before, after = (run_ranks(1, measure_step, *each)[0].peak for each in runs)
    planned = planned_peak(*runs[0], 0) - planned_peak(*runs[1], 0)
    assert before - after > 0.05 * before
    assert planned == pytest.approx(before - after, rel=0.1)


def measure_step(run: RunConfig, step: Step) -> Held:
    return measure(
        run,
        num_tokens=step.num_tokens,
        num_sequences=step.num_sequences,
        num_microbatches=step.num_microbatches,
        prompt=step.prompt,
    )
