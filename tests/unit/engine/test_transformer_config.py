"""What Megatron and Transformer Engine are told about windows and rotary positions."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings import rope_utils, yarn_rotary_pos_embedding
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention

from megatron_sftrl.config.schema import ArchitectureSection, ModelSection, ParallelSection, TrainSection
from megatron_sftrl.engine import megatron_config
from megatron_sftrl.errors import UserError
from megatron_sftrl.models.architecture import Architecture, from_section
from megatron_sftrl.models.rope import Rope, yarn_attention_factor

SECTION = ArchitectureSection(
    family="mistral",
    num_layers=4,
    hidden_size=16,
    ffn_hidden_size=16,
    num_attention_heads=2,
    vocab_size=16,
)


def config_of(
    architecture: Architecture, *, is_cuda: bool = False, parallel: dict | None = None, **train: Any
) -> TransformerConfig:
    return megatron_config.transformer_config(
        architecture,
        ModelSection(architecture=SECTION),
        ParallelSection.model_validate(parallel or {}),
        TrainSection(steps=1, **train),
        is_cuda=is_cuda,
    )


@pytest.fixture
def with_te(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CUDA machine with Transformer Engine; only configurations are made here."""
    monkeypatch.setattr(megatron_config, "uses_transformer_engine", lambda _, *, is_cuda: is_cuda)
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb_thd", object())
    for name in ("permute", "unpermute", "sort_chunks_by_index"):
        for suffix in ("", "_with_probs"):
            monkeypatch.setattr(moe_utils, f"fused_{name}{suffix}", object(), raising=False)
    # Megatron asks for its version before it takes eight bits for experts.
    monkeypatch.setattr("megatron.core.transformer.transformer_config.is_te_min_version", lambda _: True)


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
@pytest.mark.usefixtures("with_te")
def test_the_fused_rope_is_left_out_where_it_would_drop_the_attention_factor(
    factor: float, is_fused: bool
) -> None:
    assert config_of(with_attention_factor(factor), is_cuda=True).apply_rope_fusion is is_fused


MIXTURE = ArchitectureSection.model_validate(
    {**SECTION.model_dump(), "family": "mixtral", "num_experts": 4, "experts_per_token": 2}
)


@pytest.mark.parametrize("section", [SECTION, MIXTURE], ids=["dense", "mixture"])
def test_fusions_on_cuda_with_transformer_engine(section: ArchitectureSection, with_te: None) -> None:
    config = config_of(from_section(section), is_cuda=True)
    assert config.transformer_impl == "transformer_engine"
    assert all((config.bias_activation_fusion, config.bias_dropout_fusion, config.apply_rope_fusion))
    assert config.gradient_accumulation_fusion


@pytest.mark.usefixtures("with_te")
def test_a_gate_that_is_no_swiglu_is_left_out_of_the_fusion() -> None:
    """Megatron fuses a GELU that it is given by its own name alone, and refuses any other function."""
    architecture = dataclasses.replace(from_section(SECTION), activation="gelu_pytorch_tanh")
    config = config_of(architecture, is_cuda=True)
    assert config.bias_activation_fusion is False
    assert config.activation_func(torch.ones(1)) == torch.nn.functional.gelu(
        torch.ones(1), approximate="tanh"
    )


@pytest.mark.parametrize("has_apex", [False, True])
def test_fusions_on_cuda_with_torchs_layers(monkeypatch: pytest.MonkeyPatch, has_apex: bool) -> None:
    """Without Transformer Engine it is Apex whose kernel adds to fp32 gradients."""
    monkeypatch.setattr(
        megatron_config, "_has_module", lambda name: has_apex and name == "fused_weight_gradient_mlp_cuda"
    )
    config = config_of(from_section(SECTION), is_cuda=True)
    assert config.transformer_impl == "local"
    assert config.bias_activation_fusion is config.bias_dropout_fusion is True
    assert config.apply_rope_fusion is False
    assert config.gradient_accumulation_fusion is has_apex


def test_nothing_is_fused_on_the_cpu() -> None:
    config = config_of(from_section(SECTION))
    fusions = {name: getattr(config, name) for name in dir(config) if name.endswith("_fusion")}
    assert len(fusions) > 6
    assert not any(fusions.values())


@pytest.mark.usefixtures("with_te")
def test_switches_of_experts_and_eight_bits_arrive() -> None:
    config = config_of(
        from_section(MIXTURE),
        is_cuda=True,
        parallel={"moe_dispatcher": "flex", "moe_permute_fusion": True, "moe_router_fusion": True},
        fp8={"format": "e4m3", "recipe": "blockwise"},
        deterministic=True,
    )
    assert config.moe_token_dispatcher_type == "flex"
    assert config.moe_permute_fusion is config.moe_router_fusion is True
    assert (config.fp8, config.fp8_recipe, config.fp8_param) == ("e4m3", "blockwise", False)
    assert config.deterministic_mode


def test_without_them_they_are_off() -> None:
    config = config_of(from_section(MIXTURE))
    assert config.moe_token_dispatcher_type == "alltoall"
    assert config.moe_permute_fusion is config.moe_router_fusion is config.deterministic_mode is False
    assert config.fp8 is None


def test_a_mixture_routes_in_the_dtype_that_is_written() -> None:
    assert config_of(from_section(MIXTURE)).moe_router_dtype is None
    parallel = {"megatron": {"moe_router_dtype": "fp32"}}
    assert config_of(from_section(MIXTURE), parallel=parallel).moe_router_dtype == "fp32"


def test_megatron_is_told_the_modules_that_it_recomputes_itself() -> None:
    mixture = SECTION.model_copy(
        update={"family": "qwen3_moe", "num_experts": 2, "experts_per_token": 2, "num_query_groups": 2}
    )
    for with_te, dense, experts in (
        (False, ["layernorm"], ["layernorm"]),
        (True, [], ["layernorm", "moe_act"]),
    ):
        for section, expected in ((SECTION, dense), (mixture, experts)):
            settings = megatron_config._recomputation(
                TrainSection(steps=1, recompute="selective"),
                is_mixture=from_section(section).mixture is not None,
                with_te=with_te,
            )
            assert settings == {"recompute_granularity": "selective", "recompute_modules": expected}
    first = config_of(from_section(SECTION), recompute="full", recompute_layers=3)
    assert (first.recompute_granularity, first.recompute_method, first.recompute_num_layers) == (
        "full",
        "block",
        3,
    )
    with pytest.raises(
        UserError, match="layernorm: Transformer Engine's dense layers have no separate norms"
    ):
        megatron_config._recomputation(
            TrainSection(steps=1, recompute="selective", recompute_modules=["layernorm"]),
            is_mixture=False,
            with_te=True,
        )
