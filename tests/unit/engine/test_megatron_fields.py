"""parallel.megatron: fields of Megatron's configurations by their own names, and where they arrive."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnBackend

from megatron_sftrl.config.messages import sections
from megatron_sftrl.config.schema import OptimSection, ParallelSection, RunConfig
from megatron_sftrl.engine import megatron_config, megatron_fields
from megatron_sftrl.engine.megatron_config import check_megatron
from megatron_sftrl.errors import UserError
from megatron_sftrl.models import architecture_of
from tests.distributed.mixture_runs import QWEN3_MOE
from tests.distributed.test_layouts import make_config, step_batches
from tests.ranks import run_ranks
from tests.unit.config.example import example


def parallel_of(**fields: Any) -> ParallelSection:
    return ParallelSection(megatron=fields)


def refusal(**fields: Any) -> str:
    with pytest.raises(UserError) as refused:
        megatron_fields.megatron_fields(fields)
    return str(refused.value)


def test_every_field_that_is_set_here_is_refused_with_the_key_to_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken from what the three builders pass: a field that they pass tomorrow has to be named, too."""
    passed: set[str] = set()
    for name in ("TransformerConfig", "DistributedDataParallelConfig", "OptimizerConfig"):

        def recorded(original: Any, **settings: Any) -> Any:
            passed.update(settings)
            return original(**settings)

        monkeypatch.setattr(megatron_config, name, partial(recorded, getattr(megatron_config, name)))
    run = example()
    architecture = architecture_of(run.model)
    megatron_config.transformer_config(architecture, run.model, run.parallel, run.train, is_cuda=False)
    megatron_config.ddp_config(run.parallel)
    megatron_config.optimizer_config(run.optim, run.parallel, is_bf16=False)
    assert len(passed) > 60
    assert passed <= megatron_fields.field_owners().keys()
    for name in passed:
        assert f"parallel.megatron.{name} cannot be written here: " in refusal(**{name: True})


def test_every_key_that_is_named_exists() -> None:
    keys = {".".join((*path, name)) for path, section in sections(RunConfig) for name in section.model_fields}
    named = {
        key
        for text in megatron_fields.field_owners().values()
        for key in re.findall(r"\b(?:model|parallel|optim|train)\.[a-z0-9_]+", text)
    }
    assert len(named) > 20
    assert named <= keys


def test_fields_arrive_in_the_configuration_that_has_them() -> None:
    run = example(
        "parallel.megatron.bucket_size=1000",
        "parallel.megatron.clone_scatter_output_in_embedding=false",
        "parallel.megatron.apply_wd_to_qk_layernorm=true",
    )
    layers = megatron_config.transformer_config(
        architecture_of(run.model), run.model, run.parallel, run.train, is_cuda=False
    )
    optimizer = megatron_config.optimizer_config(run.optim, run.parallel, is_bf16=False)
    assert megatron_config.ddp_config(run.parallel).bucket_size == 1000
    assert layers.clone_scatter_output_in_embedding is False
    assert optimizer.apply_wd_to_qk_layernorm is True


def test_a_field_of_the_parallel_configuration_is_a_field_of_the_layers() -> None:
    fields = megatron_fields.megatron_fields({"batch_p2p_sync": False})
    assert fields.transformer == {"batch_p2p_sync": False}


@pytest.mark.parametrize(
    ("field", "value", "becomes"),
    [
        ("attention_backend", "flash", AttnBackend.flash),
        ("moe_router_dtype", "fp32", "fp32"),
        ("cp_comm_type", ["p2p", "a2a"], ["p2p", "a2a"]),
        ("cp_comm_type", "a2a", "a2a"),
        ("bucket_size", None, None),
        ("min_offloaded_tensor_size", 4096, 4096),
    ],
)
def test_values_become_what_megatron_wants(field: str, value: object, becomes: object) -> None:
    fields = megatron_fields.megatron_fields({field: value})
    assert {**fields.transformer, **fields.ddp} == {field: becomes}


def test_names_of_dtypes_become_dtypes() -> None:
    assert megatron_fields._converted(torch.dtype, "bf16") is torch.bfloat16
    with pytest.raises(ValueError, match="expected one of fp32, bf16, fp16, got 'fp8'"):
        megatron_fields._converted(torch.dtype, "fp8")


@pytest.mark.parametrize(
    ("field", "value", "part"),
    [
        ("buket_size", 1, "Megatron has no such field: did you mean bucket_size?"),
        ("_cpu_offloading_context", None, "Megatron has no such field"),
        ("bucket_size", "large", "got 'large': Input should be a valid integer"),
        ("bucket_size", True, "Input should be a valid integer"),
        ("clone_scatter_output_in_embedding", 1, "Input should be a valid boolean"),
        ("moe_router_dtype", "fp16", "Input should be 'fp32' or 'fp64'"),
        ("attention_backend", "fast", "expected one of flash, fused, unfused, local, auto, got 'fast'"),
        ("init_method", "normal", "which YAML cannot write"),
        ("quant_recipe", {}, "which YAML cannot write"),
        ("overlap_param_gather", True, "set parallel.overlap_param_gather"),
        ("calculate_per_token_loss", False, "Megatron must neither average nor scale"),
        ("average_in_collective", True, "Megatron must neither average nor scale"),
        ("bias_activation_fusion", True, "false turns it off"),
        ("hidden_dropout", 0.1, "model.architecture says it"),
        ("cuda_graph_impl", "local", "packed sequences differ"),
        ("tp_comm_overlap", True, "user buffers have one size"),
        ("fp8_param", True, "weights stay in model.dtype"),
        ("mtp_num_layers", 1, "would not be the one that its files describe"),
        ("decoupled_weight_decay", False, "is decoupled"),
        ("apply_query_key_layer_scaling", True, "do not have it"),
        ("attention_softmax_in_fp32", True, "do not have it"),
        ("memory_efficient_layer_norm", True, "do not have it"),
        ("num_microbatches_with_partial_activation_checkpoints", 1, "a schedule that this package"),
        ("microbatch_group_size_per_vp_stage", 3, "a schedule that this package"),
        ("config_logger_dir", "logs", "only Megatron's own training loop"),
    ],
)
def test_what_cannot_be_set_is_refused_with_its_reason(field: str, value: object, part: str) -> None:
    message = refusal(**{field: value})
    assert f"parallel.megatron.{field}" in message
    assert part in message


def test_all_that_is_wrong_is_said_at_once() -> None:
    message = refusal(buket_size=1, num_layers=2)
    assert "buket_size" in message
    assert "num_layers" in message


def test_a_fusion_can_be_turned_off() -> None:
    run = example("parallel.megatron.bias_activation_fusion=false")
    config = megatron_config.transformer_config(
        architecture_of(run.model), run.model, run.parallel, run.train, is_cuda=True
    )
    assert config.bias_activation_fusion is False
    assert config.bias_dropout_fusion is True


def checked(*overrides: str, is_cuda: bool = False) -> None:
    run = example(*overrides)
    check_megatron(run, architecture_of(run.model), is_cuda=is_cuda)


def test_a_refusal_of_megatrons_is_shown_in_its_own_words() -> None:
    with pytest.raises(UserError) as refused:
        checked("parallel.megatron.overlap_p2p_comm_warmup_flush=true")
    assert "megatron-core 0." in str(refused.value)
    assert "['overlap_p2p_comm_warmup_flush']" in str(refused.value)
    assert "only compatible with overlap_p2p_comm but not batch_p2p_comm" in str(refused.value)


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("moe_router_dtype=fp32", "the model is no mixture of experts"),
        ("fp8_wgrad=false", "train.fp8 is not given"),
        ("attention_backend=flash", "layers are torch's"),
        ("pin_cpu_grads=false", "optim.cpu_offload is 0"),
        ("bucket_size=1000", "parallel.overlap_grad_reduce is off"),
        ("distribute_saved_activations=true", "train.recompute is not full"),
    ],
)
def test_a_field_that_nothing_reads_is_refused(override: str, part: str) -> None:
    with pytest.raises(UserError, match=f"parallel.megatron.{override.split('=')[0]} has no effect: {part}"):
        checked(f"parallel.megatron.{override}")


def test_a_run_without_any_of_it_passes() -> None:
    assert checked() is None  # it raises otherwise


def router_dtypes(megatron: dict) -> set[torch.dtype]:
    """Of the logits by which a mixture in bf16 chooses its experts, in a step of a run."""
    from megatron.core import parallel_state
    from megatron.core.transformer.moe.router import TopKRouter

    from megatron_sftrl.engine.parallel import initialize_parallel
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.losses.registry import build_loss

    run = make_config({"megatron": megatron}, **QWEN3_MOE)
    run = run.model_copy(update={"model": run.model.model_copy(update={"dtype": "bf16"})})
    policy = PolicyEngine(architecture_of(run.model), run, initialize_parallel(run.parallel))
    found: set[torch.dtype] = set()
    gating = TopKRouter.gating
    with pytest.MonkeyPatch.context() as patch:

        def seen(own: TopKRouter, states: torch.Tensor) -> torch.Tensor:
            logits = gating(own, states)
            found.add(logits.dtype)
            return logits

        patch.setattr(TopKRouter, "gating", seen)
        batches = step_batches(0, num_groups=1, group=0, multiple=1, num_microbatches=1)
        policy.forward_backward(batches, build_loss("sft", {}))
    assert policy.optim_step(0, num_steps=1).grad_norm > 0
    parallel_state.destroy_model_parallel()
    return found


def test_a_run_routes_in_the_dtype_that_is_written() -> None:
    assert run_ranks(1, router_dtypes, {}) == [{torch.bfloat16}]
    assert run_ranks(1, router_dtypes, {"moe_router_dtype": "fp32"}) == [{torch.float32}]


def test_settings_of_the_optimizer_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.core.optimizer.optimizer_config.is_te_min_version", lambda _: True)
    optim = OptimSection(lr=1.0, cpu_offload=0.25)
    config = megatron_config.optimizer_config(
        optim, ParallelSection(distributed_optimizer=True), is_bf16=True
    )
    assert config.use_precision_aware_optimizer is config.optimizer_cpu_offload is True
    assert config.optimizer_offload_fraction == 0.25
    plain = megatron_config.optimizer_config(OptimSection(lr=1.0), parallel_of(), is_bf16=True)
    assert plain.use_precision_aware_optimizer is plain.optimizer_cpu_offload is False
