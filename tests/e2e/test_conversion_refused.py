"""What the conversion tools refuse: exit code 2, one message that says what to do, and nothing written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.e2e.conversion import TO_HF, TO_MEGATRON, publish, tools
from tests.e2e.curves import contents
from tests.hf_models import differing, read_tensors


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published model; read only."""
    return publish(tmp_path_factory.mktemp("published") / "hf")


Spoil = Callable[[Path], None]


@dataclass(frozen=True)
class Mistake:
    """What is wrong with a directory, more arguments, and the parts that the message must have."""

    spoil: Spoil
    message: tuple[str, ...]
    arguments: tuple[str, ...] = ()


def nothing(directory: Path) -> None:
    """The directory is as published."""


def edit_config(**changes: object) -> Spoil:
    def spoil(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, **changes}))

    return spoil


def other_tensors(directory: Path) -> None:
    tensors = one_file(directory)
    del tensors["model.norm.weight"], tensors["model.layers.1.self_attn.k_proj.bias"]
    tensors["model.layers.0.mlp.gate_proj.weight"] = torch.zeros(3, 3)
    tensors |= {"model.layers.2.input_layernorm.weight": torch.zeros(32), "score.weight": torch.zeros(2, 32)}
    save_file(tensors, directory / "model.safetensors")


def one_file(directory: Path) -> dict[str, torch.Tensor]:
    """Take the shards and their index away; their tensors."""
    tensors = read_tensors(directory)
    for path in [*directory.glob("*.safetensors"), directory / "model.safetensors.index.json"]:
        path.unlink()
    return tensors


def pickled(directory: Path) -> None:
    torch.save(one_file(directory), directory / "pytorch_model.bin")


def cut_short(directory: Path) -> None:
    path = sorted(directory.glob("*.safetensors"))[1]
    os.truncate(path, path.stat().st_size - 10)


def lose_a_shard(directory: Path) -> None:
    sorted(directory.glob("*.safetensors"))[0].unlink()


MISTAKES = {
    "missing and extra tensors and wrong shapes": Mistake(
        other_tensors,
        (
            "5 problem(s)",
            "2 missing: ",
            "model.norm.weight",
            "model.layers.1.self_attn.k_proj.bias",
            "wrong shape: model.layers.0.mlp.gate_proj.weight: expected [48, 32], got [3, 3]",
            "2 not expected: ",
            "model.layers.2.input_layernorm.weight",
            "score.weight",
        ),
    ),
    "a truncated file": Mistake(cut_short, ("model-00002-of-", "is truncated", "copy or download it again")),
    "an absent shard": Mistake(lose_a_shard, ("names 1 of", "model-00001-of-", "missing files")),
    "pickled weights": Mistake(pickled, ("pytorch_model.bin", "--allow-pickle")),
    "remote code": Mistake(
        edit_config(auto_map={"AutoModelForCausalLM": "evil.Model"}), ("auto_map", "remote code is never run")
    ),
    "an unknown architecture": Mistake(
        edit_config(architectures=["MambaForCausalLM"], model_type="mamba"),
        ("MambaForCausalLM", "supported: ", "LlamaForCausalLM", "Qwen3MoeForCausalLM"),
    ),
    "a tp that does not divide": Mistake(
        nothing, ("--tp 3: the model's 2 query groups", "do not divide by it"), ("--tp", "3")
    ),
    "a pp that does not divide": Mistake(nothing, ("--pp 3: the model's 2 layers",), ("--pp", "3")),
    "experts that are not there": Mistake(nothing, ("--ep 2", "no mixture of experts"), ("--ep", "2")),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_cannot_be_converted_is_refused_in_one_message_and_leaves_nothing(
    name: str, hf: Path, tmp_path: Path
) -> None:
    mistake, directory = MISTAKES[name], tmp_path / "hf"
    shutil.copytree(hf, directory)
    mistake.spoil(directory)
    (done,) = tools([TO_MEGATRON, "--hf", directory, "--out", tmp_path / "out", *mistake.arguments])
    said = done.expect(2).stderr
    assert said.count("error: ") == 1
    assert "Traceback" not in said
    assert [part for part in mistake.message if part not in said] == [], said
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_pickled_weights_are_converted_when_allowed(hf: Path, tmp_path: Path) -> None:
    directory = tmp_path / "hf"
    shutil.copytree(hf, directory)
    pickled(directory)
    for done in tools(
        [TO_MEGATRON, "--hf", directory, "--out", tmp_path / "checkpoint", "--allow-pickle"],
        [TO_HF, "--checkpoint", tmp_path / "checkpoint", "--out", tmp_path / "back"],
    ):
        done.expect(0)
    assert differing(read_tensors(hf), read_tensors(tmp_path / "back")) == []


def test_an_existing_output_is_refused_and_left_as_it_is(hf: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    (done,) = tools([TO_MEGATRON, "--hf", hf, "--out", checkpoint])
    done.expect(0)
    before = contents(checkpoint) | contents(hf)
    for done in tools(
        [TO_MEGATRON, "--hf", hf, "--out", checkpoint], [TO_HF, "--checkpoint", checkpoint, "--out", hf]
    ):
        assert "exists already: choose another --out" in done.expect(2).stderr
    assert contents(checkpoint) | contents(hf) == before
