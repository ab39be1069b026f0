"""Directories that hold no weights, broken weights, or weights whose files contradict each other."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_sftrl.models.hf_weights import open_weights
from tests.unit.models.directories import some_tensors, write_sharded, write_single

A, B = "a.safetensors", "b.safetensors"


def refusal(directory: Path, *, allow_pickle: bool = False) -> str:
    with pytest.raises(ValueError, match=re.escape(str(directory))) as caught:
        open_weights(directory, allow_pickle=allow_pickle)
    return str(caught.value)


def halves() -> dict[str, dict[str, torch.Tensor]]:
    tensors = some_tensors()
    names = list(tensors)
    return {A: {n: tensors[n] for n in names[:2]}, B: {n: tensors[n] for n in names[2:]}}


def agreeing_map() -> dict[str, str]:
    return {name: file for file, tensors in halves().items() for name in tensors}


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    assert "no such directory" in refusal(tmp_path / "nowhere")


def test_a_file_in_place_of_a_directory(tmp_path: Path) -> None:
    write_single(tmp_path, some_tensors())
    assert "no such directory" in refusal(tmp_path / "model.safetensors")


def test_a_directory_without_weights_names_what_looks_like_weights(tmp_path: Path) -> None:
    assert "found no weight file at all" in refusal(tmp_path)
    for name in ("adapter_model.safetensors", "model.gguf", "config.json"):
        (tmp_path / name).write_bytes(b"{}")
    assert "found adapter_model.safetensors, model.gguf;" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_pickled_weights_are_refused_unopened_unless_allowed(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"never opened")
    message = refusal(tmp_path)
    assert "run code when loaded" in message
    assert "--allow-pickle" in message
    assert "model.allow_pickle" in message


def test_safetensors_are_preferred_to_pickled_weights(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    write_single(tmp_path, some_tensors())
    with open_weights(tmp_path, allow_pickle=True) as weights:
        assert weights.notes == ()


def test_pickled_shards_are_read_when_allowed(tmp_path: Path) -> None:
    for file, tensors in halves().items():
        torch.save(tensors, tmp_path / file.replace("safetensors", "bin"))
    placement = {name: file.replace("safetensors", "bin") for name, file in agreeing_map().items()}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": placement}))
    with open_weights(tmp_path, allow_pickle=True) as weights:
        assert all(torch.equal(weights.read(name), tensor) for name, tensor in some_tensors().items())
        assert "weights_only" in weights.notes[0]


class _RunsCode:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, (str(self.witness),)


def test_code_in_a_pickled_file_never_runs(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    torch.save(some_tensors() | {"x": _RunsCode(witness)}, tmp_path / "pytorch_model.bin")
    message = refusal(tmp_path, allow_pickle=True)
    assert "unsupported GLOBAL posix.mkdir" in message
    assert "weights_only=False" not in message, "torch's own advice would run it"
    assert not witness.exists()
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
    assert witness.exists(), "the planted code does run where it is let"


def _transposed(path: Path) -> None:
    torch.save({"w": torch.randn(3, 4).T}, path)


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda path: torch.save([1, 2], path), "got a list"),
        (lambda path: torch.save({"w": 3}, path), "got 'w': a int"),
        (_transposed, "tensor w is not contiguous"),
        (
            lambda path: torch.save({"w": torch.zeros(3)}, path, _use_new_zipfile_serialization=False),
            "tensor w lies in a file of an old format",
        ),
        (lambda path: path.write_bytes(pickle.dumps({"w": 3}, protocol=2)), "cannot be read"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: path.write_bytes(b"junk" * 50), "cannot be read"),
    ],
    ids=["list", "number", "transposed", "old format", "plain pickle", "empty", "junk"],
)
def test_a_pickled_file_that_holds_no_plain_tensors(
    tmp_path: Path, write: Callable[[Path], object], reason: str
) -> None:
    write(tmp_path / "pytorch_model.bin")
    message = refusal(tmp_path, allow_pickle=True)
    assert reason in message
    assert "expected a dictionary of tensors" in message


def test_a_truncated_pickled_file(tmp_path: Path) -> None:
    torch.save(some_tensors(), tmp_path / "pytorch_model.bin")
    os.truncate(tmp_path / "pytorch_model.bin", 600)
    assert "pytorch_model.bin cannot be read" in refusal(tmp_path, allow_pickle=True)


@pytest.mark.parametrize("num_bytes", [1, 100, 400])
def test_a_truncated_safetensors_file_is_named_with_its_sizes(tmp_path: Path, num_bytes: int) -> None:
    write_sharded(tmp_path, halves())
    whole = (tmp_path / B).stat().st_size
    os.truncate(tmp_path / B, whole - num_bytes)
    message = refusal(tmp_path)
    assert f"{tmp_path / B} is truncated" in message
    assert f"{whole - num_bytes}" in message
    assert "download it again" in message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is truncated"),
        (b"\x10", "is truncated"),
        (b"PK" + b"x" * 200, "is not a valid safetensors file"),
        ((20).to_bytes(8, "little") + b"{" + b"x" * 100, "is not a valid safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n", "git lfs pull"),
        ((2).to_bytes(8, "little") + b"{}" + b"more than the header says", "is not a valid safetensors file"),
    ],
    ids=["empty", "one byte", "a zip file", "no JSON", "git-lfs pointer", "too long"],
)
def test_a_file_that_is_no_safetensors_file(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    assert f"{tmp_path / 'model.safetensors'} {reason}" in refusal(tmp_path).replace(
        "is a git-lfs pointer, not the weights themselves; fetch them with: ", ""
    )


def test_all_absent_shards_are_listed(tmp_path: Path) -> None:
    write_sharded(
        tmp_path, halves(), weight_map=agreeing_map() | {"x": "c.safetensors", "y": "d.safetensors"}
    )
    assert "names 2 of 4 shards that are not there: c.safetensors, d.safetensors;" in refusal(tmp_path)


def test_every_disagreement_of_an_index_and_its_shards_is_listed(tmp_path: Path) -> None:
    shards = halves()
    shards[A]["twice"] = shards[B]["twice"] = torch.zeros(2)
    shards[B]["left.out"] = torch.zeros(2)
    shards[B]["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)
    placement = agreeing_map() | {"absent.one": A, "absent.two": B, "twice": A, "lm_head.weight": A}
    write_sharded(tmp_path, shards, weight_map=placement)
    assert sorted(refusal(tmp_path).splitlines()[1:]) == [
        "  absent.one: the index says a.safetensors, which does not hold it",
        "  absent.two: the index says b.safetensors, which does not hold it",
        "  left.out: in b.safetensors, but not in the index",
        "  lm_head.weight: the index says a.safetensors, which does not hold it",
        "  twice: in 2 shards: a.safetensors, b.safetensors",
    ]


@pytest.mark.parametrize("name", ["../a.safetensors", "/etc/passwd", "sub/a.safetensors", "..", ""])
def test_an_index_never_leads_out_of_its_directory(tmp_path: Path, name: str) -> None:
    write_sharded(tmp_path / "model", halves(), weight_map=agreeing_map() | {"x": name})
    write_single(tmp_path, {"x": torch.zeros(2)}, A)
    assert "names shards by paths, which is refused" in refusal(tmp_path / "model")


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": ["a"]}', '{"weight_map": {"w": 3}}']
)
def test_an_index_that_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    assert "is no index of shards" in refusal(tmp_path)


def test_a_single_file_wins_over_an_index_and_this_is_said(tmp_path: Path) -> None:
    write_sharded(tmp_path, halves())
    write_single(tmp_path, {"w": torch.ones(2)})
    with open_weights(tmp_path) as weights:
        assert list(weights.shapes) == ["w"]
        assert "model.safetensors is used, as transformers does" in weights.notes[0]


def test_an_index_may_name_consolidated_shards_and_symbolic_links(tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    shards = {"consolidated-1.safetensors": halves()[A], "consolidated-2.safetensors": halves()[B]}
    model = write_sharded(tmp_path / "model", shards)
    # As in the hub's cache: the names in a snapshot are links.
    (model / "consolidated-1.safetensors").rename(blobs / "ab12")
    (model / "consolidated-1.safetensors").symlink_to("../blobs/ab12")
    with open_weights(model) as weights:
        assert all(torch.equal(weights.read(name), tensor) for name, tensor in some_tensors().items())


def test_the_file_that_the_config_names_is_read(tmp_path: Path) -> None:
    write_single(tmp_path, some_tensors())
    write_single(tmp_path, {"w": torch.ones(2)}, "other.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"transformers_weights": "other.safetensors"}))
    with open_weights(tmp_path) as weights:
        assert list(weights.shapes) == ["w"]
        assert "transformers_weights" in weights.notes[0]


@pytest.mark.parametrize("name", ["../model.safetensors", "model.bin", 3, "absent.safetensors"])
def test_a_config_that_names_no_weight_file_of_its_directory_is_refused(tmp_path: Path, name: object) -> None:
    write_single(tmp_path, some_tensors())
    (tmp_path / "config.json").write_text(json.dumps({"transformers_weights": name}))
    assert "transformers_weights" in refusal(tmp_path)
