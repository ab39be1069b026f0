"""`sftrl preflight` on two ranks that take each other for nodes: all well, and each kind of trouble named."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import yaml

from megatron_sftrl.apps.preflight.node import checkpoint_bytes
from megatron_sftrl.config.load import load_any_config
from megatron_sftrl.engine.checkpoint import StoredTensors
from megatron_sftrl.models import architecture_of
from tests.distributed.hf_models import save_model
from tests.e2e.grpo_project import GrpoProject
from tests.e2e.product import Ended, call_main, sftrl, sftrl_each
from tests.e2e.project import Project
from tests.grid import cases
from tests.ranks import free_port, run_ranks

Plant = Callable[[], contextlib.AbstractContextManager]
SOUND = (
    "processes and GPUs", "versions", "device and layers", "configuration, model and tokenizer", "data",
    "space for checkpoints", "run directory", "ports", "all-reduce over all processes", "clocks",
)  # fmt: skip


def as_nodes(lines: list[list[str]], port: int, plant: Plant | None) -> Ended:
    """In a rank worker: this rank is the only one of node0, node1, ...; `plant` holds on the last one."""
    from megatron_sftrl.cli import main

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    said = io.StringIO()
    names = {"SLURMD_NODENAME": f"node{rank}", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    planted = plant() if plant is not None and rank == size - 1 else contextlib.nullcontext()
    with (
        mock.patch.dict(os.environ, {**names, "MASTER_PORT": str(port)}),
        planted,
        contextlib.redirect_stderr(said),
        mock.patch("megatron_sftrl.cli._SECONDS_FOR_RANK_0", 0.0),
    ):
        try:
            code = main(lines[rank])
        except RuntimeError as error:  # a failure, which Python ends with code 1
            code = 1
            said.write(str(error))
    return Ended(code, said.getvalue())


def preflight(lines: list[list[str]], plant: Plant | None = None) -> list[Ended]:
    command = [["preflight", *line] for line in lines]
    return run_ranks(len(lines), as_nodes, command, free_port(), plant, group=False)


@pytest.fixture
def line(project: Project, tmp_path: Path) -> list[str]:
    return [str(project.yaml), f"run_dir={tmp_path / 'run'}"]


def test_all_is_well_on_two_nodes_and_nothing_is_left_behind(line: list[str], tmp_path: Path) -> None:
    first, second = preflight([line, line])
    said = first.expect(0).stderr
    assert [name for name in SOUND if name not in said] == []
    assert "2 processes on 2 node(s)" in said
    assert "no CUDA" in said
    assert "bad" not in said
    assert "all is well" in said
    assert second.expect(0).stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_one_process_needs_no_launcher(line: list[str]) -> None:
    (done,) = sftrl_each([["preflight", *line]])
    said = done.expect(0).stderr
    assert "1 processes on 1 node(s)" in said
    assert "one process, nothing to reduce" in said


BALANCED = (
    ["model.moe_aux_loss_coeff=0.01"],
    "model.moe_aux_loss_coeff = 0.01: the router's biases keep the",
)
WHOLE_SEQUENCE = (["parallel.cp=2"], "parallel.cp = 2: a gated delta net reads its sequence from the first")
RARELY = ("glm4_moe", "minimax_m2", "deepseek_v3", "mistral4", "gpt_oss", "qwen3_5_text")
OTHER_FAMILIES: dict[str, tuple[list[str], str]] = {
    "glm4_moe": BALANCED,
    "deepseek_v3": BALANCED,
    "minimax_m2": BALANCED,
    "mistral4": (["parallel.tp=2"], "a mixture of experts at parallel.tp = 2 needs parallel.sequence_par"),
    "phi3_longrope": (
        ["data.max_length=129"],
        "data.max_length = 129: a model with rope_type longrope is only trained and run with sequences of up "
        "to its original_max_position_embeddings = 128 tokens",
    ),
    "gpt_oss": (
        ["parallel.tp=2", "parallel.sequence_parallel=true"],
        "experts with biases, as this model",
    ),
    "qwen3_5_text": WHOLE_SEQUENCE,
    "qwen3_next": (
        ["lora={rank: 4, alpha: 8, targets: [q_proj, conv1d]}"],
        "lora.targets: the convolution of gated delta nets, conv1d, has no adapter",
    ),
    "gemma3_text": (["model.moe_aux_loss_coeff=0.01"], "is about experts, and the model is no mixture"),
}


@pytest.mark.parametrize("family", cases(OTHER_FAMILIES, rarely=RARELY))
def test_a_checkpoint_of_another_family_is_well_and_what_it_cannot_have_is_named(
    family: str, project: Project, tmp_path: Path
) -> None:
    save_model(family, tmp_path / "hf")
    tree = yaml.safe_load(project.yaml.read_text())
    tree |= {"model": {"hf": str(tmp_path / "hf"), "dtype": "fp32"}, "run_dir": str(tmp_path / "run")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    changes, message = OTHER_FAMILIES[family]
    plain = [str(tmp_path / "run.yaml")]
    assert "all is well" in preflight([plain, plain])[0].expect(0).stderr
    refused = preflight([[*plain, *changes]] * 2)[0].expect(2).stderr
    assert message in " ".join(refused.split())


def other_versions() -> contextlib.AbstractContextManager:
    from megatron_sftrl.apps.preflight import node

    right = node.installed_version

    def another(name: str) -> str:
        return "0.0" if name == "torch" else right(name)

    return mock.patch.object(node, "installed_version", another)


def wrong_clock() -> contextlib.AbstractContextManager:
    from megatron_sftrl.apps.preflight import run

    right = run.clock_after_barrier

    def fast() -> float:
        return right() + 3600

    return mock.patch.object(run, "clock_after_barrier", fast)


def another_gpu_count() -> contextlib.AbstractContextManager:
    return mock.patch.dict(os.environ, {"LOCAL_WORLD_SIZE": "7"})


def no_way_through() -> contextlib.AbstractContextManager:
    import socket

    return mock.patch.object(socket, "create_connection", side_effect=OSError("no route to host"))


def gpus_that_torch_does_not_see() -> contextlib.AbstractContextManager:
    return mock.patch.dict(os.environ, {"SLURM_GPUS_ON_NODE": "8"})


@contextlib.contextmanager
def a_transformer_engine_whose_layer_fails() -> Iterator[None]:
    """As on a node with CUDA, and with a package that imports."""
    import torch

    from megatron_sftrl.engine.device import TransformerEngine

    def layer(*_: object, **__: object) -> None:
        raise RuntimeError("cuDNN Error: no valid engine")

    packages = {
        "transformer_engine": None,
        "transformer_engine.pytorch": SimpleNamespace(TransformerLayer=layer),
    }
    found = TransformerEngine(problem=None)
    with (
        mock.patch.dict(sys.modules, packages),
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch("megatron_sftrl.engine.device.transformer_engine", return_value=found),
        mock.patch("megatron_sftrl.engine.megatron_config.transformer_engine", return_value=found),
        mock.patch("megatron_sftrl.apps.preflight.run.own_gpu_bytes", return_value=2**40),
    ):
        yield


@pytest.mark.parametrize(
    ("plant", "found"),
    [
        (gpus_that_torch_does_not_see, "node1: there are GPUs (SLURM_GPUS_ON_NODE=8), and torch sees none"),
        (
            a_transformer_engine_whose_layer_fails,
            "node1: Transformer Engine cannot run a layer: RuntimeError: cuDNN Error: no valid engine",
        ),
        (other_versions, "node1 has torch 0.0, most nodes"),
        (wrong_clock, "the clock of node1 is +3600"),
        (another_gpu_count, "node1 runs 7 processes"),
        (no_way_through, "node1 cannot connect to node0"),
    ],
)
def test_the_bad_node_is_named(plant: Plant, found: str, line: list[str]) -> None:
    for ended in preflight([line, line], plant):
        assert found in ended.expect(2).stderr


def test_a_node_with_another_disk_is_named(project: Project, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    lines = [[str(project.yaml), f"run_dir={tmp_path / name / 'run'}"] for name in ("a", "b")]
    for ended in preflight(lines):
        assert "must lie on a file system that all nodes share" in ended.expect(2).stderr.replace("\n", " ")


def test_a_node_that_lacks_the_data_is_named(line: list[str], tmp_path: Path) -> None:
    for ended in preflight([line, [*line, f"data.train=[{tmp_path / 'absent.jsonl'}]"]]):
        assert "node1: " in ended.expect(2).stderr
        assert "absent.jsonl" in ended.stderr


def a_stale_handle() -> contextlib.AbstractContextManager:
    from megatron_sftrl.apps.preflight import run

    return mock.patch.object(run, "leave_mark", side_effect=OSError(errno.ESTALE, "Stale file handle"))


def test_a_file_system_that_fails_is_named_as_a_failure_and_beside_a_mistake_as_one(
    line: list[str], tmp_path: Path
) -> None:
    for ended in preflight([line, line], a_stale_handle):
        assert "node1: cannot write to" in ended.expect(1).stderr
    wrong = [*line, f"data.train=[{tmp_path / 'absent.jsonl'}]"]
    for ended in preflight([wrong, wrong], a_stale_handle):
        assert "Stale file handle" in ended.expect(2).stderr


def slow_reader() -> contextlib.AbstractContextManager:
    from megatron_sftrl.apps.preflight import network

    def slow(text: bytes) -> object:
        time.sleep(0.1)
        return json.loads(text)

    return mock.patch.object(network, "json", SimpleNamespace(loads=slow, dumps=json.dumps))


def test_rank_0_keeps_the_store_until_the_slowest_has_read(line: list[str], tmp_path: Path) -> None:
    lines = [line, [*line, f"data.train=[{tmp_path / 'absent.jsonl'}]"]]
    for ended in preflight(lines, slow_reader):
        assert "absent.jsonl" in ended.expect(2).stderr


def test_a_rollout_engine_that_cannot_run_is_told(grpo: GrpoProject, tmp_path: Path) -> None:
    _, *line = grpo.command(tmp_path / "run")
    sound, bad = sftrl_each([["preflight", *line], ["preflight", *line, "rollout.offload=true"]])
    assert "GrpoConfig, loss grpo" in sound.expect(0).stderr
    assert "this run has no GPU" in bad.expect(2).stderr


def test_a_gpu_that_is_too_small_for_the_model_is_told(line: list[str]) -> None:
    (done,) = run_ranks(1, on_a_gpu_of, 10_000, ["preflight", *line], free_port(), group=False)
    assert "its GPU has 0.00 GB: take more GPUs, or cut the model further" in done.expect(2).stderr


def on_a_gpu_of(num_bytes: int, line: list[str], port: int) -> Ended:
    with mock.patch("megatron_sftrl.apps.preflight.run.own_gpu_bytes", return_value=num_bytes):
        return call_main([line], [port])[0]


def test_a_disk_that_is_too_small_is_told(line: list[str]) -> None:
    (done,) = sftrl_each([["preflight", *line, "checkpoint.keep_last=100000000"]])
    assert "before it removes one: free space" in done.expect(2).stderr


def test_a_slow_network_is_told_when_asked(line: list[str]) -> None:
    for ended in preflight([[*line, "--min-bandwidth", "1e6"]] * 2):
        assert "less than --min-bandwidth" in ended.expect(2).stderr


def test_a_process_that_never_comes_is_told(line: list[str]) -> None:
    """One process of a world of two, as where a node did not boot."""
    (ended,) = run_ranks(1, alone_of_two, ["preflight", *line, "--timeout", "2"], free_port(), group=False)
    assert "did not meet all 2 processes" in ended.expect(1).stderr


def alone_of_two(line: list[str], port: int) -> Ended:
    with mock.patch.dict(os.environ, {"WORLD_SIZE": "2"}):
        said = io.StringIO()
        from megatron_sftrl.cli import main

        with (
            mock.patch.dict(os.environ, {"MASTER_PORT": str(port)}),
            contextlib.redirect_stderr(said),
            pytest.raises(RuntimeError) as caught,
        ):
            main(line)
    return Ended(1, str(caught.value))


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("model.dtype=bf16", "loss={name: curiosft}", "reference.kind=moving_average"),
        ("optim={name: sgd, lr: 0.1, momentum: 0.9}",),
    ],
    ids=["fp32 adamw", "bf16 adamw, moving reference", "fp32 sgd with momentum"],
)
def test_the_space_that_is_asked_for_is_what_a_checkpoint_takes(
    changes: tuple[str, ...], project: Project, tmp_path: Path
) -> None:
    overrides = [f"run_dir={tmp_path / 'run'}", "train.steps=2", "checkpoint.keep_last=1", *changes]
    sftrl("sft", str(project.yaml), *overrides)
    (step,) = (tmp_path / "run/checkpoints").iterdir()
    with contextlib.closing(StoredTensors(step)) as stored:
        sizes = {key: math.prod(shape) * stored.dtypes[key].itemsize for key, shape in stored.shapes.items()}
    config = load_any_config(project.yaml, overrides)
    found = sum(size for key, size in sizes.items() if not key.startswith("rng."))
    assert checkpoint_bytes(config, architecture_of(config.model)) == found
