"""The section `lora`: what it means, and what does not go with it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_sftrl.apps.convert.adapters import passed_over_by_peft
from megatron_sftrl.config.checks import check_run
from megatron_sftrl.config.lora import LoraSection
from megatron_sftrl.engine.lora import adapter_shapes, lora_targets
from megatron_sftrl.errors import UserError
from megatron_sftrl.models import architecture_of
from megatron_sftrl.models.hf_config import from_hf_config
from megatron_sftrl.trainers.adapters import open_start
from megatron_sftrl.trainers.checked import check_targets
from tests.unit.config.example import example, message_of
from tests.unit.models.hf_files import values

LORA = ("lora={rank: 2, alpha: 4}", "model.architecture=null", "model.hf=BASE")


def check(*overrides: str, sizes: tuple[str, ...] = ()) -> None:
    """`sizes` are those of the model, which BASE stands for."""
    config, architecture = example(*LORA, *overrides), architecture_of(example(*sizes).model)
    check_run(config, architecture, 1, loss_needs=("reference",))
    check_targets(config, architecture)


def test_adapters_over_a_model_of_hugging_face_are_accepted() -> None:
    assert check("lora.targets=[q_proj, down_proj]", "model.layers=torch") is None  # it raises otherwise
    assert check("lora.rank=32", "lora.targets=[k_proj]") is None
    assert check("reference.placement=offload", "reference.checkpoint=run") is None  # another model


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["lora.rank=33"], "lora.rank = 33 is larger than k_proj, whose smaller side is 32"),
        (["lora.rank=65", "lora.targets=[up_proj]"], "larger than up_proj, whose smaller side is 64"),
        (["model.hf=null", "model.hf_config=BASE"], "give it as model.hf"),
        (
            ["model.hf=null", "model.hf_config=BASE", "model.init_checkpoint=RUN"],
            "`sftrl convert to-hf --checkpoint RUN --out DIR`",
        ),
        (["reference.placement=offload"], "reference.placement = offload"),
        (["model.moe_bias_update_rate=0.1"], "moe_bias_update_rate moves biases of the frozen model"),
        (["lora.targets=[q_prj]"], "w1, w3, w2, got ['q_prj']"),
        (
            ["lora.targets=[q_proj, conv1d]"],
            "lora.targets: the convolution of gated delta nets, conv1d, has no",
        ),
        (
            ["lora.targets=q_proj"],
            "lora.targets: expected all-linear, or a list such as [q_proj, v_proj], got 'q_proj'",
        ),
        (["lora.targets=[]"], "lora.targets: expected all-linear, or a list"),
        (["lora.dora=true"], "lora.dora: adapters of DoRA"),
        (["lora.use_dora=true"], "lora.use_dora: adapters of DoRA"),
    ],
)
def test_what_does_not_go_with_adapters_is_refused(overrides: list[str], part: str) -> None:
    with pytest.raises(UserError) as caught:
        check(*overrides)
    assert part in str(caught.value)


def test_whole_weights_are_those_of_a_model_with_an_output_layer_of_its_own() -> None:
    check("lora.modules_to_save=[embed_tokens, lm_head]")
    with pytest.raises(UserError, match="of which PEFT would make two weights"):
        check("lora.modules_to_save=[lm_head]", sizes=("model.architecture.tie_embeddings=true",))


def test_targets_are_the_matrices_of_the_model_s_files() -> None:
    architecture = replace(architecture_of(example().model), family="phi3")
    missing = r"a phi3 has no q_proj, up_proj that .* choose among qkv_proj, o_proj, gate_up_proj, down_proj"
    with pytest.raises(UserError, match=missing):
        check_targets(example(*LORA, "lora.targets=[q_proj, up_proj, o_proj]"), architecture)
    config = example(*LORA)
    check_targets(config, architecture)
    assert config.lora is not None
    assert lora_targets(architecture, config.lora) == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def test_every_expert_has_adapters_and_a_router_has_none() -> None:
    sizes = ("family=qwen3_moe", "num_experts=4", "experts_per_token=2")
    mixture = tuple(f"model.architecture.{each}" for each in sizes)
    check("lora.targets=[q_proj, gate_proj]", sizes=mixture)
    shapes = adapter_shapes(architecture_of(example(*mixture).model), LoraSection(rank=2, alpha=4))
    in_experts = {name.split(".mlp.")[1] for name in shapes if ".mlp." in name}
    assert len(in_experts) == 4 * 3 * 2
    assert all(name.startswith("experts.") for name in in_experts)
    with pytest.raises(UserError, match=r"a mixtral has no gate_proj .* w1, w3, w2"):
        check("lora.targets=[gate_proj]", sizes=("model.architecture.family=mixtral", *mixture[1:]))


@pytest.mark.parametrize(
    ("family", "parts"), [("qwen3_next", ["qkvz", "ba"]), ("qwen3_5_text", ["qkv", "z", "b", "a"])]
)
def test_a_gated_delta_net_has_the_targets_of_its_files(
    family: str, parts: list[str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(values(family)))
    architecture, config = from_hf_config(tmp_path), example(*LORA, "lora.rank=64")
    check_targets(config, architecture)  # more than the 32 heads of in_proj_b
    assert config.lora is not None
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    own = [*(f"in_proj_{part}" for part in parts), "out_proj"]
    assert lora_targets(architecture, config.lora)[:-3] == [*attention, *own]
    other = "in_proj_z" if family == "qwen3_next" else "in_proj_ba"
    with pytest.raises(
        UserError, match=rf"a {family} has no {other} that .* choose among q_proj, .*, out_proj"
    ):
        check_targets(example(*LORA, f"lora.targets=[{other}]"), architecture)
    with pytest.raises(UserError, match=r"lora.rank = 4096 is larger than"):
        check_targets(example(*LORA, "lora.rank=4096"), architecture)


def test_what_peft_passes_over_of_a_mixture_is_found() -> None:
    sizes = ("family=qwen3_moe", "num_experts=4", "experts_per_token=2")
    plain = architecture_of(example(*(f"model.architecture.{each}" for each in sizes)).model)
    assert plain.mixture is not None
    architecture = replace(plain, family="qwen2_moe", mixture=replace(plain.mixture, shared_width=16))
    shapes = adapter_shapes(architecture, LoraSection(rank=2, alpha=4, targets=["q_proj", "up_proj"]))
    found = passed_over_by_peft(shapes, "glm4_moe")
    assert len(found) == architecture.num_layers
    assert found[0] == "model.layers.0.mlp.shared_expert.up_proj"
    for family in ("qwen2_moe", "qwen3_5_moe_text", "mistral4"):
        found = passed_over_by_peft(shapes, family)
        assert len(found) == 4 * architecture.num_layers
        assert found[0] == "model.layers.0.mlp.experts.0.up_proj"
    attention = adapter_shapes(architecture, LoraSection(rank=2, alpha=4, targets=["q_proj"]))
    for family in ("glm4_moe", "qwen2_moe"):
        assert passed_over_by_peft({**attention, "lm_head.weight": ()}, family) == []


def write_adapter(directory: Path, **said: object) -> Path:
    """A PEFT adapter of rank 2 on q_proj of the example's model; `said` stands in its adapter_config.json."""
    architecture = architecture_of(example().model)
    section = LoraSection(rank=2, alpha=4, targets=["q_proj"])
    values = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **said}
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps(values))
    shapes = adapter_shapes(architecture, section)
    tensors = {f"base_model.model.{name}": torch.zeros(shape) for name, shape in shapes.items()}
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


@pytest.mark.parametrize(
    ("said", "overrides", "part"),
    [
        ({"use_dora": True}, [], "use_dora: expected False, got True"),
        ({"r": 4}, [], "r: expected 2, got 4"),
        ({}, ["lora.alpha=8"], "lora_alpha: expected 8.0, got 4.0"),
        ({"init_lora_weights": "pissa_niter_4"}, [], "init_lora_weights: expected any, got pissa_niter_4"),
        ({"modules_to_save": ["lm_head"]}, [], "modules_to_save: expected [], got ['lm_head']"),
        ({"rank_pattern": {"q_proj": 8}}, [], "rank_pattern: expected {}, got {'q_proj': 8}"),
        (
            {},
            ["lora.targets=[q_proj, v_proj]"],
            "target_modules: expected ['q_proj', 'v_proj'], got",
        ),
        ({}, ["lora.targets=all-linear"], "k_proj.lora_A.weight"),
        ({"target_modules": "all-linear"}, ["lora.targets=all-linear"], "missing"),
    ],
)
def test_an_adapter_that_this_run_would_not_go_on_with_is_refused(
    said: dict[str, object], overrides: list[str], part: str, tmp_path: Path
) -> None:
    directory = write_adapter(tmp_path / "peft", **said)
    config = example(*LORA, "lora.targets=[q_proj]", f"lora.start={directory}", *overrides)
    with pytest.raises(UserError) as caught:
        open_start(config, architecture_of(example().model))
    assert part in str(caught.value)


def test_an_adapter_of_the_same_kind_is_a_start(tmp_path: Path) -> None:
    directory = write_adapter(tmp_path / "peft", lora_dropout=0.1, use_dora=False, layers_to_transform=None)
    config = example(*LORA, "lora.targets=[q_proj]", f"lora.start={directory}")
    open_start(config, architecture_of(example().model)).close()
    with pytest.raises(UserError, match=r"has no adapter_config.json"):
        open_start(example(*LORA, f"lora.start={tmp_path}"), architecture_of(example().model))


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("lora.rank=0", ["lora.rank"]),
        ("lora.targets=[q_prj]", ["lora.targets", "q_proj", "down_proj"]),
        ("lora.targets=[]", ["lora.targets"]),
        ("lora.dropout=1.0", ["lora.dropout"]),
        ("lora.init=pissa", ["lora.init", "gaussian"]),
    ],
)
def test_what_cannot_be_meant_is_refused_with_what_there_is(override: str, parts: list[str]) -> None:
    said = message_of(*LORA, override)
    assert all(part in said for part in parts)


def test_the_scale_is_that_of_peft() -> None:
    assert LoraSection(rank=16, alpha=32).scale == 2.0
    assert LoraSection(rank=16, alpha=32, rslora=True).scale == 32 / math.sqrt(16)
    assert LoraSection(rank=1, alpha=1, targets=["down_proj", "q_proj"]).names == ("q_proj", "down_proj")
