"""What a run asks of this machine and its packages, refused by name before a process group exists."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sftrl.config.schema import TrainSection
from megatron_sftrl.engine import megatron_config
from megatron_sftrl.engine.megatron_config import check_fp8, check_megatron
from megatron_sftrl.errors import UserError
from megatron_sftrl.models import architecture_of, from_hf_config
from megatron_sftrl.trainers.checked import batch_layout
from tests.unit.config.example import example
from tests.unit.config.test_checks import MIXTURE
from tests.unit.config.test_router_replay import run_with
from tests.unit.models.hf_files import values

BF16 = ("model.dtype=bf16", "parallel.distributed_optimizer=true")
FP8 = ("model.dtype=bf16", "train.fp8={}")


def check(*overrides: str, is_cuda: bool) -> None:
    run = example(*overrides)
    check_megatron(run, architecture_of(run.model), is_cuda=is_cuda)


@pytest.mark.parametrize(
    ("overrides", "is_cuda", "part"),
    [
        (FP8, False, "train.fp8: expected Transformer Engine's layers"),
        (FP8, True, "got torch's on CUDA"),
        (
            (*MIXTURE, "parallel.moe_permute_fusion=true"),
            True,
            "parallel.moe_permute_fusion: expected Transf",
        ),
        ((*MIXTURE, "parallel.moe_router_fusion=true"), False, "parallel.moe_router_fusion: expected Transf"),
        (
            (*MIXTURE, "parallel.moe_dispatcher=flex"),
            True,
            "the package deep_ep (DeepEP), got CUDA without it",
        ),
        ((*MIXTURE, "parallel.moe_dispatcher=flex"), False, "got the CPU"),
        (
            (*BF16, "optim.exp_avg_dtype=bf16"),
            False,
            "optim.exp_avg_dtype and exp_avg_sq_dtype = bf16: expec",
        ),
        ((*BF16, "optim.exp_avg_sq_dtype=bf16"), True, "package transformer_engine"),
        ((*BF16, "optim.cpu_offload=0.5"), False, "optim.cpu_offload = 0.5: expected CUDA"),
    ],
)
def test_what_is_not_there_is_named(overrides: tuple[str, ...], is_cuda: bool, part: str) -> None:
    with pytest.raises(UserError) as refused:
        check(*overrides, is_cuda=is_cuda)
    assert part in str(refused.value)


def test_latent_attention_has_torchs_layers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(values("deepseek_v3")))
    architecture = from_hf_config(tmp_path)
    monkeypatch.setattr(megatron_config, "uses_transformer_engine", lambda model, is_cuda: is_cuda)
    with pytest.raises(
        UserError, match=r"latent attention \(deepseek_v3\) does not know Transformer Engine's"
    ):
        check_megatron(example(), architecture, is_cuda=True)
    check_megatron(example(), architecture, is_cuda=False)


def test_hybrids_have_torchs_layers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(values("qwen3_5_text")))
    architecture = from_hf_config(tmp_path)
    monkeypatch.setattr(megatron_config, "uses_transformer_engine", lambda model, is_cuda: is_cuda)
    with pytest.raises(UserError, match=r"gated delta nets \(qwen3_5_text\) are only known with torch's"):
        check_megatron(example(), architecture, is_cuda=True)
    check_megatron(example(), architecture, is_cuda=False)


def test_sinks_ask_for_torch_s_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron_config, "uses_transformer_engine", lambda *_, **__: True)
    run = example(*BF16)
    architecture = replace(architecture_of(run.model), has_sinks=True)
    with pytest.raises(UserError, match=r"sinks and experts of a .*: set model\.layers = torch"):
        check_megatron(run, architecture, is_cuda=True)


def test_shared_prompts_ask_for_torch_s_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron_config, "uses_transformer_engine", lambda model, is_cuda: is_cuda)
    run = run_with("rollout.share_prompts=true", "rollout.router_replay=false")
    architecture = architecture_of(run.model)
    with pytest.raises(UserError, match=r"share_prompts: Transformer Engine's .*: set model\.layers = torch"):
        check_megatron(run, architecture, is_cuda=True)
    check_megatron(run, architecture, is_cuda=False)


def test_where_the_packages_are_there_the_settings_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron_config, "uses_transformer_engine", lambda _, *, is_cuda: is_cuda)
    monkeypatch.setattr(megatron_config, "_has_module", lambda _: True)
    for module in ("transformer.transformer_config", "optimizer.optimizer_config"):
        monkeypatch.setattr(f"megatron.core.{module}.is_te_min_version", lambda _: True)
    made: list[Any] = []
    monkeypatch.setattr(
        megatron_config, "TransformerConfig", lambda **settings: made.append(settings) or _Any()
    )
    overrides = (*BF16, *MIXTURE, "parallel.ep=2", "parallel.moe_dispatcher=flex", "train.fp8={}")
    check(*overrides, "parallel.moe_router_fusion=true", "optim.cpu_offload=1", is_cuda=True)
    assert made[0]["moe_token_dispatcher_type"] == "flex"


class _Any:
    """Takes every attribute."""


@pytest.mark.parametrize(
    ("recipe", "capability", "is_refused"),
    [
        ("tensorwise", (8, 9), False),
        ("tensorwise", (8, 0), True),
        ("blockwise", (9, 0), False),
        ("blockwise", (8, 9), True),
        ("mxfp8", (10, 0), False),
        ("mxfp8", (9, 0), True),
    ],
)
def test_a_gpu_that_is_too_old_for_a_recipe_is_named(
    monkeypatch: pytest.MonkeyPatch, recipe: str, capability: tuple[int, int], is_refused: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a card")
    train = TrainSection.model_validate({"steps": 1, "fp8": {"recipe": recipe}})
    if not is_refused:
        assert check_fp8(train, torch.device("cuda", 0)) is None
        return
    with pytest.raises(UserError, match=f"train.fp8.recipe = {recipe}: .* got a card with"):
        check_fp8(train, torch.device("cuda", 0))


@pytest.mark.parametrize(
    ("overrides", "multiple"),
    [
        ((), 1),
        (("parallel.tp=2", "parallel.sequence_parallel=true", "parallel.cp=2"), 4),
        (FP8, 16),
        ((*FP8, "train.fp8.recipe=mxfp8", "parallel.cp=2"), 64),
        ((*FP8, "parallel.tp=2"), 16),
        ((*FP8, "parallel.tp=2", "parallel.sequence_parallel=true", "parallel.cp=2"), 64),
    ],
)
def test_micro_batches_are_padded_to_what_eight_bits_and_the_layout_want(
    overrides: tuple[str, ...], multiple: int
) -> None:
    assert batch_layout(example(*overrides), dp_rank=0, dp_size=1).pad_to_multiple_of == multiple
