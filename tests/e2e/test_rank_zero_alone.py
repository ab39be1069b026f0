"""What only rank 0 opens or writes, and cannot: every rank stops with its message, none waits for it."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_sftrl.apps.score import score as write_scores
from megatron_sftrl.config.load import load_config
from megatron_sftrl.config.schema import GrpoConfig, RunConfig
from megatron_sftrl.engine.parallel import destroy_parallel
from megatron_sftrl.trainers.generate import GenerateRequest, run_generate
from megatron_sftrl.trainers.grpo import run_grpo
from megatron_sftrl.trainers.sft import run_sft
from megatron_sftrl.types import SamplingParams
from tests.e2e.grpo_project import GrpoProject
from tests.e2e.project import Project, read_rows, write_rows
from tests.ranks import free_port, run_ranks

GREEDY = SamplingParams(
    temperature=0.0, top_p=1.0, top_k=0, max_new_tokens=2, num_samples=1, stop_ids=frozenset(), seed=0
)


def assert_both_ranks_say(message: str, run: Callable[..., None], *arguments: object) -> None:
    """A rank that waits for the other one fails here at the time limit."""
    said = run_ranks(2, refusal, run, arguments, free_port(), timeout_s=60, group=False)
    assert said[0] == said[1]
    assert message in said[0]


def refusal(run: Callable[..., None], arguments: tuple[object, ...], port: int) -> str:
    """On every rank: the error for the user in which `run` ends."""
    os.environ["MASTER_PORT"] = str(port)
    try:
        run(*arguments)
    except ValueError as error:
        return str(error)
    finally:
        destroy_parallel()  # a rank that fails leaves its groups to the end of its process
    return "nothing is wrong"


def train(yaml: Path, schema: type[RunConfig] | type[GrpoConfig], run_dir: Path) -> None:
    config = load_config(yaml, [f"run_dir={run_dir}"], schema=schema)
    assert isinstance(config, RunConfig | GrpoConfig)
    run_grpo(config) if isinstance(config, GrpoConfig) else run_sft(config)


def generate(yaml: Path, checkpoint: Path, prompts: Path, out: Path) -> None:
    request = GenerateRequest(prompts=prompts, out=out, checkpoint=checkpoint, num_samples=1, sampling=GREEDY)
    run_generate(load_config(yaml, [], schema=RunConfig), request)


def score(yaml: Path, checkpoint: Path, data: Path, out: Path) -> None:
    write_scores(load_config(yaml, [], schema=RunConfig), checkpoint=checkpoint, data=data, out=out)


def begun(run_dir: Path, like: Path, *, taken: str) -> Path:
    """The directory of a run before its first checkpoint, where a directory has the name of one of its files.

    Not a file without permissions: root, as which tests often run, may write to that.
    """
    (run_dir / taken).mkdir(parents=True)
    text = (like / "resolved.yaml").read_text()
    (run_dir / "resolved.yaml").write_text(text.replace(str(like), str(run_dir)))
    return run_dir


def train_with_small_files(
    yaml: Path, schema: type[RunConfig] | type[GrpoConfig], run_dir: Path, most: int
) -> None:
    """`train` where no file may grow beyond `most` bytes, as on a disk that fills up."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    try:
        train(yaml, schema, run_dir)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_metrics_of_sft_in_the_middle_of_a_run(project: Project, one_process: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(one_process, run_dir)
    shutil.rmtree(run_dir / "checkpoints/step-00000008")
    metrics = run_dir / "metrics.jsonl"
    first, *others = read_rows(metrics)
    write_rows(metrics, [{**first, "large": "x" * 2**16}, *others])
    most = sum(map(len, metrics.read_text().splitlines(keepends=True)[:4])) + 100  # inside the fifth line
    message = "the metrics of step 5 cannot be written"
    assert_both_ranks_say(message, train_with_small_files, project.yaml, RunConfig, run_dir, most)


def test_samples_of_grpo_in_the_middle_of_a_run(grpo: GrpoProject, grpo_run: Path, tmp_path: Path) -> None:
    most = (grpo_run / "rollouts.jsonl").stat().st_size // 2
    assert most > sum((grpo_run / name).stat().st_size for name in ("metrics.jsonl", "resolved.yaml"))
    message = "the samples of step 2 cannot be written"
    assert_both_ranks_say(message, train_with_small_files, grpo.yaml, GrpoConfig, tmp_path / "run", most)


def test_metrics_of_sft(project: Project, one_process: Path, tmp_path: Path) -> None:
    run_dir = begun(tmp_path / "run", one_process, taken="metrics.jsonl")
    message = f"the metrics cannot be written to {run_dir}/metrics.jsonl"
    assert_both_ranks_say(message, train, project.yaml, RunConfig, run_dir)


@pytest.mark.parametrize(("taken", "what"), [("metrics.jsonl", "metrics"), ("rollouts.jsonl", "samples")])
def test_metrics_and_samples_of_grpo(
    taken: str, what: str, grpo: GrpoProject, grpo_run: Path, tmp_path: Path
) -> None:
    run_dir = begun(tmp_path / "run", grpo_run, taken=taken)
    message = f"the {what} cannot be written to {run_dir}/{taken}"
    assert_both_ranks_say(message, train, grpo.yaml, GrpoConfig, run_dir)


@pytest.mark.parametrize("run", [generate, score])
def test_responses_and_scores(
    run: Callable[..., None], project: Project, one_process: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file/out.jsonl"  # a file has the name of its directory
    assert_both_ranks_say(f"{tmp_path}/file", run, project.yaml, one_process, project.train, out)
