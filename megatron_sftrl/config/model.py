"""Which network is trained: its sizes and its first weights."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megatron_sftrl.config.paths import ExpandedPath
from megatron_sftrl.config.section import Section
from megatron_sftrl.errors import UserError


class ArchitectureSection(Section):
    """Sizes of a randomly initialised model, for those who have no config.json."""

    family: Literal["llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe"]
    """Block layout: llama and mistral (no biases), qwen2 (q/k/v biases), qwen3 (q/k norms), mixtral and
    qwen3_moe (mixtures of experts)."""
    num_layers: int = Field(ge=1)
    """Transformer blocks."""
    hidden_size: int = Field(ge=1)
    """H, width of the residual stream."""
    ffn_hidden_size: int = Field(ge=1)
    """Width of the gated MLP, in a mixture of each expert."""
    num_attention_heads: int = Field(ge=1)
    """Query heads."""
    num_query_groups: int | None = Field(default=None, ge=1)
    """Key/value heads; the number of query heads when not given."""
    head_dim: int | None = Field(default=None, ge=1)
    """Width of one head; hidden_size / num_attention_heads when not given."""
    vocab_size: int = Field(ge=2)
    """V, rows of the embedding before padding for tensor parallelism."""
    max_position_embeddings: int = Field(default=4096, ge=1)
    """Longest sequence, in tokens."""
    rope_theta: float = Field(default=10000.0, gt=0)
    """Base of the rotary frequencies."""
    norm_eps: float = Field(default=1e-6, gt=0)
    """Added to the variance in RMSNorm."""
    tie_embeddings: bool = False
    """Use the embedding as the output layer."""
    num_experts: int | None = Field(default=None, ge=1)
    """Experts in each block of a mixture."""
    experts_per_token: int | None = Field(default=None, ge=1)
    """Experts that a token visits in a mixture; their weights are made to sum to 1."""
    init_std: float = Field(default=0.02, gt=0)
    """Standard deviation of the random weights."""

    @model_validator(mode="after")
    def _mixtures_need_experts(self) -> ArchitectureSection:
        is_mixture = self.family in ("mixtral", "qwen3_moe")
        if is_mixture != (self.num_experts is not None) or is_mixture != (self.experts_per_token is not None):
            raise UserError(
                "num_experts and experts_per_token belong to the families mixtral and qwen3_moe: "
                f"set both or neither, for family {self.family} {'both' if is_mixture else 'neither'}"
            )
        return self


class ModelSection(Section):
    """Which network is trained, and from which weights it starts."""

    hf: ExpandedPath | None = None
    """A Hugging Face model directory: sizes from its config.json, initial weights from its safetensors files;
    its tokenizer is used when tokenizer.path is not given."""
    allow_pickle: bool = False
    """Read model.hf's weights from pickled .bin files, as tensors only, when it has no safetensors."""
    hf_config: ExpandedPath | None = None
    """Sizes only, from a Hugging Face config.json or the directory that holds one."""
    architecture: ArchitectureSection | None = None
    """Explicit sizes, instead of the two above."""
    init_checkpoint: ExpandedPath | None = None
    """Start from the weights of this checkpoint (step or run directory); random when not given."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Dtype of parameters and activations; gradients and optimizer state are fp32 in both."""
    moe_aux_loss_coeff: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Weight of the load-balancing loss of a mixture of experts (Megatron's aux_loss, 1 in a balanced layer).
    A step takes its mean over micro-batches, by their tokens, and its sum over layers."""

    @model_validator(mode="after")
    def _one_source(self) -> ModelSection:
        sources = (self.hf, self.hf_config, self.architecture)
        if sum(source is not None for source in sources) != 1:
            raise UserError("give exactly one of model.hf, model.hf_config and model.architecture")
        if self.hf is not None and self.init_checkpoint is not None:
            raise UserError(
                "model.hf and model.init_checkpoint both name initial weights: for the checkpoint's, give "
                "the directory as model.hf_config instead of model.hf"
            )
        return self
