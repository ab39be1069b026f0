"""What Megatron and Transformer Engine are told about windows and rotary positions."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from megatron.core.models.common.embeddings import rope_utils, yarn_rotary_pos_embedding
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention

from megatron_sftrl.config.schema import ArchitectureSection, ModelSection, ParallelSection, TrainSection
from megatron_sftrl.engine import megatron_config
from megatron_sftrl.models.architecture import Architecture, Rope, from_section, yarn_attention_factor

SECTION = ArchitectureSection(
    family="mistral",
    num_layers=4,
    hidden_size=16,
    ffn_hidden_size=16,
    num_attention_heads=2,
    vocab_size=16,
)


def config_of(architecture: Architecture, *, is_cuda: bool = False) -> TransformerConfig:
    return megatron_config.transformer_config(
        architecture,
        ModelSection(architecture=SECTION),
        ParallelSection(),
        TrainSection(steps=1),
        is_cuda=is_cuda,
    )


def with_attention_factor(factor: float) -> Architecture:
    rope = Rope(kind="yarn", theta=10000.0, factor=8.0, original_length=64, attention_factor=factor)
    return dataclasses.replace(from_section(SECTION), rope=rope)


def test_a_window_counts_the_token_itself_and_holds_for_the_named_layers_only() -> None:
    architecture = dataclasses.replace(from_section(SECTION), sliding_window=7, window_layers=(1, 2))
    config = config_of(architecture)
    # Transformer Engine's and flash-attention's (left, right): 6 positions before the token, none after it.
    assert config.window_size == (6, 0)
    in_window = [
        is_layer_window_attention(config.window_size, config.window_attn_skip_freq, number)  # type: ignore[arg-type]
        for number in range(1, 5)  # as Megatron counts
    ]
    assert in_window == [False, True, True, False]


def test_a_model_without_windows_has_none() -> None:
    assert config_of(from_section(SECTION)).window_size is None


@pytest.mark.parametrize("factor", [1.0, yarn_attention_factor(8.0, None, None), 0.8, 0.1, 3.7])
def test_megatron_multiplies_cos_and_sin_by_the_attention_factor(factor: float) -> None:
    config = config_of(with_attention_factor(factor))
    used = yarn_rotary_pos_embedding._yarn_get_concentration_factor_from_config(config)
    # cos and sin are fp32: there the number is the same one.
    assert torch.tensor(used, dtype=torch.float32) == torch.tensor(factor, dtype=torch.float32)


@pytest.mark.parametrize(("factor", "is_fused"), [(1.0, True), (1.2, False)])
def test_the_fused_rope_is_left_out_where_it_would_drop_the_attention_factor(
    monkeypatch: pytest.MonkeyPatch, factor: float, is_fused: bool
) -> None:
    # As on a CUDA machine with Transformer Engine; only the configuration is made here.
    monkeypatch.setattr(megatron_config, "uses_transformer_engine", lambda _, *, is_cuda: is_cuda)
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb_thd", object())
    assert config_of(with_attention_factor(factor), is_cuda=True).apply_rope_fusion is is_fused
