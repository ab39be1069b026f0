"""Writing a model directory: files and index like the hub's, complete under its name or not there."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import stat
import time
from collections import namedtuple
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from huggingface_hub.serialization import split_state_dict_into_shards_factory
from safetensors import safe_open

from megatron_sftrl.models.hf_output import (
    HfFile,
    new_directory,
    plan_files,
    temporary_directory,
    write_file,
    write_index,
)
from megatron_sftrl.models.hf_weights import open_weights
from tests.unit.models.directories import some_tensors

FORK = multiprocessing.get_context("fork")


def sizes_of(tensors: dict[str, torch.Tensor]) -> list[tuple[str, int]]:
    return [(name, tensor.nbytes) for name, tensor in tensors.items()]


def write_model(out: Path, *, between: Connection | None = None) -> None:
    """Write some_tensors() in several files; stop between the first and the second when asked to."""
    tensors = some_tensors()
    sizes = sizes_of(tensors)
    files = plan_files(sizes, max_bytes=200)
    assert len(files) >= 2
    with new_directory(out, num_bytes=sum(size for _, size in sizes)) as directory:
        write_file(directory, files[0], tensors)
        if between is not None:
            between.send("in the middle")
            time.sleep(60)
        for file in files[1:]:
            write_file(directory, file, tensors)
        write_index(directory, files, sizes)


def assert_complete(out: Path) -> None:
    assert not (out / ".lock").exists()
    with open_weights(out) as weights:
        assert set(weights.shapes) == set(some_tensors())
        assert all(torch.equal(weights.read(name), tensor) for name, tensor in some_tensors().items())


@pytest.mark.parametrize("max_bytes", [1, 7, 50, 100, 1000, 10**9])
def test_the_plan_is_that_of_the_hub(max_bytes: int) -> None:
    generator = torch.Generator().manual_seed(max_bytes)
    numbers = torch.randint(1, 90, (60,), generator=generator).tolist()
    sizes = [(f"w{i}", size) for i, size in enumerate(numbers)]
    theirs = split_state_dict_into_shards_factory(
        dict(sizes),
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_bytes,
    )
    ours = plan_files(sizes, max_bytes=max_bytes)
    assert {file.name: list(file.tensors) for file in ours} == theirs.filename_to_tensors


def test_one_file_has_no_number_and_no_index(tmp_path: Path) -> None:
    sizes = sizes_of(some_tensors())
    files = plan_files(sizes, max_bytes=10**9)
    assert files == [HfFile(name="model.safetensors", tensors=tuple(some_tensors()))]
    write_index(tmp_path, files, sizes)
    assert list(tmp_path.iterdir()) == []


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    write_model(tmp_path / "some" / "model")
    assert_complete(tmp_path / "some" / "model")
    assert [path.name for path in (tmp_path / "some").iterdir()] == ["model"]


def test_files_and_index_say_what_loaders_look_for(tmp_path: Path) -> None:
    out = tmp_path / "model"
    write_model(out)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(size for _, size in sizes_of(some_tensors()))}
    assert set(index["weight_map"]) == set(some_tensors())
    for file in set(index["weight_map"].values()):
        with safe_open(out / file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert set(opened.keys()) == {name for name, at in index["weight_map"].items() if at == file}


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_weight_files_have_the_permissions_of_any_new_file(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_model(tmp_path / "model")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "model").iterdir()}
    assert modes == {0o666 & ~umask}


@pytest.mark.parametrize("kind", ["directory", "empty directory", "file", "dangling link"])
def test_an_existing_output_is_refused_and_untouched(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "model"
    if kind.endswith("directory"):
        out.mkdir()
        if kind == "directory":
            (out / "precious").write_text("mine")
    elif kind == "file":
        out.write_text("mine")
    else:
        out.symlink_to("nowhere")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="exists already: choose another --out, or remove it"):
        write_model(out)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    def fill_while_another_appears() -> None:
        with new_directory(tmp_path / "model", num_bytes=1):
            (tmp_path / "model").mkdir()  # a rename would replace an empty directory in silence

    with pytest.raises(ValueError, match="exists already"):
        fill_while_another_appears()
    assert list(tmp_path.rglob("*")) == [tmp_path / "model"]


def test_an_error_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with new_directory(tmp_path / "model", num_bytes=1) as directory:
            (directory / "half").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**12, 0, 3 * 10**9))
    with (
        pytest.raises(ValueError, match=r"needs about 4\.000 GB and .* has 3\.000 GB left"),
        new_directory(tmp_path / "model", num_bytes=4 * 10**9),
    ):
        pass
    assert list(tmp_path.iterdir()) == []
    # Some network file systems report no sizes.
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(0, 0, 0))
    write_model(tmp_path / "model")


def start_and_stop_in_the_middle(out: Path) -> multiprocessing.process.BaseProcess:
    """A process that has written one file of several and goes no further."""
    receiving, sending = FORK.Pipe(duplex=False)
    process = FORK.Process(target=write_model, args=(out,), kwargs={"between": sending})
    process.start()
    assert receiving.poll(30)
    assert receiving.recv() == "in the middle"
    return process


def kill(process: multiprocessing.process.BaseProcess) -> None:
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def test_a_killed_process_leaves_nothing_under_the_name_and_the_next_one_clears_up(tmp_path: Path) -> None:
    out = tmp_path / "model"
    (tmp_path / ".other.tmp").mkdir()
    kill(start_and_stop_in_the_middle(out))
    assert not out.exists()
    left_over = temporary_directory(out)
    assert (left_over / "model-00001-of-00002.safetensors").exists() or list(left_over.glob("model-00001-*"))
    (left_over / "stale.safetensors").write_text("from an older attempt")
    write_model(out)
    assert_complete(out)
    assert not (out / "stale.safetensors").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"model", ".other.tmp"}


def test_what_a_living_process_is_writing_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "model"
    process = start_and_stop_in_the_middle(out)
    try:
        with pytest.raises(ValueError, match="another process is writing"):
            write_model(out)
        assert list(temporary_directory(out).glob("model-00001-*"))
    finally:
        kill(process)


def test_something_else_under_the_temporary_name_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / ".model.tmp").write_text("mine")
    with pytest.raises(ValueError, match="in the way"):
        write_model(tmp_path / "model")
    assert (tmp_path / ".model.tmp").read_text() == "mine"


def test_at_whatever_moment_it_is_killed_the_output_is_complete_or_absent(tmp_path: Path) -> None:
    started = time.monotonic()
    whole = FORK.Process(target=write_model, args=(tmp_path / "unhurried",))
    whole.start()
    whole.join()
    duration = time.monotonic() - started
    outcomes = []
    for attempt in range(24):
        out = tmp_path / f"model-{attempt}"
        process = FORK.Process(target=write_model, args=(out,))
        process.start()
        time.sleep(duration * attempt / 20)
        kill(process)
        outcomes.append(out.exists())
        if out.exists():
            assert_complete(out)
        else:
            write_model(out)
            assert_complete(out)
        assert not temporary_directory(out).exists()
    assert False in outcomes
