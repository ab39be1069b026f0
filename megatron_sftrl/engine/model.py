"""The network: one function from an architecture to Megatron model chunks, on this rank's share of it."""

from __future__ import annotations

import contextlib
import hashlib
import math
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.distributed import DistributedDataParallel
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from megatron_sftrl.engine.blocks import SpanningNorm, complete_blocks
from megatron_sftrl.engine.decode_step import new_token_states
from megatron_sftrl.engine.gated_delta_net import GatedDeltaNet
from megatron_sftrl.engine.kv_cache import CacheSlots
from megatron_sftrl.engine.latent_attention import LatentAttention
from megatron_sftrl.engine.local_layers import BiasedColumnParallelLinear, PackedAttention, RMSNorm
from megatron_sftrl.engine.mixtures import (
    add_routing_biases,
    balance_experts,
    let_experts_add_biases,
    mark_expert_parameters,
    submodules_of_mlp,
)
from megatron_sftrl.engine.packed_sequences import PackedSequences, places_of
from megatron_sftrl.engine.parallel import ParallelContext
from megatron_sftrl.models.architecture import Architecture, padded_vocab_size
from megatron_sftrl.models.rope import Rope, inverse_frequencies
from megatron_sftrl.types import TokenBatch
from megatron_sftrl.vocab_parallel import OutputLayer

# Weights that are still on their way from the ranks whose optimizer moved them.
#
# With parallel.overlap_param_gather the others' shares arrive during the next forward. Calling a module waits
# for its weights; code that reads them in another way has to call LanguageModel.wait_for_weights() first.


class WeightGathers:
    """The all-gathers of the weights of one chunk in Megatron's DDP, with overlap_param_gather.

    Megatron's own start_param_sync(force_sync=True) returns once an all-gather that is under way has ended,
    also when that one began before the last update (0.16.1, 0.19.2); the rules here leave no such one behind.
    """

    def __init__(self, wrapped: DistributedDataParallel) -> None:
        self._groups = [*wrapped.bucket_groups, *wrapped.expert_parallel_bucket_groups]

    def wait(self) -> None:
        """Return when every weight is what the last update made it; a collective over data-parallel ranks."""
        for group in self._groups:
            if group.param_gather_handle is not None or not group.param_gather_dispatched:
                group.start_param_sync(force_sync=True)

    def before_update(self) -> None:
        """Let what is under way end: it reads and writes the memory that the optimizer is about to change."""
        for group in self._groups:
            if group.param_gather_handle is not None:
                group.start_param_sync(force_sync=True)

    def after_update(self) -> None:
        """From now on the other ranks' weights are old, whatever was gathered between backward and update."""
        for group in self._groups:
            group.param_gather_dispatched = False


class LanguageModel(GPTModel):
    """A GPTModel whose last stage returns hidden states; logits are asked for separately.

    The loss then decides when logits exist, and a reference model can keep [T, H] instead of [T, V].
    """

    architecture: Architecture
    frequencies: Mapping[Rope, Tensor]
    """Of each rope that its layers have, on the device."""
    gathers: WeightGathers | None = None
    """Of a chunk whose weights arrive during the forward."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Megatron's, but new tokens of cached sequences take the short way through the same weights."""
        places = places_of(kwargs.get("packed_seq_params"))
        if places is None or places.span is None:
            padding = kwargs.get("padding_mask")  # [1, T]
            if padding is not None and self.config.sequence_parallel and not self.pre_process:
                # Megatron cuts it on the first stage alone.
                group = self.pg_collection.tp
                kwargs["padding_mask"] = scatter_to_sequence_parallel_region(padding.T, group=group).T
            return super().forward(*args, **kwargs)
        return self.new_token_states(kwargs["input_ids"][0], places)

    def new_token_states(self, tokens: Tensor, places: CacheSlots) -> Tensor:
        """decode_step's of this stage, once its weights are here."""
        self.wait_for_weights()
        return self._postprocess(new_token_states(self, tokens, places))

    def _postprocess(self, hidden_states: Tensor, **_: object) -> Tensor:
        """Nothing of Megatron's last step, but logits_divisor: it is the same here, and spares [T, V]."""
        divisor = self.architecture.logits_divisor if self.post_process else 1.0
        return hidden_states if divisor == 1 else hidden_states / divisor

    def logits(self, hidden_states: Tensor, *, weight: Tensor | None = None) -> Tensor:
        """Output layer on the last stage: [T, 1, H] (or its sequence-parallel share) -> [T, V_padded/tp].

        Args:
            weight: in place of its own.
        """
        if weight is None and self.share_embeddings_and_output_weights:
            weight = self.output_weight()
        logits, _ = self.output_layer(hidden_states, weight=weight)
        return logits.squeeze(1)

    def output(
        self, hidden_states: Tensor, *, chunk_bytes: int | None = None, weight: Tensor | None = None
    ) -> OutputLayer:
        """The same for a caller that makes the logits itself, a chunk of tokens at a time."""
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            whole = gather_from_sequence_parallel_region(hidden_states, group=group)
        else:
            whole = copy_to_tensor_model_parallel_region(hidden_states, group=group)
        weight = self.output_weight() if weight is None else weight
        return OutputLayer(
            hidden=whole.squeeze(1),
            weight=weight,
            main_grad=getattr(weight, "main_grad", None),
            is_shared=self.share_embeddings_and_output_weights and self.pre_process,
            chunk_bytes=chunk_bytes,
        )

    def output_weight(self) -> Tensor:
        """[V_padded/tp, H] of the output layer or the tied embedding, on the last stage."""
        self.wait_for_weights()
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        assert self.output_layer.weight is not None, "an untied output layer owns its weight"
        return self.output_layer.weight

    def wait_for_weights(self) -> None:
        """Before this chunk's weights are read, or written, other than by calling their modules.

        With overlap_param_gather it is a collective over data-parallel ranks, else nothing.
        """
        if self.gathers is not None:
            self.gathers.wait()


def build_model_chunks(
    architecture: Architecture, config: TransformerConfig, parallel: ParallelContext
) -> list[LanguageModel]:
    """This rank's model chunks (one, or vp of them), parameters allocated but not initialised."""
    groups = ProcessGroupCollection.use_mpu_process_groups()
    frequencies = {
        rope: inverse_frequencies(rope, architecture.rope_head_dim).to(parallel.device)
        for rope in (architecture.rope, architecture.window_rope)
        if rope is not None
    }
    turns_itself = config.transformer_impl != "local"  # Megatron; else blocks.py lets queries and keys turn
    chunks = []
    for chunk in range(parallel.vp_size):
        is_first = parallel.pp_rank == 0 and chunk == 0
        is_last = parallel.is_last_stage and chunk == parallel.vp_size - 1
        vp_stage = chunk if parallel.vp_size > 1 else None
        with warnings.catch_warnings(), _head_adds_no_gradients(config):
            # Experts at etp = 1 have nothing to split a sequence along, and say so one by one.
            warnings.filterwarnings("ignore", message="`sequence_parallel` is set to `True`, but tensor")
            chunks.append(
                LanguageModel(
                    config=config,
                    transformer_layer_spec=_block_spec(architecture, config, vp_stage, parallel.pp_rank),  # type: ignore[arg-type]
                    vocab_size=padded_vocab_size(architecture.vocab_size, parallel.tp_size),
                    max_sequence_length=architecture.max_position_embeddings,
                    pre_process=is_first,
                    post_process=is_last,
                    parallel_output=True,
                    share_embeddings_and_output_weights=architecture.tie_embeddings,
                    position_embedding_type="rope" if turns_itself else "none",
                    rotary_percent=architecture.rope.fraction,
                    rotary_base=architecture.rope.theta,  # type: ignore[arg-type]
                    pg_collection=groups,
                    vp_stage=vp_stage,
                )
            )
        chunks[-1].architecture, chunks[-1].frequencies = architecture, frequencies
        complete_blocks(chunks[-1], architecture, frequencies, _norm(config))
        add_routing_biases(chunks[-1])
        let_experts_add_biases(chunks[-1])
        chunks[-1].to(parallel.device)
        _add_gradients_in_layers(chunks[-1], config)
        _mark_tensor_parallel_parameters(chunks[-1])
        mark_expert_parameters(chunks[-1])
        _remember_prompts(chunks[-1])
        if turns_itself:
            # Its own scaling knows one fixed form of llama3 and no linear one.
            chunks[-1].rotary_pos_emb.inv_freq = frequencies[architecture.rope]
    return chunks


@contextlib.contextmanager
def _head_adds_no_gradients(config: TransformerConfig) -> Iterator[None]:
    """While a chunk is built: the output layer would ask for Apex, which Transformer Engine's layers do not.

    The two read the same field of one configuration, each once, when it is built.
    """
    wanted = config.gradient_accumulation_fusion
    config.gradient_accumulation_fusion = wanted and config.transformer_impl != "transformer_engine"
    yield
    config.gradient_accumulation_fusion = wanted


def _add_gradients_in_layers(chunk: torch.nn.Module, config: TransformerConfig) -> None:
    """Let Transformer Engine's layers add to main_grad, as the configuration says; torch's were built so."""
    for module in chunk.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = config.gradient_accumulation_fusion  # type: ignore[assignment]


def model_inputs(
    batch: TokenBatch, packed: PackedSequences, *, marks_padding: bool = False
) -> dict[str, Tensor | PackedSequences | None]:
    """Keyword arguments of the model's forward for one (context-parallel share of a) micro-batch.

    Args:
        packed: its whole sequences.
        marks_padding: routers leave padding out of their load-balancing loss.
    """
    inputs: dict[str, Tensor | PackedSequences | None] = {
        "input_ids": batch.tokens[None],
        "position_ids": batch.positions[None],
        "attention_mask": None,
        "packed_seq_params": packed,
    }
    if marks_padding and batch.is_padding is not None:
        inputs["padding_mask"] = batch.is_padding[None]
    return inputs


def _remember_prompts(chunk: LanguageModel) -> None:
    """Have each layer write whole sequences into the cache that a forward carries, if any.

    A hook, since layers have torch's attention or Transformer Engine's: either is called with the keys as
    they are attended to, rotated already.
    """

    def write(
        layer: int, _: torch.nn.Module, tensors: tuple[Tensor, ...], options: dict[str, PackedSequences]
    ) -> None:
        if (places := places_of(options.get("packed_seq_params"))) is not None:
            _query, key, value, *_mask = tensors
            places.cache.write(layer, places, key, value)

    layers: Any = chunk.decoder.layers
    for layer in layers:
        if chunk.architecture.attends(layer.layer_number - 1):
            attention = layer.self_attention.core_attention
            attention.register_forward_pre_hook(partial(write, layer.layer_number), with_kwargs=True)


def _mark_tensor_parallel_parameters(chunk: LanguageModel) -> None:
    """Tell Megatron which parameters are shards, which its layers do only while they draw weights themselves.

    An unmarked shard counts as a copy, and the gradient norm of tp > 1 would miss every shard but the first.
    """
    for module in chunk.modules():
        if isinstance(module, ColumnParallelLinear | VocabParallelEmbedding | RowParallelLinear):
            sharded_dim = 1 if isinstance(module, RowParallelLinear) else 0
            for name, parameter in module.named_parameters(recurse=False):
                is_whole = isinstance(module, RowParallelLinear) and name == "bias"
                if not is_whole and not hasattr(parameter, "tensor_model_parallel"):
                    set_tensor_model_parallel_attributes(parameter, True, sharded_dim, 1)


def _norm(config: TransformerConfig) -> Any:
    """The class of a norm that stands alone."""
    return TESpecProvider().layer_norm() if config.transformer_impl == "transformer_engine" else RMSNorm


def _block_spec(
    architecture: Architecture, config: TransformerConfig, vp_stage: int | None, pp_rank: int
) -> ModuleSpec | TransformerBlockSubmodules:
    if config.transformer_impl == "transformer_engine" and not architecture.has_layers_of_kinds:
        return _fused_layer_spec(architecture, config, has_experts=architecture.mixture is not None)
    make = _fused_layer_spec if config.transformer_impl == "transformer_engine" else _layer_spec
    first = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=pp_rank)
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)
    layers = range(first, first + num_layers)
    kinds = [(architecture.has_experts(layer), architecture.attends(layer)) for layer in layers]
    specs = {
        (experts, attends): make(architecture, config, has_experts=experts, attends=attends)
        for experts, attends in set(kinds)
    }
    return TransformerBlockSubmodules(layer_specs=[specs[kind] for kind in kinds], layer_norm=_norm(config))


def _fused_layer_spec(
    architecture: Architecture, config: TransformerConfig, *, has_experts: bool, attends: bool = True
) -> ModuleSpec:
    """A block of Transformer Engine's layers."""
    assert attends, "check_megatron refuses hybrids"
    fused = get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts if has_experts else None,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=bool(config.qk_layernorm),
    )
    if has_experts:
        balance_experts(fused, config)
    _change_norms(fused, architecture, linear=TESpecProvider().column_parallel_linear())
    if config.window_size is not None and config.context_parallel_size > 1:
        # Its attention refuses a window under context parallelism on packed sequences.
        fused.submodules.self_attention.submodules.core_attention = PackedAttention  # type: ignore[union-attr]
    return fused


def _layer_spec(
    architecture: Architecture, config: TransformerConfig, *, has_experts: bool, attends: bool = True
) -> ModuleSpec:
    """A block of torch's layers."""
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts if has_experts else None,
        qk_layernorm=bool(config.qk_layernorm),
        normalization="RMSNorm",
    )
    submodules: Any = layer.submodules
    if has_experts:
        balance_experts(layer, config)
        # The norm before a router stands alone in Transformer Engine's layers, so it keeps its own name here.
        del submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    submodules.input_layernorm = submodules.pre_mlp_layernorm = RMSNorm
    if not attends:
        own = ModuleSpec(module=GatedDeltaNet, params={"net": architecture.delta_net})
    elif architecture.latent is not None:
        sizes = {"latent": architecture.latent, "rope": architecture.rope}
        own = ModuleSpec(module=LatentAttention, params=sizes)
    else:
        own = None
    if own is not None:
        submodules.self_attention = own
        # No projection of its own stands behind this norm.
        del submodules.sharded_state_dict_keys_map["input_layernorm."]
        return layer
    attention = submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    if config.add_qkv_bias:
        attention.linear_qkv = BiasedColumnParallelLinear
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    _change_norms(layer, architecture, linear=None)
    return layer


def _change_norms(layer: ModuleSpec, architecture: Architecture, *, linear: Any) -> None:
    """Leave out the norms before attention and MLP, and let those of q and k span the heads, if asked for.

    Args:
        linear: takes the place of projections that have the norm in them; None where none has.
    """
    submodules: Any = layer.submodules
    attention = submodules.self_attention.submodules
    if architecture.norms == "behind":
        submodules.input_layernorm = submodules.pre_mlp_layernorm = IdentityOp
        if linear is not None:
            attention.linear_qkv = submodules_of_mlp(layer).linear_fc1 = linear
    if architecture.qk_norm_spans_heads:
        for name, heads in (
            ("q_layernorm", architecture.num_attention_heads),
            ("k_layernorm", architecture.num_query_groups),
        ):
            params = {"num_heads": heads, "keeps_fp32": architecture.turns_in_fp32}
            setattr(attention, name, ModuleSpec(module=SpanningNorm, params=params))


# Random initial weights that depend on the seed and the parameter's name, never on the layout.
#
# megatron-core draws weights rank by rank, so tp2 and pp2 would start from different models. Here each
# parameter is drawn whole from a generator seeded by (seed, name, layer), and a rank keeps its slice.


@torch.no_grad()
def initialize_weights(chunks: list[LanguageModel], architecture: Architecture, *, seed: int) -> None:
    """Fill every parameter: normal(0, std) matrices, ones in norms, zeros in biases and padding.

    Output projections of attention and MLP use std / sqrt(2 * num_layers) (GPT-2), as Megatron does.
    """
    for chunk in chunks:
        for shard in _sharded_tensors(chunk.sharded_state_dict()):
            _fill(shard, architecture, seed)


@torch.no_grad()
def zero_weights(chunks: list[LanguageModel]) -> None:
    """Defined values everywhere, rows of vocabulary padding included, before weights are loaded."""
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.zero_()


def _sharded_tensors(state: dict) -> Iterator[ShardedTensor]:
    for value in state.values():
        if isinstance(value, ShardedTensor):
            yield value
        elif isinstance(value, ShardedTensorFactory):
            # The gated MLP's two halves are views into one parameter.
            yield from value.build()  # type: ignore[misc]


def _fill(shard: ShardedTensor, architecture: Architecture, seed: int) -> None:
    data, stacked = shard.data, shard.prepend_axis_num
    assert data is not None
    if shard.key.endswith("bias"):
        data.fill_(float(shard.key.endswith("dt_bias")))
    elif "norm" in shard.key.rsplit("linear_", 1)[-1]:
        # "layer_norm_weight" of Transformer Engine's fused linear, or a norm of its own.
        data.fill_(float(not architecture.norms_from_zero or "out_norm" in shard.key))
    else:
        whole_shape = shard.global_shape[stacked:]
        offset = shard.global_offset[stacked:]
        whole = _draw(shard.key, shard.global_offset[:stacked], whole_shape, architecture, seed)
        slices = tuple(slice(start, start + size) for start, size in zip(offset, data.shape, strict=True))
        data.copy_(whole[slices])


def _draw(
    key: str, layer: tuple[int, ...], shape: tuple[int, ...], architecture: Architecture, seed: int
) -> Tensor:
    is_vocabulary = shape[0] >= architecture.vocab_size and ("embedding" in key or "output_layer" in key)
    rows = architecture.vocab_size if is_vocabulary else shape[0]
    is_output_projection = key.endswith(("linear_proj.weight", "linear_fc2.weight"))
    std = architecture.init_std / (math.sqrt(2 * architecture.num_layers) if is_output_projection else 1.0)
    generator = named_generator(f"{seed}:{key}:{layer}")
    if key.endswith("A_log"):
        # A between 0.01 and 16, as transformers draws it.
        return (torch.rand(shape, generator=generator) * 15.99 + 0.01).log()
    drawn = torch.zeros(shape)
    drawn[:rows] = torch.randn((rows, *shape[1:]), generator=generator) * std
    return drawn


def named_generator(name: str) -> torch.Generator:
    """Random numbers that depend on a name alone, the same on every rank."""
    digest = hashlib.sha256(name.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
