"""Checkpoints that cannot be written or loaded: a clear ValueError on every rank, nothing lost."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_sftrl.engine.checkpoint.directory import file_record
from tests.distributed.checkpoint_runs import Span, engines, held_state, open_store, run_span, stored_tensors
from tests.ranks import run_ranks

SAVED = Span(parallel={"tp": 2}, last=1)
STEP = "step-00000001"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound checkpoint of step 1, written by two ranks; not to be changed."""
    directory = tmp_path_factory.mktemp("saved")
    run_ranks(2, run_span, Span(parallel={"tp": 2}, last=1, save=str(directory)))
    return directory


def try_load(directory: str, span: Span) -> tuple[str, bool]:
    """(what load complained about, nothing of this rank changed)."""
    from megatron_sftrl.engine.checkpoint import CheckpointStore

    with engines(span) as (parallel, policy, reference):
        before = held_state(policy, reference)
        store = CheckpointStore(Path(directory), parallel, keep_last=2)
        path = store.latest()
        assert path is not None
        try:
            store.load(path, policy, reference)
            message = ""
        except ValueError as error:
            message = str(error)
        after = held_state(policy, reference)
        is_unchanged = all(torch.equal(value, after[name]) for name, value in before.items())
        return message, is_unchanged


def truncate_shard(checkpoint: Path) -> None:
    with open(checkpoint / "__1_0.distcp", "r+b") as stream:
        stream.truncate(1000)


def flip_byte(checkpoint: Path) -> None:
    content = bytearray((checkpoint / "__0_0.distcp").read_bytes())
    content[len(content) // 2] ^= 1
    (checkpoint / "__0_0.distcp").write_bytes(content)


def garble_record(checkpoint: Path) -> None:
    (checkpoint / "checkpoint.json").write_text("{")


def drop_field(checkpoint: Path) -> None:
    record = json.loads((checkpoint / "checkpoint.json").read_text())
    del record["optimizer_step"]
    (checkpoint / "checkpoint.json").write_text(json.dumps(record))


class _Malicious:
    def __reduce__(self) -> tuple:
        return os.system, ("true",)


def plant_code(checkpoint: Path) -> None:
    """A pickle that would run a command, with a checkpoint.json that vouches for it."""
    (checkpoint / ".metadata").write_bytes(pickle.dumps(_Malicious()))
    record = json.loads((checkpoint / "checkpoint.json").read_text())
    record["files"][".metadata"] = dataclasses.asdict(file_record(checkpoint / ".metadata"))
    (checkpoint / "checkpoint.json").write_text(json.dumps(record))


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated shard": (truncate_shard, "__1_0.distcp has 1000 bytes instead of"),
    "flipped bit": (flip_byte, "__0_0.distcp has another content"),
    "missing shard": (lambda path: (path / "__1_0.distcp").unlink(), "__1_0.distcp is missing"),
    "missing index": (lambda path: (path / ".metadata").unlink(), ".metadata is missing"),
    "missing record": (lambda path: (path / "checkpoint.json").unlink(), "not a complete checkpoint"),
    "garbled record": (garble_record, "checkpoint.json cannot be read"),
    "incomplete record": (drop_field, "optimizer_step"),
    "code in the index": (plant_code, "may be malicious"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_and_nothing_is_loaded(
    damage: str, saved: Path, tmp_path: Path
) -> None:
    inflict, words = DAMAGES[damage]
    shutil.copytree(saved / STEP, tmp_path / STEP)
    inflict(tmp_path / STEP)
    for message, is_unchanged in run_ranks(2, try_load, str(tmp_path), SAVED):
        assert words in message
        assert is_unchanged


MISFITS: dict[str, tuple[Span, list[str]]] = {
    "architecture": (
        Span(parallel={}, model={"ffn_hidden_size": 64, "num_layers": 2}),
        ["ffn_hidden_size: checkpoint 48, this run 64", "num_layers: checkpoint 4, this run 2"],
    ),
    "dtype": (Span(parallel={}, dtype="bf16"), ["model.dtype: checkpoint 'fp32', this run 'bf16'"]),
    "optimizer": (Span(parallel={}, optim={"name": "sgd"}), ["optim.name: checkpoint 'adamw', this"]),
    "reference": (
        Span(parallel={}, reference="moving_average"),
        ["moving reference: checkpoint None, this run 'moving_average'"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_checkpoint_of_another_run_is_refused_naming_every_difference(misfit: str, saved: Path) -> None:
    span, words = MISFITS[misfit]
    [(message, is_unchanged)] = run_ranks(1, try_load, str(saved), span)
    assert all(each in message for each in words)
    assert is_unchanged


def test_a_frozen_reference_is_neither_stored_nor_asked_for(saved: Path) -> None:
    [(message, _)] = run_ranks(1, try_load, str(saved), Span(parallel={}, reference="frozen"))
    assert message == ""
    assert not any(key.startswith("reference.") for key in stored_tensors(saved / STEP))


def test_missing_and_unexpected_tensors_are_counted_and_the_first_are_named(tmp_path: Path) -> None:
    plain = Span(parallel={"tp": 2}, optim={"name": "sgd"}, last=1, save=str(tmp_path / "plain"))
    heavy = Span(
        parallel={"tp": 2}, optim={"name": "sgd", "momentum": 0.9}, last=1, save=str(tmp_path / "heavy")
    )
    run_ranks(2, run_span, plain)
    run_ranks(2, run_span, heavy)
    weights = sorted(key for key in stored_tensors(tmp_path / "plain" / STEP) if key.startswith("policy."))
    # pp2: no rank knows all names by itself
    for name, span, kind in (("plain", heavy, "missing"), ("heavy", plain, "unexpected")):
        span = Span(parallel={"pp": 2}, optim=span.optim)
        for message, is_unchanged in run_ranks(2, try_load, str(tmp_path / name), span):
            for key in weights[:4]:
                assert f"{kind}: {key.replace('policy', 'optimizer.momentum_buffer')}\n" in message
            assert message.endswith(f"... and {len(weights) - 4} more")
            assert is_unchanged


def load_start(path: str, span: Span) -> tuple[str, dict[str, torch.Tensor]]:
    from megatron_sftrl.engine.checkpoint import load_weights

    with engines(span) as (parallel, policy, _):
        try:
            load_weights(policy.chunks, Path(path), architecture=policy.architecture, parallel=parallel)
            message = ""
        except ValueError as error:
            message = str(error)
        return message, dict(policy.chunks[0].state_dict())


def test_weights_alone_load_from_a_run_directory_and_are_cast(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").symlink_to(saved)
    stored = stored_tensors(saved / STEP)["policy.decoder.final_layernorm.weight"]
    assert not torch.equal(stored, torch.ones_like(stored)), "not trained: the test is blind"
    for path in (tmp_path, saved, saved / STEP):
        [(message, weights)] = run_ranks(1, load_start, str(path), Span(parallel={}, dtype="bf16"))
        assert message == ""
        assert torch.equal(weights["decoder.final_layernorm.weight"], stored.bfloat16())


def test_weights_of_another_size_or_from_nowhere_are_refused(saved: Path, tmp_path: Path) -> None:
    [(message, _)] = run_ranks(1, load_start, str(saved), Span(parallel={}, model={"vocab_size": 103}))
    assert "vocab_size: checkpoint 101, this run 103" in message
    [(message, _)] = run_ranks(1, load_start, str(tmp_path), Span(parallel={}))
    assert "no complete checkpoint" in message


def save_on_full_disk(directory: str, span: Span) -> tuple[str, list[str], str]:
    """(what save complained about, what is left, what a save afterwards gave); rank 1 cannot write."""
    from megatron_sftrl.engine.checkpoint import TrainerState

    with engines(span) as (parallel, policy, reference):
        store = open_store(directory, parallel, span)
        store.save(TrainerState(step=1), policy, reference)
        store.finish()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if parallel.rank == 1:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        try:
            store.save(TrainerState(step=2), policy, reference)
            # Step boundaries: every rank has to hear of it at the same one.
            for _ in range(1000):
                store.written()
                time.sleep(0.01)
            message = ""
        except ValueError as error:
            message = str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        left = sorted(os.listdir(directory))
        torch.distributed.barrier()
        store.load(Path(directory) / STEP, policy, reference)
        path = store.save(TrainerState(step=2), policy, reference)
        store.finish()
        return message, left, path.name if path.is_dir() else ""


@pytest.mark.parametrize("async_save", [False, True])
def test_a_disk_that_fills_up_in_the_middle_of_a_save_costs_only_that_save(
    async_save: bool, tmp_path: Path
) -> None:
    span = Span(parallel={"tp": 2}, async_save=async_save)
    for message, left, afterwards in run_ranks(2, save_on_full_disk, str(tmp_path), span):
        assert "rank 1" in message
        assert "earlier checkpoints are untouched" in message
        assert left == [STEP]
        assert afterwards == "step-00000002"


def save_three(directory: str, span: Span) -> list[str]:
    from megatron_sftrl.engine.checkpoint import TrainerState

    with engines(span) as (parallel, policy, reference):
        store = open_store(directory, parallel, span)
        assert store.latest() is None
        if parallel.rank == 0:
            (Path(directory) / ".step-00000009.tmp").mkdir(parents=True)
            (Path(directory) / ".step-00000001.old.tmp").mkdir()
        for step in (9, 10, 100, 100):
            store.save(TrainerState(step=step, consumed_samples=7 * step), policy, reference)
        store.finish()
        latest = store.latest()
        assert latest is not None
        assert store.load(latest, policy, reference) == TrainerState(step=100, consumed_samples=700)
        return sorted(os.listdir(directory))


@pytest.mark.parametrize("async_save", [False, True])
def test_the_last_checkpoints_are_kept_and_leftovers_of_killed_saves_removed(
    async_save: bool, tmp_path: Path
) -> None:
    directory = str(tmp_path / "checkpoints")
    for left in run_ranks(2, save_three, directory, Span(parallel={}, async_save=async_save)):
        assert left == ["step-00000010", "step-00000100"]
