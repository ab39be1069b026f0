"""A run directory accepts its own run, on any layout, and refuses another."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sftrl.config.load import config_from_text
from megatron_sftrl.config.placement import with_engine
from megatron_sftrl.config.schema import GrpoConfig
from megatron_sftrl.observability.run_directory import open_run_directory, write_atomically
from tests.unit.config.example import example

GRPO = Path(__file__).resolve().parents[3] / "examples" / "grpo.yaml"


def open_with(path: Path, *overrides: str, is_writer: bool = True) -> None:
    open_run_directory(example(f"run_dir='{path}'", *overrides), is_writer=is_writer)


def test_the_writer_leaves_the_resolved_configuration_and_nothing_else(tmp_path: Path) -> None:
    config = example(f"run_dir='{tmp_path / 'deep' / 'run'}'")
    directory = open_run_directory(config, is_writer=True)
    assert [file.name for file in directory.path.iterdir()] == ["resolved.yaml"]
    assert config_from_text(directory.resolved.read_text(), source="resolved.yaml") == config


def test_another_rank_writes_nothing(tmp_path: Path) -> None:
    open_with(tmp_path / "run", is_writer=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["parallel.tp=2", "parallel.pp=2", "parallel.distributed_optimizer=true"],
        ["train.steps=40"],
        ["train.steps=null", "train.epochs=1"],
        ["log.wandb=offline", "checkpoint.every=5", "train.recompute=full", "train.recompute_layers=1"],
        ["train.recompute=selective", "train.recompute_modules=[mlp]", "parallel.last_stage_layers=1"],
        ["batch.packing=true", "batch.max_tokens=256"],
        ["data.valid=[v.jsonl]", "train.eval_every=3"],
        ["reference.placement=offload"],
        ["loss.fused=on", "loss.chunk_mb=64"],  # less memory, for a run that has none left
        ["loss.fused=off"],
    ],
)
def test_a_run_continues_with_what_does_not_change_its_numbers(tmp_path: Path, overrides: list[str]) -> None:
    open_with(tmp_path)
    open_with(tmp_path, *overrides)
    again = example(f"run_dir='{tmp_path}'", *overrides)
    assert config_from_text((tmp_path / "resolved.yaml").read_text(), source="resolved.yaml") == again


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["optim.lr=2e-5"], "optim.lr: 1e-05 there, 2e-05 now"),
        (["loss.beta=6"], "loss.beta: 5 there, 6 now"),
        (["loss.smoothing=0.1"], "loss.smoothing: not given there, 0.1 now"),
        (["parallel.grad_reduce_dtype=bf16"], "parallel.grad_reduce_dtype: fp32 there, bf16 now"),
        (["parallel.megatron.moe_router_dtype=fp64"], "moe_router_dtype: not given there, fp64 now"),
        (["seed=1"], "seed: 1234 there, 1 now"),
        (["batch.global_size=16"], "batch.global_size: 8 there, 16 now"),
        (["data.train=[other.jsonl]"], "data.train: ['train.jsonl'] there, ['other.jsonl'] now"),
        (["reference=null"], "reference.kind: frozen there, not given now"),
        (["model.architecture.num_layers=2"], "model.architecture.num_layers: 4 there, 2 now"),
    ],
)
def test_a_run_with_other_numbers_is_refused_and_the_keys_are_named(
    tmp_path: Path, overrides: list[str], part: str
) -> None:
    open_with(tmp_path)
    before = (tmp_path / "resolved.yaml").read_text()
    for is_writer in (True, False):
        with pytest.raises(ValueError, match="belongs to a run with another configuration") as raised:
            open_with(tmp_path, *overrides, is_writer=is_writer)
        assert part in str(raised.value)
    assert (tmp_path / "resolved.yaml").read_text() == before


def test_a_run_whose_engine_auto_would_now_be_another_one_says_so(tmp_path: Path) -> None:
    text = GRPO.read_text().replace("/path/to", str(tmp_path))
    overrides = [f"run_dir={tmp_path / 'run'}", "rollout.engine=null", "rollout.max_concurrent=null"]
    config = config_from_text(text, source="run.yaml", overrides=overrides, schema=GrpoConfig)
    open_run_directory(with_engine(config, is_cuda=True, has_vllm=True)[0], is_writer=True)
    with pytest.raises(ValueError, match=r"rollout\.engine: vllm there, in_process now"):
        open_run_directory(with_engine(config, is_cuda=False, has_vllm=True)[0], is_writer=True)


def test_a_schedule_that_stretches_with_the_length_fixes_the_length(tmp_path: Path) -> None:
    open_with(tmp_path, "optim.schedule=cosine")
    with pytest.raises(ValueError, match=r"train\.steps: 20 there, 40 now"):
        open_with(tmp_path, "optim.schedule=cosine", "train.steps=40")


@pytest.mark.parametrize("leftover", ["metrics.jsonl", "checkpoints"])
def test_a_run_without_its_configuration_is_refused(tmp_path: Path, leftover: str) -> None:
    (tmp_path / leftover).mkdir()
    with pytest.raises(ValueError, match=r"no resolved\.yaml"):
        open_with(tmp_path)


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        open_with(tmp_path / "file")
    with pytest.raises(ValueError, match="cannot write into run_dir"):
        open_with(tmp_path / "file" / "below")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "resolved.yaml"
    write_atomically(path, "old")

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["resolved.yaml"]
