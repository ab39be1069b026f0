"""parallel.megatron: fields of Megatron's configurations that a run sets by their own names, checked."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import functools
import json
import operator
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig
from pydantic import TypeAdapter, ValidationError

from megatron_sftrl.errors import UserError, first_of

# Fields that megatron_config.py sets, and what a user writes instead.

_SET_HERE = {
    "model.hf, model.hf_config or model.architecture says it": """
        num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels normalization
        layernorm_epsilon gated_linear_unit activation_func add_bias_linear add_qkv_bias qk_layernorm
        window_size window_attn_skip_freq num_moe_experts moe_ffn_hidden_size moe_router_topk
        moe_router_pre_softmax moe_router_score_function moe_shared_expert_intermediate_size
        moe_shared_expert_gate softmax_scale no_rope_freq rotary_interleaved hidden_dropout
        linear_attention_freq attention_dropout""",
    "model.layers decides": "transformer_impl moe_grouped_gemm",
    "set model.dtype": "params_dtype pipeline_dtype bf16",
    "set model.moe_aux_loss_coeff": "moe_aux_loss_coeff moe_router_load_balancing_type",
    "set model.moe_bias_update_rate": "moe_router_enable_expert_bias moe_router_bias_update_rate",
    "set parallel.tp": "tensor_model_parallel_size",
    "set parallel.pp": "pipeline_model_parallel_size",
    "set parallel.vp": "virtual_pipeline_model_parallel_size",
    "set parallel.first_stage_layers": "num_layers_in_first_pipeline_stage",
    "set parallel.last_stage_layers": "num_layers_in_last_pipeline_stage",
    "set parallel.cp": "context_parallel_size",
    "set parallel.ep": "expert_model_parallel_size",
    "set parallel.etp": "expert_tensor_parallel_size",
    "set parallel.sequence_parallel": "sequence_parallel",
    "set parallel.distributed_optimizer": "use_distributed_optimizer",
    "set parallel.overlap_grad_reduce": "overlap_grad_reduce",
    "set parallel.overlap_param_gather": "overlap_param_gather",
    "set parallel.moe_dispatcher": "moe_token_dispatcher_type moe_enable_deepep moe_extended_tp",
    "set parallel.moe_permute_fusion": "moe_permute_fusion",
    "set parallel.moe_router_fusion": "moe_router_fusion",
    "set train.recompute": (
        "recompute_granularity recompute_method recompute_num_layers recompute_modules moe_layer_recompute"
    ),
    "set train.fp8": "fp8 fp8_recipe",
    "set train.deterministic": "deterministic_mode",
    "set optim.name": "optimizer",
    "set optim.lr and its neighbours": "lr min_lr decoupled_lr decoupled_min_lr",
    "set optim.weight_decay": "weight_decay",
    "AdamW's decay, optim.weight_decay, is decoupled": "decoupled_weight_decay",
    "set optim.betas": "adam_beta1 adam_beta2",
    "set optim.eps": "adam_eps",
    "set optim.momentum": "sgd_momentum",
    "set optim.clip_grad": "clip_grad",
    "set optim.exp_avg_dtype": "exp_avg_dtype use_precision_aware_optimizer",
    "set optim.exp_avg_sq_dtype": "exp_avg_sq_dtype",
    "set optim.cpu_offload": "optimizer_cpu_offload optimizer_offload_fraction",
    "set parallel.grad_reduce_dtype": "grad_reduce_in_fp32 main_grads_dtype",
    "fp32 weights are whole, as checkpoints hold them": "store_param_remainders main_params_dtype",
    "weights come from model.* or model.init_checkpoint, the same in every layout": """
        perform_initialization use_cpu_initialization init_method_std embedding_init_method_std
        init_model_with_meta_device""",
    "a step is normalised by each token's own weight, and Megatron must neither average nor scale": """
        calculate_per_token_loss average_in_collective""",
    "a gradient that is not finite is found by its norm, skipped and counted": """
        check_for_nan_in_grad check_for_large_grads""",
    "it follows the device and parallel.vp": "overlap_p2p_comm batch_p2p_comm deallocate_pipeline_outputs",
    "the attention and the norms of this package do not have it": """
        masked_softmax_fusion persist_layer_norm apply_query_key_layer_scaling attention_softmax_in_fp32
        memory_efficient_layer_norm""",
}

_TURNED_OFF_ONLY = frozenset(
    {"bias_activation_fusion", "gradient_accumulation_fusion", "apply_rope_fusion", "bias_dropout_fusion"}
)
"""Set here, too: on wherever they are right. false is a user's to say."""

# Fields that Megatron would take, and that would make something of this package untrue without an error.

_REFUSED = {
    "the model would not be the one that its files describe": """
        multi_latent_attention apply_residual_connection_post_layernorm layernorm_zero_centered_gamma
        attention_output_gate softmax_type glu_linear_offset activation_func_clamp_value qk_l2_norm
        experimental_attention_variant mrope_section moe_shared_expert_overlap moe_layer_freq
        moe_router_topk_scaling_factor moe_router_num_groups moe_router_group_topk moe_latent_size
        moe_router_topk_limited_devices moe_apply_probs_on_input is_hybrid_model heterogeneous_block_specs
        hetereogenous_dist_checkpoint fp32_residual_connection use_mamba_mem_eff_path use_mup""",
    "which experts see a token would depend on its micro-batch or on chance": """
        moe_expert_capacity_factor moe_pad_expert_input_to_capacity moe_token_dropping moe_token_drop_policy
        moe_input_jitter_eps moe_router_force_load_balancing moe_router_force_biased
        moe_enable_routing_replay
        moe_router_quantile_balancing_ema moe_expert_rank_capacity_factor""",
    "the loss would gain a term that its tokens' weights do not know": "moe_z_loss_coeff",
    "output layer and loss are this package's own, and would not see it": """
        cross_entropy_loss_fusion cross_entropy_fusion_impl defer_embedding_wgrad_compute wgrad_deferral_limit
        fp8_output_proj""",
    "checkpoints, generation and the update of engines know Megatron's DDP and its layers, not this": """
        use_megatron_fsdp use_custom_fsdp data_parallel_sharding_strategy outer_dp_sharding_strategy
        preserve_fp32_weights keep_fp8_transpose_cache suggested_communication_unit_size
        gradient_reduce_div_fusion use_layer_wise_distributed_optimizer moe_use_legacy_grouped_gemm
        moe_single_grouped_weight moe_single_grouped_bias moe_mlp_glu_interleave_size
        use_transformer_engine_op_fuser use_grouped_gemm_for_dense_mlp use_kitchen use_kitchen_attention
        kitchen_attention_backend fused_residual_rmsnorm tensor_parallel_num_weight_shards
        gtp_weight_remat_size expert_tensor_parallel_num_weight_shards expert_gtp_weight_remat_size
        param_name_patterns_for_fp32_local_accumulation""",
    "it asks for process groups or a schedule that this package does not make": """
        num_distributed_optimizer_instances hierarchical_context_parallel_sizes hybrid_context_parallel
        max_seqlen_per_dp_cp_rank pipeline_model_parallel_comm_backend overlap_moe_expert_parallel_comm
        delay_wgrad_compute ep_overlap_early_attn_memory_release overlap_dispatch_backward_with_experts_wgrad
        high_priority_a2a_comm_stream overlap_param_gather_with_optimizer_step use_ring_exchange_p2p
        num_microbatches_with_partial_activation_checkpoints microbatch_group_size_per_vp_stage""",
    "which layers a stage holds follows from parallel.pp, vp, first_stage_layers and last_stage_layers": """
        pipeline_model_parallel_layout account_for_embedding_in_pipeline_split
        account_for_loss_in_pipeline_split""",
    "a CUDA graph has inputs of one shape, and no cu_seqlens among them: packed sequences differ in both": """
        enable_cuda_graph external_cuda_graph optimizer_cuda_graph inference_cuda_graph_scope
        moe_pad_experts_for_cuda_graph_inference""",
    "Transformer Engine's user buffers have one size for a whole process, and micro-batches of training, "
    "evaluation and generation have several": "tp_comm_overlap",
    "only the recipe 'delayed' reads it, whose history of scales is in no checkpoint here": """
        fp8_margin fp8_interval fp8_amax_history_len fp8_amax_compute_algo tp_only_amax_red""",
    "weights stay in model.dtype: generation, engines and checkpoints read them": """
        fp8_param fp8_param_gather fp8_quantizer_factory reuse_grad_buf_for_mxfp8_param_ag fp16
        enable_autocast autocast_dtype loss_scale initial_loss_scale min_loss_scale loss_scale_window
        hysteresis""",
    "only Megatron's own training loop or its own generation reads it": """
        qk_clip qk_clip_alpha qk_clip_threshold log_max_attention_logit log_num_zeros_in_grad
        barrier_with_L1_time moe_per_layer_logging test_mode flash_decode batch_invariant_mode
        use_inference_optimized_layers symmetric_ar_type nccl_all_reduce_for_prefill mlp_chunks_for_prefill
        grad_norm_skip_threshold use_te_rng_tracker variable_seq_lengths mtp_standalone config_logger_dir""",
}
_REFUSED_BY_PREFIX = {
    "the model would not be the one that its files describe": "mamba_ linear_ dsa_ mup_ mtp_",
    "set optim.name": "muon_ lion_ soap_ adaptive_muon_",
    "weights stay in model.dtype: generation, engines and checkpoints read them": "fp4",
    "a CUDA graph has inputs of one shape, and no cu_seqlens among them: packed sequences differ in both": (
        "cuda_graph_"
    ),
    "parallel.megatron.tp_comm_overlap is refused, and only it reads this": "tp_comm_",
    "checkpoints, generation and the update of engines know Megatron's DDP and its layers, not this": (
        "fsdp_ megatron_fsdp_"
    ),
    "only Megatron's own training loop or its own generation reads it": "inference_",
}

_CLASSES = (TransformerConfig, DistributedDataParallelConfig, OptimizerConfig)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MegatronFields:
    """What parallel.megatron says to each of Megatron's configurations, with the types that they want."""

    transformer: dict[str, Any]
    ddp: dict[str, Any]
    optimizer: dict[str, Any]


def megatron_fields(written: Mapping[str, Any]) -> MegatronFields:
    """The fields of `written` for each configuration that has one of that name.

    Raises:
        UserError: names that Megatron does not have, fields that have a key of their own or would break a
            promise, values of a wrong type; all of them.
    """
    known = {each.name for kind in _CLASSES for each in dataclasses.fields(kind)}
    problems: list[str] = []
    parts: tuple[dict[str, Any], ...] = ({}, {}, {})
    for name, value in written.items():
        if (problem := _refusal(name, value, known)) is not None:
            problems.append(problem)
            continue
        for kind, part in zip(_CLASSES, parts, strict=True):
            if name in (hints := _annotations(kind)):
                try:
                    part[name] = _converted(hints[name], value)
                except (ValueError, TypeError) as error:
                    problems.append(f"parallel.megatron.{name}: {error}")
                    break
    if problems:
        raise UserError("\n  ".join(["parallel.megatron cannot be used", *first_of(problems, 20)]))
    transformer, ddp, optimizer = parts
    return MegatronFields(transformer=transformer, ddp=ddp, optimizer=optimizer)


def field_owners() -> dict[str, str]:
    """For every field that may not be written here: the key to use, or the reason."""
    owners = {}
    for table in (_SET_HERE, _REFUSED):
        for text, names in table.items():
            owners |= dict.fromkeys(names.split(), text)
    return owners | dict.fromkeys(_TURNED_OFF_ONLY, "it is on wherever it is right; false turns it off")


def _refusal(name: str, value: object, known: set[str]) -> str | None:
    """Why a field of this name and value cannot be set; None where it can."""
    if name not in known or name.startswith("_"):
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else "look the name up in Megatron's documentation"
        return f"parallel.megatron.{name}: Megatron has no such field: {hint}"
    if name in _TURNED_OFF_ONLY and value is False:
        return None
    reason = field_owners().get(name) or _by_prefix(name)
    return None if reason is None else f"parallel.megatron.{name} cannot be written here: {reason}"


def _by_prefix(name: str) -> str | None:
    for reason, prefixes in _REFUSED_BY_PREFIX.items():
        if name.startswith(tuple(prefixes.split())):
            return reason
    return None


def _annotations(kind: type) -> dict[str, Any]:
    """Of the fields alone, with strings resolved."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _converted(annotation: Any, value: object) -> object:
    """`value` as the annotated type.

    Raises:
        ValueError: what was expected, and got.
    """
    options = [*_options(annotation)]
    if torch.dtype in options and isinstance(value, str):
        if value not in DTYPES:
            raise ValueError(f"expected one of {', '.join(DTYPES)}, got {value!r}")
        return DTYPES[value]
    for option in options:
        if isinstance(option, type) and issubclass(option, enum.Enum):
            if value not in option.__members__:
                raise ValueError(f"expected one of {', '.join(option.__members__)}, got {value!r}")
            return option[str(value)]
    writable = tuple(option for option in options if _is_writable(option))
    if all(option is type(None) for option in writable):
        raise ValueError(f"expected {annotation}, which YAML cannot write, got {value!r}: remove it")
    try:
        # By way of JSON: strict about numbers and truth values, and lists are tuples where they have to be.
        kind: Any = functools.reduce(operator.or_, writable)
        return TypeAdapter(kind).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        expected = "; ".join(dict.fromkeys(each["msg"] for each in error.errors(include_url=False)))
        raise ValueError(f"expected {annotation}, got {value!r}: {expected}") from error


def _options(annotation: Any) -> Iterator[Any]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for option in typing.get_args(annotation):
            yield from _options(option)
    else:
        yield annotation


def _is_writable(option: Any) -> bool:
    if typing.get_origin(option) in (list, tuple):
        inner = [each for each in typing.get_args(option) if each is not ...]
        return all(_is_writable(each) for kind in inner for each in _options(kind))
    return typing.get_origin(option) is Literal or option in (int, float, bool, str, list, type(None))
