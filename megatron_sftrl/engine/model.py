"""The network: one function from an architecture to Megatron model chunks, on this rank's share of it."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_sftrl.architectures.architecture import Architecture, padded_vocab_size
from megatron_sftrl.config.schema import ModelSection, ParallelSection, TrainSection
from megatron_sftrl.engine.local_layers import PackedAttention, RMSNorm
from megatron_sftrl.engine.parallel import ParallelContext
from megatron_sftrl.types import TokenBatch


class LanguageModel(GPTModel):
    """A GPTModel whose last stage returns hidden states; logits are asked for separately.

    The loss then decides when logits exist, and a reference model can keep [T, H] instead of [T, V].
    """

    def _postprocess(self, hidden_states: Tensor, **_: object) -> Tensor:
        return hidden_states

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Output layer on the last stage: [T, 1, H] (or its sequence-parallel share) -> [T, V_padded/tp]."""
        weight = (
            self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        )
        logits, _ = self.output_layer(hidden_states, weight=weight)
        return logits.squeeze(1)


def build_model_chunks(
    architecture: Architecture, config: TransformerConfig, parallel: ParallelContext
) -> list[LanguageModel]:
    """This rank's model chunks (one, or vp of them), parameters allocated but not initialised."""
    groups = ProcessGroupCollection.use_mpu_process_groups()
    chunks = []
    for chunk in range(parallel.vp_size):
        is_first = parallel.pp_rank == 0 and chunk == 0
        is_last = parallel.is_last_stage and chunk == parallel.vp_size - 1
        vp_stage = chunk if parallel.vp_size > 1 else None
        chunks.append(
            LanguageModel(
                config=config,
                transformer_layer_spec=_block_spec(config, vp_stage, parallel.pp_rank),  # type: ignore[arg-type]
                vocab_size=padded_vocab_size(architecture.vocab_size, parallel.tp_size),
                max_sequence_length=architecture.max_position_embeddings,
                pre_process=is_first,
                post_process=is_last,
                parallel_output=True,
                share_embeddings_and_output_weights=architecture.tie_embeddings,
                position_embedding_type="rope",
                rotary_base=architecture.rope_theta,  # type: ignore[arg-type]
                rope_scaling=architecture.rope_scaling_factor is not None,
                rope_scaling_factor=architecture.rope_scaling_factor or 8.0,
                pg_collection=groups,
                vp_stage=vp_stage,
            ).to(parallel.device)
        )
        _mark_tensor_parallel_parameters(chunks[-1])
    return chunks


def transformer_config(
    architecture: Architecture,
    model: ModelSection,
    parallel: ParallelSection,
    train: TrainSection,
    *,
    is_cuda: bool,
) -> TransformerConfig:
    """Everything megatron-core needs to know, from our sections."""
    dtype = torch.bfloat16 if model.dtype == "bf16" else torch.float32
    is_interleaved = parallel.vp > 1
    with_te = is_cuda and uses_transformer_engine()
    return TransformerConfig(
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
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vp if is_interleaved else None,
        context_parallel_size=parallel.cp,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=model.dtype == "bf16",
        # Weights come from engine/initialize.py or a checkpoint, the same in every layout.
        perform_initialization=False,
        use_cpu_initialization=not is_cuda,
        # Normalisation is data (token_weight): the schedule must neither average nor scale. See scaling.py.
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
        apply_rope_fusion=with_te,
        bias_dropout_fusion=is_cuda,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
    )


def uses_transformer_engine() -> bool:
    """Transformer Engine's layers are used where it is installed and CUDA is there."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def model_inputs(batch: TokenBatch, *, cp_size: int) -> dict[str, Tensor | PackedSeqParams | None]:
    """Keyword arguments of the model's forward for one (context-parallel share of a) micro-batch."""
    whole = batch.cu_seqlens * cp_size
    longest = int(whole.diff().max())
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=whole,
        cu_seqlens_kv=whole,
        cu_seqlens_q_padded=whole,
        cu_seqlens_kv_padded=whole,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    return {
        "input_ids": batch.tokens[None],
        "position_ids": batch.positions[None],
        "attention_mask": None,
        "packed_seq_params": packed,
    }


def _mark_tensor_parallel_parameters(chunk: LanguageModel) -> None:
    """Tell Megatron which parameters are shards.

    Its layers do so only while they draw weights themselves; an unmarked shard counts as a copy and
    the gradient norm of tp > 1 would miss every shard but the first.
    """
    for module in chunk.modules():
        if isinstance(module, ColumnParallelLinear | VocabParallelEmbedding | RowParallelLinear):
            sharded_dim = 1 if isinstance(module, RowParallelLinear) else 0
            for name, parameter in module.named_parameters(recurse=False):
                is_whole = isinstance(module, RowParallelLinear) and name == "bias"
                if not is_whole and not hasattr(parameter, "tensor_model_parallel"):
                    set_tensor_model_parallel_attributes(parameter, True, sharded_dim, 1)


def _block_spec(
    config: TransformerConfig, vp_stage: int | None, pp_rank: int
) -> ModuleSpec | TransformerBlockSubmodules:
    qk_norm = bool(config.qk_layernorm)
    if uses_transformer_engine():
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_norm)
    layer = get_gpt_layer_local_spec(qk_layernorm=qk_norm, normalization="RMSNorm")
    submodules: Any = layer.submodules
    submodules.input_layernorm = submodules.pre_mlp_layernorm = RMSNorm
    attention = submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    if qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)
    return TransformerBlockSubmodules(
        layer_specs=[layer] * num_layers,
        layer_norm=RMSNorm,  # type: ignore[arg-type]
    )
