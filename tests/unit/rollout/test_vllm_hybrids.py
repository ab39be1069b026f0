"""What vLLM cannot do with a hybrid is refused before anything is built; how much room its cache is given."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from megatron_sftrl.apps.plan.activations import microbatch_of
from megatron_sftrl.apps.plan.job import Hardware
from megatron_sftrl.apps.plan.memory import rollout_memory
from megatron_sftrl.apps.plan.model_state import grid_of
from megatron_sftrl.errors import UserError
from megatron_sftrl.models.architecture import Architecture, DeltaNet, from_section
from megatron_sftrl.rollout import vllm_settings
from megatron_sftrl.rollout.build import check_engine
from megatron_sftrl.rollout.vllm_settings import VllmSettings, cpu_cache_bytes
from tests.unit.models.hf_files import HYBRIDS
from tests.unit.rollout.test_build import config_of

NET = DeltaNet(layers=(0, 1, 2), num_key_heads=2, num_value_heads=4, key_dim=128, value_dim=128, kernel=4)
BF16 = torch.bfloat16


def hybrid(family: Any, net: DeltaNet | None = NET, **changes: Any) -> Architecture:
    section = config_of({}).model.architecture
    assert section is not None
    changes = {"num_layers": 4, "has_output_gate": True, "tie_embeddings": False, **changes}
    return replace(from_section(section), family=family, delta_net=net, **changes)


def said(architecture: Architecture, dtype: str, patch: pytest.MonkeyPatch, *, device: str = "cpu") -> str:
    """What check_engine says, with torchvision and vLLM there; empty if nothing."""
    patch.setattr(vllm_settings, "check_version", lambda: None)
    patch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    config = config_of({"engine": "vllm"})
    config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})
    try:
        check_engine(config, architecture, torch.device(device), world_size=1)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("family", HYBRIDS)
def test_a_hybrid_on_the_cpu_is_trained_in_bf16_or_refused(
    family: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert said(hybrid(family), "bf16", monkeypatch) == ""
    assert said(hybrid(family), "fp32", monkeypatch) == (
        f"vLLM runs the gated delta nets of a {family} on the CPU in bf16 alone, and this trains in fp32: "
        "set model.dtype: bf16, or use rollout.engine: in_process"
    )
    assert said(hybrid(family), "fp32", monkeypatch, device="cuda") == ""


@pytest.mark.parametrize(
    "change", [{"key_dim": 64}, {"value_dim": 64}, {"key_dim": 32, "value_dim": 32}, {"kernel": 3}]
)
def test_sizes_that_vllm_has_no_kernel_for_on_the_cpu_are_refused(
    change: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    net = replace(NET, **change)
    sizes = (net.key_dim, net.value_dim, net.kernel)
    words = f"linear_conv_kernel_dim (64, 64, 4) or (128, 128, 4), and this model {sizes}: use rollout.engine"
    assert words in said(hybrid("qwen3_next", net), "bf16", monkeypatch)
    assert said(hybrid("qwen3_next", net), "bf16", monkeypatch, device="cuda") == ""
    smaller = replace(NET, key_dim=64, value_dim=64)
    assert said(hybrid("qwen3_next", smaller), "bf16", monkeypatch) == ""


def test_a_hybrid_without_gated_delta_nets_is_refused_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "a qwen3_next whose layers all attend" in said(hybrid("qwen3_next", None), "bf16", monkeypatch)
    assert said(hybrid("qwen3_next", None), "bf16", monkeypatch, device="cuda") == ""


@pytest.mark.parametrize("family", HYBRIDS)
def test_what_vllms_code_of_a_family_imports_is_asked_for_by_name(
    family: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_settings, "check_version", lambda: None)
    monkeypatch.setitem(sys.modules, "torchvision", None)  # an import of it fails
    settings = VllmSettings(tp=1, max_model_len=64)
    if family == "qwen3_next":
        vllm_settings.check_vllm(settings, hybrid(family), world_size=1)
        return
    with pytest.raises(UserError, match=rf"code of a {family} .* torchvision, which cannot be imported"):
        vllm_settings.check_vllm(settings, hybrid(family), world_size=1)


def test_key_heads_that_an_engine_cannot_cut_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_settings, "check_version", lambda: None)
    settings = VllmSettings(tp=4, max_model_len=64)
    with pytest.raises(UserError, match="linear_num_key_heads = 2 is not a multiple of it"):
        vllm_settings.check_vllm(settings, hybrid("qwen3_next"), world_size=4)


def test_a_cache_on_the_cpu_has_room_for_states_and_for_keys_and_values_in_equal_blocks() -> None:
    """States of 4 x 128 x 128 x 4 bytes and 3 x 1,024 x 2: 265 KiB; a token of a layer has 128 bytes."""
    settings = VllmSettings(tp=1, max_model_len=5000, max_num_seqs=6)
    states = 4 * 128 * 128 * 4 + 3 * 1024 * 2
    block = 17 * 128  # tokens: the first multiple of 128 into which they fit
    assert (block - 128) * 128 < states <= block * 128
    # One block of states in each of three layers, and of the other one 4 blocks of tokens, one to spare.
    assert cpu_cache_bytes(settings, hybrid("qwen3_next"), BF16) == 7 * (3 + 4) * block * 128
    # Groups have equally many layers of one kind: of 3 and 2 two, of 4 and 3 four, of 5 and 2 two.
    for net, num_layers, groups, together in (
        (NET, 5, 2, 2),
        (replace(NET, layers=(0, 1, 2, 4)), 7, 1, 4),
        (replace(NET, layers=(0, 1, 2, 4, 5)), 7, 3, 2),
    ):
        found = cpu_cache_bytes(settings, hybrid("qwen3_next", net, num_layers=num_layers), BF16)
        assert found == 7 * (groups + 4) * together * block * 128


def test_a_plan_counts_states_once_a_response_and_keys_and_values_where_layers_attend() -> None:
    config = config_of({"engine": "vllm", "vllm": {"max_num_seqs": 10**6}})
    architecture = hybrid("qwen3_next")
    grid = grid_of(config.parallel, 1)
    found = rollout_memory(
        architecture, config, grid, microbatch_of(config, grid, "torch"), Hardware(gpu_memory=8e9)
    )
    states = 3 * (4 * 128 * 128 * 4 + 3 * 1024 * 2)
    assert found.bytes_per_token == 128
    assert found.cache == 4e9 - 3e9 - found.weights
    assert found.num_concurrent == found.cache // (states + 64 * 128)
