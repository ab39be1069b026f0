"""Weights of 8 bits with one factor for each matrix, as Mistral publishes them, beside transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_sftrl.errors import UserError
from megatron_sftrl.models.hf_config import from_hf_config, read_hf_config
from megatron_sftrl.models.hf_weights import open_weights

# As in the files of Ministral 3, Devstral 2 and Mistral Small 4.
FP8: dict[str, Any] = {
    "activation_scheme": "static",
    "dequantize": False,
    "modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
    "quant_method": "fp8",
    "weight_block_size": None,
}
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "vocab_size": 101,
}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "moe_intermediate_size": 24,
    "n_routed_experts": 3,
    "num_experts_per_tok": 2,
}


def write_published(directory: Path, family: str) -> dict[str, Tensor]:
    """A small multimodal model whose language model is `family`, in 8 bits; its file's tensors."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    text = {"model_type": family, **SIZES, **(LATENT if family == "mistral4" else {})}
    vision = {"model_type": "pixtral", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "head_dim": 16, "image_size": 32, "patch_size": 16}
    torch.manual_seed(3)
    config = Mistral3Config(text_config=text, vision_config=vision, tie_word_embeddings=False)
    Mistral3ForConditionalGeneration(config).bfloat16().save_pretrained(directory)
    file = directory / "model.safetensors"
    tensors: dict[str, Tensor] = {}
    for name, values in load_file(file).items():
        is_stack = values.dim() == 3 and name.endswith(("gate_up_proj", "down_proj"))
        if "language_model.model." not in name or not (is_stack or name.endswith("_proj.weight")):
            tensors[name] = values
            continue
        scale = (values.float().abs().amax(dim=(-2, -1), keepdim=is_stack) / 448).bfloat16()
        tensors[name] = (values.float() / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
        inputs = f"{name}_" if is_stack else name.removesuffix("weight")
        tensors[f"{inputs}activation_scale"] = torch.ones(scale.shape[:1]).bfloat16()
    save_file(tensors, file, {"format": "pt"})
    written = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**written, "quantization_config": FP8}))
    return tensors


def test_a_ministral_3_as_published_is_what_transformers_dequantises_it_to(tmp_path: Path) -> None:
    from transformers import FineGrainedFP8Config, Mistral3ForConditionalGeneration

    tensors = write_published(tmp_path, "ministral3")
    assert sum(tensor.dtype == torch.float8_e4m3fn for tensor in tensors.values()) == 14
    model = Mistral3ForConditionalGeneration.from_pretrained(
        tmp_path,
        dtype=torch.bfloat16,
        quantization_config=FineGrainedFP8Config(**{**FP8, "dequantize": True}),
    )
    expected = model.model.language_model.state_dict()
    with open_weights(tmp_path) as weights:
        weights.check_model(from_hf_config(tmp_path, text_only=True))
        for name in weights.shapes:
            theirs = model.lm_head.weight if name == "lm_head.weight" else expected[name[len("model.") :]]
            assert weights.dtypes[name] == torch.bfloat16
            assert torch.equal(weights.read(name), theirs), name


def test_experts_of_a_mistral_4_as_published_each_have_their_own_factor(tmp_path: Path) -> None:
    """transformers 5.19 leaves stacks in 8 bits where it is told to dequantise; its operator does it."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    tensors = write_published(tmp_path, "mistral4")
    stack, down = (f"language_model.model.layers.1.mlp.experts.{which}_proj" for which in ("gate_up", "down"))
    both, last = (
        Fp8Dequantize(None)._dequantize_one(tensors[name], tensors[f"{name}_scale_inv"])
        for name in (stack, down)
    )
    assert len(tensors[f"{stack}_scale_inv"].unique()) == 3
    with open_weights(tmp_path) as weights:
        weights.check_model(from_hf_config(tmp_path, text_only=True))
        for expert in range(3):
            gate, up, end = (
                weights.read(f"model.layers.1.mlp.experts.{expert}.{which}_proj.weight")
                for which in ("gate", "up", "down")
            )
            assert torch.equal(torch.cat([gate, up]), both[expert])
            assert torch.equal(end, last[expert])
        part = (slice(5, 9), slice(3, 30))
        name = "model.layers.1.mlp.experts.2.up_proj.weight"
        assert torch.equal(weights.read(name, part), both[2][24:][part])


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_factor_of_a_matrix_may_have_any_number_of_dimensions(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    values = torch.arange(12.0).view(3, 4).to(torch.float8_e4m3fn)
    save_file(
        {"a.weight": values, "a.weight_scale_inv": torch.full(shape, 0.3)}, tmp_path / "model.safetensors"
    )
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": FP8}))
    with open_weights(tmp_path) as weights:
        assert torch.equal(weights.read("a.weight"), (values.float() * 0.3).bfloat16())


def test_factors_for_rows_are_not_those_of_a_matrix(tmp_path: Path) -> None:
    values = torch.zeros(3, 4).to(torch.float8_e4m3fn)
    save_file({"a.weight": values, "a.weight_scale_inv": torch.ones(3, 1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": FP8}))
    with pytest.raises(
        UserError, match=r"a float for each matrix of a.weight \[3, 4\], \[1, 1\], got \[3, 1\] of float32"
    ):
        open_weights(tmp_path)


def test_the_configuration_says_that_they_are_dequantised(tmp_path: Path) -> None:
    write_published(tmp_path, "ministral3")
    notes = read_hf_config(tmp_path, text_only=True)[1]
    assert any(
        "quantization_config: the weights are dequantised while they are read" in each for each in notes
    )
    without = {key: value for key, value in FP8.items() if key != "weight_block_size"}
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": without}))
    with pytest.raises(UserError, match=r"only quant_method fp8 .* with weight_block_size"):
        read_hf_config(tmp_path, text_only=True)
