"""What Megatron is told: how its layers, its DDP and its optimizer are configured, from a run's sections."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import megatron.core
import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_sftrl.config.checks import recomputed_modules
from megatron_sftrl.config.schema import (
    ModelSection,
    OptimSection,
    ParallelSection,
    TrainingConfig,
    TrainSection,
)
from megatron_sftrl.engine.device import transformer_engine
from megatron_sftrl.engine.megatron_fields import DTYPES, megatron_fields
from megatron_sftrl.engine.recompute import gelu_tanh, own_modules
from megatron_sftrl.errors import UserError
from megatron_sftrl.models.architecture import Architecture


def uses_transformer_engine(model: ModelSection, *, is_cuda: bool) -> bool:
    """Whether layers are Transformer Engine's, which run on CUDA alone, or torch's."""
    return is_cuda and model.layers != "torch" and transformer_engine().problem is None


def transformer_config(
    architecture: Architecture,
    model: ModelSection,
    parallel: ParallelSection,
    train: TrainSection,
    *,
    is_cuda: bool,
) -> TransformerConfig:
    """Of Megatron's layers and pipeline schedule."""
    with_te = uses_transformer_engine(model, is_cuda=is_cuda)
    settings = {
        **_of_the_model(architecture, model, with_te=with_te),
        **_of_the_layout(parallel, is_cuda=is_cuda),
        **_of_the_step(train),
        **_recomputation(train, is_mixture=architecture.mixture is not None, with_te=with_te),
        **_of_the_kernels(architecture, parallel, is_cuda=is_cuda, with_te=with_te),
        **megatron_fields(parallel.megatron).transformer,
    }
    config = TransformerConfig(**settings)
    scale_cos_and_sin(config, architecture.rope.attention_factor)
    return config


def _of_the_model(architecture: Architecture, model: ModelSection, *, with_te: bool) -> dict[str, Any]:
    mixture = architecture.mixture
    dtype = torch.bfloat16 if model.dtype == "bf16" else torch.float32
    return dict(
        transformer_impl="transformer_engine" if with_te else "local",
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=(mixture and mixture.dense_width) or architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups,
        kv_channels=architecture.head_dim,
        normalization="RMSNorm",
        layernorm_zero_centered_gamma=architecture.norms_from_zero,
        attention_output_gate=architecture.has_output_gate,
        # Of hybrids, for the names in a checkpoint; the layers come from model.py.
        linear_attention_freq=[int(not architecture.attends(i)) for i in range(architecture.num_layers)]
        if architecture.delta_net
        else None,
        layernorm_epsilon=architecture.norm_eps,
        gated_linear_unit=True,
        activation_func=_activation(architecture),
        activation_func_clamp_value=architecture.gate_limit,
        glu_linear_offset=architecture.gate_offset,
        add_bias_linear=architecture.all_biases,
        add_qkv_bias=architecture.qkv_bias,
        # False for norms over all heads: Megatron would sum the gradient of a weight that ranks share out.
        qk_layernorm=architecture.qk_norm and not architecture.qk_norm_spans_heads,
        softmax_scale=architecture.attention_multiplier,
        softmax_type="learnable" if architecture.has_sinks else "vanilla",
        rotary_interleaved=architecture.rope.interleaved,
        no_rope_freq=[int(i in architecture.no_rope_layers) for i in range(architecture.num_layers)]
        if architecture.no_rope_layers
        else None,
        # (left, right) positions beside the token itself; the list is indexed by the layer over all stages.
        window_size=None if architecture.sliding_window is None else (architecture.sliding_window - 1, 0),
        window_attn_skip_freq=[int(i in architecture.window_layers) for i in range(architecture.num_layers)],
        num_moe_experts=mixture.num_experts if mixture else None,
        moe_ffn_hidden_size=architecture.ffn_hidden_size if mixture else None,
        moe_router_topk=mixture.experts_per_token if mixture else 2,
        moe_shared_expert_intermediate_size=(mixture.shared_width or None) if mixture else None,
        moe_shared_expert_gate=bool(mixture and mixture.shared_width and mixture.shared_is_gated),
        moe_layer_freq=[int(architecture.has_experts(i)) for i in range(architecture.num_layers)]
        if architecture.num_dense_layers
        else 1,
        # The softmax over the chosen logits is the softmax over all, divided by the sum of the chosen.
        moe_router_pre_softmax=mixture is not None and not mixture.normalizes_weights,
        # As in transformers: logits of a softmax in the model's dtype, of sigmoids in fp32, both of these in
        # fp32, and every token reaches its experts.
        moe_router_score_function=mixture.routing if mixture else "softmax",
        **({"moe_router_dtype": "fp32"} if mixture and mixture.routing == "sigmoid" else {}),
        moe_router_num_groups=mixture.num_groups if mixture and mixture.num_groups > 1 else None,
        moe_router_group_topk=mixture.groups_per_token if mixture and mixture.num_groups > 1 else None,
        moe_router_topk_scaling_factor=mixture.weights_factor
        if mixture and mixture.weights_factor != 1
        else None,
        moe_router_load_balancing_type="aux_loss" if model.moe_aux_loss_coeff else "none",
        moe_aux_loss_coeff=model.moe_aux_loss_coeff,
        # Megatron itself leaves biases alone, which mixtures.py adds and moves.
        moe_router_bias_update_rate=model.moe_bias_update_rate,
        moe_grouped_gemm=with_te and mixture is not None,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=model.dtype == "bf16",
        # Weights come from initialize_weights() or a checkpoint, the same in every layout.
        perform_initialization=False,
    )


def _activation(architecture: Architecture) -> Callable[[Tensor], Tensor]:
    if architecture.activation == "gelu_pytorch_tanh":
        return gelu_tanh
    slope = architecture.gate_slope
    return F.silu if slope == 1 else lambda gate: gate * torch.sigmoid(slope * gate)


def _of_the_layout(parallel: ParallelSection, *, is_cuda: bool) -> dict[str, Any]:
    is_interleaved = parallel.vp > 1
    return dict(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        num_layers_in_first_pipeline_stage=parallel.first_stage_layers,
        num_layers_in_last_pipeline_stage=parallel.last_stage_layers,
        virtual_pipeline_model_parallel_size=parallel.vp if is_interleaved else None,
        context_parallel_size=parallel.cp,
        expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=parallel.etp or parallel.tp,
        sequence_parallel=parallel.sequence_parallel,
        moe_token_dispatcher_type=parallel.moe_dispatcher,
        use_cpu_initialization=not is_cuda,
        # The default p2p order exchanges wrong tensors under a virtual pipeline on gloo (measured), no error.
        overlap_p2p_comm=is_interleaved,
        batch_p2p_comm=not is_interleaved,
        # Frees an output whose asynchronous send gloo may still read: wrong numbers, no error (measured).
        deallocate_pipeline_outputs=is_cuda,
    )


def _of_the_step(train: TrainSection) -> dict[str, Any]:
    return dict(
        # Normalisation is data (token_weight): the schedule must neither average nor scale. See schedule.py.
        calculate_per_token_loss=True,
        fp8=train.fp8.format if train.fp8 else None,
        fp8_recipe=train.fp8.recipe if train.fp8 else "delayed",
        deterministic_mode=train.deterministic,
    )


def _of_the_kernels(
    architecture: Architecture, parallel: ParallelSection, *, is_cuda: bool, with_te: bool
) -> dict[str, Any]:
    """Fusions: CUDA extensions, and functions that torch.compile makes kernels of; none on the CPU."""
    rope = architecture.rope
    return dict(
        # Transformer Engine's fused rope of packed sequences knows no factor on cos and sin and no
        # neighbours that turn together, and would leave both out silently.
        apply_rope_fusion=with_te and rope.attention_factor == 1.0 and not rope.interleaved,
        bias_dropout_fusion=is_cuda,
        # SwiGLU, of dense blocks and of experts, of Transformer Engine's layers and of torch's.
        bias_activation_fusion=is_cuda
        and architecture.gate_limit is None
        and architecture.activation == "silu",
        # Products add to fp32 gradients: Transformer Engine's own way, or Apex's.
        gradient_accumulation_fusion=with_te or (is_cuda and _has_module("fused_weight_gradient_mlp_cuda")),
        moe_permute_fusion=parallel.moe_permute_fusion,
        moe_router_fusion=parallel.moe_router_fusion,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
    )


def _has_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _recomputation(train: TrainSection, *, is_mixture: bool, with_te: bool) -> dict[str, Any]:
    """Megatron's part of it; engine/recompute.py does the rest."""
    if train.recompute == "none":
        return {}
    modules = recomputed_modules(train, is_mixture=is_mixture, with_te=with_te)
    if train.recompute == "selective":
        own = own_modules(with_te=with_te)
        named = [name for name in modules if name not in own]
        return {"recompute_granularity": "selective", "recompute_modules": named}
    return {
        "recompute_granularity": "full",
        "recompute_method": "uniform" if train.recompute_layers is None else "block",
        "recompute_num_layers": train.recompute_layers or 1,
    }


def ddp_config(parallel: ParallelSection) -> DistributedDataParallelConfig:
    """Of Megatron's DDP."""
    settings: dict[str, Any] = dict(
        grad_reduce_in_fp32=parallel.grad_reduce_dtype == "fp32",
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.distributed_optimizer,
        # A non-finite gradient is found by its norm, skipped and counted; no assertion in the backward.
        check_for_nan_in_grad=False,
    )
    return DistributedDataParallelConfig(**settings | megatron_fields(parallel.megatron).ddp)


def optimizer_config(optim: OptimSection, parallel: ParallelSection, *, is_bf16: bool) -> OptimizerConfig:
    """Of Megatron's optimizer; step_if_finite decides what is decayed."""
    settings: dict[str, Any] = dict(
        optimizer={"adamw": "adam", "sgd": "sgd"}[optim.name],
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        adam_eps=optim.eps,
        sgd_momentum=optim.momentum,
        clip_grad=optim.clip_grad,
        bf16=is_bf16,
        params_dtype=torch.bfloat16 if is_bf16 else torch.float32,
        use_distributed_optimizer=parallel.distributed_optimizer,
        # Megatron's part-wise offload is an optimizer of this kind, too.
        use_precision_aware_optimizer=optim.has_low_moments or optim.cpu_offload > 0,
        exp_avg_dtype=DTYPES[optim.exp_avg_dtype],
        exp_avg_sq_dtype=DTYPES[optim.exp_avg_sq_dtype],
        # Remainders of fp32 weights mean nothing without the bf16 ones; a checkpoint holds whole numbers.
        store_param_remainders=False,
        optimizer_cpu_offload=optim.cpu_offload > 0,
        optimizer_offload_fraction=optim.cpu_offload,
    )
    return OptimizerConfig(**settings | megatron_fields(parallel.megatron).optimizer)


# What this machine or this version of Megatron cannot do, found before a process group exists.


def check_megatron(run: TrainingConfig, architecture: Architecture, *, is_cuda: bool) -> None:
    """Hold the run against the packages that are installed, and make Megatron's configurations once.

    Raises:
        UserError: a setting that needs another machine, package or layer; what parallel.megatron may not
            say; what Megatron itself refuses, in its words.
    """
    fields = megatron_fields(run.parallel.megatron)
    with_te = uses_transformer_engine(run.model, is_cuda=is_cuda)
    problems = [
        *_missing_packages(run, is_cuda=is_cuda, with_te=with_te),
        *_latent_problems(run, architecture, with_te=with_te),
        *_sink_problems(run, architecture, with_te=with_te),
        *_hybrid_problems(run, architecture, with_te=with_te),
        *_sharing_problems(run, with_te=with_te),
        *_idle_fields(run, with_te=with_te, is_mixture=architecture.mixture is not None),
    ]
    if problems:
        raise UserError("\n  ".join([f"the run cannot start, {len(problems)} problem(s)", *problems]))
    recomputed_modules(run.train, is_mixture=architecture.mixture is not None, with_te=with_te)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            transformer_config(architecture, run.model, run.parallel, run.train, is_cuda=is_cuda)
            ddp_config(run.parallel)
            optimizer_config(run.optim, run.parallel, is_bf16=run.model.dtype == "bf16")
    except (AssertionError, ImportError, RuntimeError, TypeError, ValueError) as error:
        written = sorted({*fields.transformer, *fields.ddp, *fields.optimizer})
        raise UserError(
            f"megatron-core {megatron.core.__version__} refuses the settings of model, parallel, train and "
            f"optim{f' with parallel.megatron {written}' if written else ''}: {error}"
        ) from error


def _latent_problems(run: TrainingConfig, architecture: Architecture, *, with_te: bool) -> Iterator[str]:
    if architecture.latent is not None and with_te:
        yield (
            f"model.layers = {run.model.layers}: latent attention ({architecture.family}) does not know "
            "Transformer Engine's layers yet: set model.layers = torch"
        )


def _sink_problems(run: TrainingConfig, architecture: Architecture, *, with_te: bool) -> Iterator[str]:
    if architecture.has_sinks and with_te:
        yield (
            f"model.layers = {run.model.layers}: the sinks and experts of a {architecture.family} are only "
            "known with torch's layers: set model.layers = torch"
        )


def _sharing_problems(run: TrainingConfig, *, with_te: bool) -> Iterator[str]:
    if with_te and run.grpo is not None and run.grpo.rollout.share_prompts:
        yield (
            f"rollout.share_prompts: Transformer Engine's attention (model.layers = {run.model.layers}) does "
            "not know it: set model.layers = torch, or remove share_prompts"
        )


def _hybrid_problems(run: TrainingConfig, architecture: Architecture, *, with_te: bool) -> Iterator[str]:
    if architecture.delta_net is not None and with_te:
        yield (
            f"model.layers = {run.model.layers}: gated delta nets ({architecture.family}) are only known "
            "with torch's layers: set model.layers = torch"
        )


def check_fp8(train: TrainSection, device: torch.device) -> None:
    """Hold train.fp8 against the GPU, once CUDA has started.

    Raises:
        UserError: the recipe needs a newer one.
    """
    if train.fp8 is None or device.type != "cuda":
        return
    needed = {"tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}[train.fp8.recipe]
    if (found := torch.cuda.get_device_capability(device)) < needed:
        raise UserError(
            f"train.fp8.recipe = {train.fp8.recipe}: expected a GPU of compute capability "
            f"{'.'.join(map(str, needed))} or later, got {torch.cuda.get_device_name(device)} with "
            f"{'.'.join(map(str, found))}: choose another recipe, or remove train.fp8"
        )


def _missing_packages(run: TrainingConfig, *, is_cuda: bool, with_te: bool) -> Iterator[str]:
    layers = (
        "expected Transformer Engine's layers (CUDA, the package transformer_engine, model.layers auto or "
        f"te), got torch's on {'CUDA' if is_cuda else 'the CPU'}: remove it, or install them"
    )
    if run.train.fp8 is not None and not with_te:
        yield f"train.fp8: {layers}"
    for name in ("moe_permute_fusion", "moe_router_fusion"):
        if getattr(run.parallel, name) and not with_te:
            yield f"parallel.{name}: {layers}"
    if run.parallel.moe_dispatcher == "flex" and not (is_cuda and _has_module("deep_ep")):
        yield (
            "parallel.moe_dispatcher = flex: expected CUDA and the package deep_ep (DeepEP), got "
            f"{'CUDA without it' if is_cuda else 'the CPU'}: install it, or set moe_dispatcher = alltoall"
        )
    for name, is_set in (
        ("exp_avg_dtype and exp_avg_sq_dtype = bf16", run.optim.has_low_moments),
        (f"cpu_offload = {run.optim.cpu_offload:g}", run.optim.cpu_offload),
    ):
        if is_set and not (is_cuda and _has_module("transformer_engine")):
            yield (
                f"optim.{name}: expected CUDA and the package transformer_engine, whose Adam Megatron uses "
                f"for it, got {'CUDA without it' if is_cuda else 'the CPU'}: install it, or remove the key"
            )


_READ_WITH_TRANSFORMER_ENGINE = frozenset(
    {"attention_backend", "cp_comm_type", "use_te_activation_func", "disable_parameter_transpose_cache"}
    | {"fused_single_qkv_rope", "moe_router_padding_for_quantization", "moe_router_padding_for_fp8"}
    | {"cpu_offloading", "cpu_offloading_num_layers", "fine_grained_activation_offloading"}
)

_READ_WITH_CPU_OFFLOAD = frozenset(
    {"overlap_cpu_optimizer_d2h_h2d", "pin_cpu_grads", "pin_cpu_params"}
    | {"use_torch_optimizer_for_cpu_offload"}
)


def _idle_fields(run: TrainingConfig, *, with_te: bool, is_mixture: bool) -> Iterator[str]:
    """What was written in parallel.megatron and would be read by nothing."""
    for name in run.parallel.megatron:
        reason = None
        if name.startswith("moe_") and not is_mixture:
            reason = "the model is no mixture of experts"
        elif name.startswith(("fp8_", "first_last_layers_bf16", "num_layers_at_")) and run.train.fp8 is None:
            reason = "train.fp8 is not given"
        elif name in _READ_WITH_TRANSFORMER_ENGINE and not with_te:
            reason = "layers are torch's, not Transformer Engine's (model.layers)"
        elif (
            name.startswith(("moe_deepep", "moe_hybridep", "moe_flex"))
            and run.parallel.moe_dispatcher != "flex"
        ):
            reason = "parallel.moe_dispatcher is not flex"
        elif name in _READ_WITH_CPU_OFFLOAD and not run.optim.cpu_offload:
            reason = "optim.cpu_offload is 0"
        elif name == "bucket_size" and not run.parallel.overlap_grad_reduce:
            reason = "parallel.overlap_grad_reduce is off, and gradients are one bucket"
        elif name == "align_param_gather" and not run.parallel.overlap_param_gather:
            reason = "parallel.overlap_param_gather is off"
        elif name == "distribute_saved_activations" and run.train.recompute != "full":
            reason = "train.recompute is not full"
        if reason is not None:
            yield f"parallel.megatron.{name} has no effect: {reason}; remove it"


def scale_cos_and_sin(config: TransformerConfig, factor: float) -> None:
    """Make Megatron's attention multiply cos and sin by `factor`.

    It knows only yarn's formula, (0.1 mscale ln(scaling) + 1) / (0.1 mscale_all_dim ln(scaling) + 1), read
    from attributes that are no fields of its configuration; scaling = e leaves 0.1 mscale + 1.
    """
    config.yarn_rotary_scaling_factor = math.e  # type: ignore[attr-defined]
    config.yarn_mscale = (factor - 1.0) / 0.1  # type: ignore[attr-defined]
    config.yarn_mscale_all_dim = 0.0  # type: ignore[attr-defined]
