"""Settings that are each valid and do not fit together."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from megatron_sftrl.config.checks import check_run
from megatron_sftrl.config.data import MuSection
from megatron_sftrl.models import architecture_of
from megatron_sftrl.models.architecture import DeltaNet
from tests.unit.config.example import example

MIXTURE = (
    "model.architecture.family=qwen3_moe",
    "model.architecture.num_experts=6",
    "model.architecture.experts_per_token=2",
)
LOW = ("model.dtype=bf16", "parallel.distributed_optimizer=true")
SPLIT_MIXTURE = (*MIXTURE, "parallel.tp=2", "parallel.sequence_parallel=true")


def check(*overrides: str, world_size: int = 1, loss_needs: tuple[str, ...] = ("reference",)) -> None:
    config = example(*overrides)
    check_run(config, architecture_of(config.model), world_size, loss_needs=loss_needs)


@pytest.mark.parametrize(
    ("overrides", "world_size"),
    [
        ([], 1),
        (["parallel.tp=2", "parallel.sequence_parallel=true"], 2),
        (["parallel.pp=2", "parallel.vp=2", "parallel.cp=2"], 8),
        (["batch.global_size=3", "batch.micro_size=2"], 2),
        (["batch.packing=true", "batch.max_tokens=128"], 1),
        (["reference.kind=moving_average", "reference.decay=0.5"], 1),
        (["optim.schedule=cosine", "optim.min_lr_ratio=0.1", "optim.warmup_steps=20"], 1),
        (
            [
                "parallel.distributed_optimizer=true",
                "parallel.overlap_grad_reduce=true",
                "parallel.overlap_param_gather=true",
            ],
            2,
        ),
        ([*MIXTURE, "parallel.ep=2", "parallel.cp=2"], 2),
        ([*MIXTURE, "parallel.ep=2", "parallel.moe_dispatcher=flex"], 2),
        ([*LOW, "optim.exp_avg_dtype=bf16", "optim.exp_avg_sq_dtype=bf16"], 2),
        ([*LOW, "optim.cpu_offload=0.5", "train.deterministic=true"], 1),
        (["model.dtype=bf16", "train.fp8={recipe: blockwise}", "parallel.tp=2"], 2),
        ([*MIXTURE, "parallel.ep=3", "parallel.pp=2", "parallel.vp=2"], 6),
        ([*SPLIT_MIXTURE, "parallel.ep=2", "parallel.etp=1"], 2),
        ([*SPLIT_MIXTURE, "model.architecture.ffn_hidden_size=97", "parallel.etp=1"], 2),
        (["train.recompute=selective", "train.recompute_modules=[layernorm, mlp]"], 1),
        (["train.recompute=selective", "train.recompute_modules=[moe]", *MIXTURE], 1),
        (["train.recompute=full", "train.recompute_layers=4"], 1),
        (
            [
                "parallel.pp=2",
                "parallel.first_stage_layers=1",
                "train.recompute=full",
                "train.recompute_layers=3",
            ],
            2,
        ),
        (["parallel.pp=3", "parallel.last_stage_layers=2"], 3),
        (["parallel.pp=2", "parallel.first_stage_layers=3", "parallel.last_stage_layers=1"], 2),
        (["parallel.grad_reduce_dtype=bf16", "model.dtype=bf16"], 1),
    ],
)
def test_settings_that_fit_are_accepted(overrides: list[str], world_size: int) -> None:
    assert check(*overrides, world_size=world_size) is None  # it raises otherwise


@pytest.mark.parametrize(
    ("overrides", "world_size", "part"),
    [
        (
            ["optim.exp_avg_dtype=bf16"],
            1,
            "optim.exp_avg_dtype and exp_avg_sq_dtype needs parallel.distributed_optimizer = true and "
            "model.dtype = bf16",
        ),
        (
            ["optim.cpu_offload=0.5", "model.dtype=bf16"],
            1,
            "optim.cpu_offload needs parallel.distributed_optim",
        ),
        (
            [*LOW, "optim.exp_avg_sq_dtype=bf16", "optim.cpu_offload=1"],
            1,
            "optim.cpu_offload keeps moments in fp32",
        ),
        (["train.fp8={}"], 1, "train.fp8 needs model.dtype = bf16, got fp32"),
        (
            ["train.fp8={recipe: mxfp8}", "model.dtype=bf16", "parallel.tp=2"],
            2,
            "sides are multiples of 32, and ffn_hidden_size / tp is 48",
        ),
        (["parallel.moe_dispatcher=flex"], 1, "parallel.moe_dispatcher is about experts"),
        (["parallel.moe_permute_fusion=true"], 1, "parallel.moe_permute_fusion is about experts"),
        (["parallel.moe_router_fusion=true"], 1, "parallel.moe_router_fusion is about experts"),
        ([*MIXTURE, "parallel.moe_dispatcher=flex"], 1, "parallel.etp * ep = 1: set ep"),
        (
            [*MIXTURE, "parallel.ep=2", "parallel.moe_dispatcher=flex", "train.deterministic=true"],
            2,
            "not known of DeepEP's",
        ),
        (
            ["parallel.tp=2", "parallel.pp=2"],
            6,
            "6 process(es) are not a multiple of parallel.tp * pp * cp = 2 * 2 * 1 = 4: "
            "start 4 (dp = 1) or 8 (dp = 2)",
        ),
        (["parallel.cp=4"], 2, "= 1 * 1 * 4 = 4: start 4 (dp = 1) processes"),
        (["parallel.pp=3"], 3, "4 layers do not divide by parallel.pp * vp = 3 * 1 = 3"),
        (["parallel.pp=2", "parallel.vp=4"], 2, "4 layers do not divide by parallel.pp * vp = 2 * 4 = 8"),
        (["parallel.pp=3"], 3, "or give the first or the last stage another number"),
        (["parallel.last_stage_layers=1"], 1, "parallel.last_stage_layers = 1: there is one pipeline stage"),
        (
            ["parallel.pp=2", "parallel.vp=2", "parallel.last_stage_layers=1"],
            2,
            "parallel.last_stage_layers = 1 does not divide by parallel.vp = 2",
        ),
        (
            ["parallel.pp=2", "parallel.last_stage_layers=4"],
            2,
            "parallel.last_stage_layers = 4 leave 0 of the model's 4 layers for 1 other stage(s)",
        ),
        (
            ["parallel.pp=2", "parallel.first_stage_layers=1", "parallel.last_stage_layers=2"],
            2,
            "leave 1 of the model's 4 layers for 0 other stage(s) of 1 chunk(s): expected none",
        ),
        (
            ["parallel.pp=3", "parallel.first_stage_layers=1"],
            3,
            "leave 3 of the model's 4 layers for 2 other stage(s) of 1 chunk(s): expected a multiple of 2",
        ),
        (
            ["train.recompute=selective", "train.recompute_modules=[moe, layernorm]"],
            1,
            "moe: the model is no mixture of experts, its blocks have mlp",
        ),
        (
            ["train.recompute=selective", "train.recompute_modules=[mlp_act]", *MIXTURE],
            1,
            "mlp_act: the model is a mixture of experts, whose blocks have moe_act",
        ),
        (
            ["train.recompute=selective", "train.recompute_modules=[layernorm]", "model.layers=te"],
            1,
            "layernorm: Transformer Engine's dense layers have no separate norms",
        ),
        (
            ["train.recompute=selective", "train.recompute_modules=[mlp, mlp_act]"],
            1,
            "mlp_act: it is a part of mlp",
        ),
        (["train.recompute=selective", "train.recompute_modules=[]"], 1, "nothing is named"),
        (
            ["train.recompute_modules=[mlp]"],
            1,
            "train.recompute_modules has no effect: train.recompute is none",
        ),
        (
            ["train.recompute=selective", "train.recompute_layers=1"],
            1,
            "train.recompute_layers has no effect: train.recompute is selective",
        ),
        (
            ["train.recompute=full", "train.recompute_layers=3", "parallel.pp=2"],
            2,
            "train.recompute_layers = 3 is more than the 2 layer(s) of the largest model chunk",
        ),
        (
            ["parallel.grad_reduce_dtype=bf16"],
            1,
            "parallel.grad_reduce_dtype = bf16 needs model.dtype = bf16",
        ),
        (["parallel.tp=3"], 3, "8 attention heads do not divide by parallel.tp = 3"),
        (["parallel.tp=8"], 8, "4 query groups (key/value heads) do not divide by parallel.tp = 8"),
        (["model.architecture.ffn_hidden_size=97", "parallel.tp=2"], 2, "97 MLP columns"),
        (["parallel.vp=2"], 1, "parallel.vp = 2 needs parallel.pp > 1"),
        (["parallel.sequence_parallel=true"], 1, "parallel.sequence_parallel needs parallel.tp > 1"),
        (["parallel.overlap_param_gather=true"], 1, "needs parallel.distributed_optimizer = true"),
        (
            ["parallel.distributed_optimizer=true", "optim.name=sgd"],
            1,
            "parallel.distributed_optimizer shards Adam's state only",
        ),
        (
            ["batch.packing=true", "batch.max_tokens=64"],
            1,
            "batch.max_tokens = 64 is less than data.max_length",
        ),
        (["data.max_length=257"], 1, "data.max_length = 257 is more than the model's"),
        (["reference=null"], 1, "loss 'gift' needs a reference model: add `reference: {kind: frozen}`"),
        (["optim.schedule_steps=40"], 1, "optim.schedule_steps has no effect: optim.schedule is constant"),
        (
            ["optim.schedule=cosine", "optim.warmup_steps=20", "optim.schedule_steps=20"],
            1,
            "optim.schedule_steps = 20 leaves nothing after optim.warmup_steps = 20",
        ),
        (["optim.warmup_steps=21"], 1, "optim.warmup_steps = 21 is more than train.steps = 20"),
        (["reference.decay=0.5"], 1, "reference.decay has no effect: reference.kind is frozen"),
        (["reference.sync_every=5"], 1, "reference.sync_every has no effect"),
        (
            ["reference.kind=moving_average", "reference.checkpoint=x"],
            1,
            "reference.checkpoint has no effect: a moving average starts from the policy",
        ),
        (["optim.momentum=0.9"], 1, "optim.momentum has no effect: optim.name is adamw"),
        (["optim.name=sgd", "optim.betas=[0.9, 0.9]"], 1, "optim.betas has no effect: optim.name is sgd"),
        (["optim.min_lr_ratio=0.1"], 1, "optim.min_lr_ratio has no effect: optim.schedule is constant"),
        (["train.eval_every=5"], 1, "train.eval_every has no effect: data.valid is empty"),
        (
            ["batch.packing=true", "batch.max_tokens=128", "batch.micro_size=2"],
            1,
            "batch.micro_size has no effect",
        ),
        (["parallel.ep=2"], 2, "parallel.ep = 2 is about experts, and the model is no mixture of experts"),
        (["parallel.etp=1"], 1, "or parallel.etp=null on the command line"),
        (
            ["model.moe_aux_loss_coeff=0.01"],
            1,
            "model.moe_aux_loss_coeff = 0.01 is about experts, and the model",
        ),
        (
            ["model.moe_bias_update_rate=0.01"],
            1,
            "model.moe_bias_update_rate = 0.01 is about experts, and the model",
        ),
        (
            [*MIXTURE, "model.moe_bias_update_rate=0.01"],
            1,
            "model.moe_bias_update_rate = 0.01: this model's router has no biases",
        ),
        ([*MIXTURE, "parallel.ep=4"], 4, "6 experts do not divide by parallel.ep = 4: choose ep among the"),
        ([*SPLIT_MIXTURE, "model.architecture.ffn_hidden_size=97"], 2, "parallel.etp = 2 (as tp)"),
        ([*SPLIT_MIXTURE, "parallel.etp=4"], 4, "parallel.etp = 4 does not divide parallel.tp = 2"),
        ([*MIXTURE, "parallel.tp=2"], 2, "needs parallel.sequence_parallel = true"),
        ([*MIXTURE, "model.architecture.experts_per_token=1"], 1, "its router would never learn"),
        (
            [*SPLIT_MIXTURE, "parallel.ep=2", "parallel.pp=2"],
            4,
            "4 process(es) are not a multiple of parallel.etp * ep * pp = 2 * 2 * 2 = 8: start 8 (dp = 2)",
        ),
    ],
)
def test_settings_that_do_not_fit_are_named_with_what_to_do(
    overrides: list[str], world_size: int, part: str
) -> None:
    with pytest.raises(ValueError, match="the run cannot start") as raised:
        check(*overrides, world_size=world_size)
    assert part in str(raised.value)


@pytest.mark.parametrize(
    ("overrides", "changes", "mixture", "part"),
    [
        ((), {"all_biases": True}, {}, "parallel.etp = 2 (as tp): experts with biases"),
        (
            ("model.moe_aux_loss_coeff=0.1",),
            {},
            {"routing": "sigmoid"},
            "the router's biases keep the experts",
        ),
    ],
)
def test_settings_that_experts_of_some_families_cannot_have_are_named(
    overrides: tuple[str, ...], changes: dict[str, bool], mixture: dict[str, str], part: str
) -> None:
    config = example(*SPLIT_MIXTURE, *overrides)
    plain = architecture_of(config.model)
    assert plain.mixture is not None
    architecture = replace(plain, mixture=replace(plain.mixture, **mixture), **changes)
    with pytest.raises(ValueError, match="1 problem") as raised:
        check_run(config, architecture, 2, loss_needs=("reference",))
    assert part in str(raised.value)


@pytest.mark.parametrize(
    ("overrides", "world_size", "part"),
    [
        (["parallel.cp=2"], 2, "parallel.cp = 2: a gated delta net reads its sequence from the first token"),
        (["parallel.tp=2"], 2, "3 key heads of gated delta nets do not divide by parallel.tp = 2"),
        (["model.text_only=true"], 1, "model.text_only has no effect: model.architecture is given"),
    ],
)
def test_layouts_that_a_hybrid_cannot_have_are_named(
    overrides: list[str], world_size: int, part: str
) -> None:
    config = example(*overrides)
    net = DeltaNet(layers=(0, 2), num_key_heads=3, num_value_heads=6, key_dim=8, value_dim=8, kernel=4)
    architecture = replace(architecture_of(config.model), delta_net=net)
    with pytest.raises(ValueError, match="1 problem") as raised:
        check_run(config, architecture, world_size, loss_needs=("reference",))
    assert part in str(raised.value)


def test_a_reference_that_no_loss_uses_is_refused() -> None:
    with pytest.raises(ValueError, match="loss 'gift' uses no reference model: remove the section"):
        check(loss_needs=())


def test_everything_that_does_not_fit_is_listed_at_once() -> None:
    with pytest.raises(ValueError, match="4 problem") as raised:
        check("parallel.tp=3", "parallel.pp=3", "reference=null", world_size=9)
    assert str(raised.value).count("\n  ") == 4


def test_a_wrong_number_of_processes_names_the_nearest_right_ones() -> None:
    with pytest.raises(ValueError, match=r"start 8 \(dp = 1\) or 16 \(dp = 2\)"):
        check("parallel.tp=2", "parallel.pp=2", "parallel.cp=2", world_size=12)


def test_mu_rises_in_a_line_and_falls_as_half_a_cosine() -> None:
    mu = MuSection(peak=0.8, valley=0.2, warmup_steps=2, decay_steps=4)
    bend = 0.3 * math.cos(math.pi / 4)
    expected = [0.4, 0.8, 0.8, 0.5 + bend, 0.5, 0.5 - bend, 0.2, 0.2]
    assert [mu.at(step) for step in range(8)] == pytest.approx(expected)
    assert MuSection(peak=0.1, valley=0.1).at(10**6) == 0.1
    for wrong in ({"decay_steps": 0}, {"valley": 0.8}, {"valley": 0.9}):
        with pytest.raises(ValueError, match=r"sft\.mu"):
            MuSection.model_validate({**mu.model_dump(), **wrong})
