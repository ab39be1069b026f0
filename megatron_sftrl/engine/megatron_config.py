"""What Megatron is told: how its layers, its DDP and its optimizer are configured, from a run's sections."""

from __future__ import annotations

import importlib.util
import math

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_sftrl.config.schema import ModelSection, OptimSection, ParallelSection, TrainSection
from megatron_sftrl.models.architecture import Architecture


def uses_transformer_engine(model: ModelSection, *, is_cuda: bool) -> bool:
    """Whether layers are Transformer Engine's, which run on CUDA alone, or torch's."""
    is_there = is_cuda and importlib.util.find_spec("transformer_engine") is not None
    return is_there and model.layers != "torch"


def transformer_config(
    architecture: Architecture,
    model: ModelSection,
    parallel: ParallelSection,
    train: TrainSection,
    *,
    is_cuda: bool,
) -> TransformerConfig:
    """Of Megatron's layers and pipeline schedule."""
    dtype = torch.bfloat16 if model.dtype == "bf16" else torch.float32
    is_interleaved = parallel.vp > 1
    with_te = uses_transformer_engine(model, is_cuda=is_cuda)
    mixture = architecture.mixture
    config = TransformerConfig(
        transformer_impl="transformer_engine" if with_te else "local",
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups,
        kv_channels=architecture.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=architecture.qkv_bias,
        qk_layernorm=architecture.qk_norm,
        # (left, right) positions beside the token itself; the list is indexed by the layer over all stages.
        window_size=None if architecture.sliding_window is None else (architecture.sliding_window - 1, 0),
        window_attn_skip_freq=[int(i in architecture.window_layers) for i in range(architecture.num_layers)],
        num_moe_experts=mixture.num_experts if mixture else None,
        moe_ffn_hidden_size=architecture.ffn_hidden_size if mixture else None,
        moe_router_topk=mixture.experts_per_token if mixture else 2,
        # The softmax over the chosen logits is the softmax over all, divided by the sum of the chosen.
        moe_router_pre_softmax=mixture is not None and not mixture.normalizes_weights,
        # As in transformers: logits in the model's dtype, softmax in fp32, every token reaches its experts.
        moe_router_score_function="softmax",
        moe_router_dtype=None,
        moe_router_load_balancing_type="aux_loss" if model.moe_aux_loss_coeff else "none",
        moe_aux_loss_coeff=model.moe_aux_loss_coeff,
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=with_te and mixture is not None,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vp if is_interleaved else None,
        context_parallel_size=parallel.cp,
        expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=parallel.etp or parallel.tp,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=model.dtype == "bf16",
        # Weights come from initialize_weights() or a checkpoint, the same in every layout.
        perform_initialization=False,
        use_cpu_initialization=not is_cuda,
        # Normalisation is data (token_weight): the schedule must neither average nor scale. See schedule.py.
        calculate_per_token_loss=True,
        recompute_granularity="full" if train.recompute == "full" else None,
        recompute_method="uniform" if train.recompute == "full" else None,
        recompute_num_layers=1 if train.recompute == "full" else None,
        # The default p2p order exchanges wrong tensors under a virtual pipeline on gloo (measured), no error.
        overlap_p2p_comm=is_interleaved,
        batch_p2p_comm=not is_interleaved,
        # Frees an output whose asynchronous send gloo may still read: wrong numbers, no error (measured).
        deallocate_pipeline_outputs=is_cuda,
        # These need CUDA extensions or torch.compile; Transformer Engine brings its own fusions.
        # Transformer Engine's fused rope knows no factor on cos and sin, and would leave it out silently.
        apply_rope_fusion=with_te and architecture.rope.attention_factor == 1.0,
        bias_dropout_fusion=is_cuda,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
    )
    _scale_cos_and_sin(config, architecture.rope.attention_factor)
    return config


def ddp_config(parallel: ParallelSection) -> DistributedDataParallelConfig:
    """Of Megatron's DDP; gradients are summed in fp32."""
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.distributed_optimizer,
        # A non-finite gradient is found by its norm, skipped and counted; no assertion in the backward.
        check_for_nan_in_grad=False,
    )


def optimizer_config(optim: OptimSection, parallel: ParallelSection, *, is_bf16: bool) -> OptimizerConfig:
    """Of Megatron's optimizer; step_if_finite decides what is decayed."""
    return OptimizerConfig(
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
    )


def _scale_cos_and_sin(config: TransformerConfig, factor: float) -> None:
    """Make Megatron's attention multiply cos and sin by `factor`.

    It knows only yarn's formula, (0.1 mscale ln(scaling) + 1) / (0.1 mscale_all_dim ln(scaling) + 1), read
    from attributes that are no fields of its configuration; scaling = e leaves 0.1 mscale + 1.
    """
    config.yarn_rotary_scaling_factor = math.e  # type: ignore[attr-defined]
    config.yarn_mscale = (factor - 1.0) / 0.1  # type: ignore[attr-defined]
    config.yarn_mscale_all_dim = 0.0  # type: ignore[attr-defined]
