"""`lora:` from the YAML to an export: what a user types, in processes of several layouts."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.e2e.grpo_project import GrpoProject
from tests.e2e.once import once
from tests.e2e.product import sftrl, sftrl_each
from tests.e2e.project import NUM_STEPS, VOCAB_SIZE, Project, make_tokenizer, metrics_of, read_rows
from tests.grid import HOW_TO_RUN_ALL, is_full
from tests.hf_models import read_tensors, write_model

LAST = f"checkpoints/step-{NUM_STEPS:08d}"
SCALE = 2.0
LORA = "lora={rank: 4, alpha: 8, targets: [q_proj, v_proj, o_proj, gate_proj, down_proj]}"


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model under the adapters."""

    def write(folder: Path) -> Path:
        directory = write_model(folder / "base", "qwen2", vocab_size=VOCAB_SIZE)
        make_tokenizer(directory)
        return directory

    return once(tmp_path_factory, "lora_base", write)


@pytest.fixture(scope="session")
def trained(project: Project, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of GIFT with a frozen reference on tp = 2 with sequence parallelism: never written."""

    def run(folder: Path) -> Path:
        layout = "parallel={tp: 2, sequence_parallel: true}"
        sftrl(*sft(project, base, folder / "run"), layout, ranks=2)
        return folder / "run"

    return once(tmp_path_factory, "lora_run", run)


def sft(project: Project, base: Path, run_dir: Path, *overrides: str) -> list[str]:
    model = ("model.architecture=null", f"model.hf={base}")
    return ["sft", str(project.yaml), f"run_dir={run_dir}", *model, LORA, *overrides]


def test_a_checkpoint_of_adapters_goes_on_in_another_layout(
    project: Project, base: Path, trained: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(trained, run_dir)
    shutil.rmtree(run_dir / LAST)
    before = metrics_of(run_dir)
    sftrl(*sft(project, base, run_dir, "parallel.distributed_optimizer=true", "train.recompute=full"))
    after = metrics_of(run_dir)
    assert after[:4] == before[:4]
    assert after[4:] != before[4:], "nothing was computed again: the comparison is blind"
    # The reference is the model without adapters: with those of the checkpoint it would be off by tenths.
    for name in ("loss", "grad_norm", "nll"):
        ours, truth = ([row[name] for row in rows] for rows in (after, before))
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(truth), rtol=1e-5, atol=1e-5)
    assert after[-1]["loss"] != pytest.approx(after[0]["loss"], abs=1e-3), "nothing was learned"


def test_both_exports_are_the_base_and_its_adapters(base: Path, trained: Path, tmp_path: Path) -> None:
    export = ["convert", "to-hf", "--checkpoint", str(trained)]
    moved = shutil.copytree(base, tmp_path / "moved")
    merged, peft = tmp_path / "merged", tmp_path / "peft"
    said = sftrl(*export, "--out", str(merged), "--base", str(moved), "--verify").stderr
    assert "verify: largest logit difference" in said
    sftrl(*export, "--out", str(peft), "--adapters")
    weights, adapters = read_tensors(merged), read_tensors(peft)
    changed = 0
    for name, weight in read_tensors(base).items():
        inside = f"base_model.model.{name.removesuffix('.weight')}"
        if (down := adapters.get(f"{inside}.lora_A.weight")) is not None:
            weight = weight + SCALE * adapters[f"{inside}.lora_B.weight"] @ down
            changed += 1
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-6, msg=name)
    assert changed == 2 * 5 == len(adapters) / 2
    (moved / "model.safetensors").unlink()
    write_model(moved, "qwen2", vocab_size=VOCAB_SIZE, seed=1)
    (ended,) = sftrl_each([[*export, "--out", str(tmp_path / "other"), "--base", str(moved)]])
    assert "holds adapters over other weights" in ended.expect(2).stderr


@pytest.mark.skipif(not is_full(), reason=HOW_TO_RUN_ALL)
def test_experts_that_files_hold_as_stacks_are_exported_merged(project: Project, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", "mistral4", vocab_size=VOCAB_SIZE)
    make_tokenizer(base)
    sftrl(*sft(project, base, tmp_path / "run", "lora.targets=[q_b_proj, gate_proj, down_proj]"))
    export = ["convert", "to-hf", "--checkpoint", str(tmp_path / "run"), "--verify"]
    sftrl(*export, "--out", str(tmp_path / "merged"), "--max-file-gb", "2e-5")
    weights, before = read_tensors(tmp_path / "merged"), read_tensors(base)
    assert {name: each.shape for name, each in weights.items()} == {
        name: each.shape for name, each in before.items()
    }
    changed = [name for name in before if not torch.equal(weights[name], before[name])]
    assert {".".join(name.split(".")[3:]) for name in changed} == {
        "self_attn.q_b_proj.weight",
        *(f"mlp.{part}_proj.weight" for part in ("gate", "down")),
        *(f"mlp.shared_experts.{part}_proj.weight" for part in ("gate", "down")),
        "mlp.experts.gate_up_proj",
        "mlp.experts.down_proj",
    }


def test_a_run_starts_from_an_adapter_and_its_frozen_reference_with_it(
    project: Project, base: Path, trained: Path, tmp_path: Path
) -> None:
    """The first loss is that of the merged model beside itself, in a layout of its own.

    A run of all weights starts from the checkpoint as it is, and merges it, too.
    """
    merged, peft = tmp_path / "merged", tmp_path / "peft"
    export = ["convert", "to-hf", "--checkpoint", str(trained)]
    sftrl(*export, "--out", str(merged))
    sftrl(*export, "--out", str(peft), "--adapters")
    short = ("train.steps=2",)
    two = "parallel={tp: 2}"
    sftrl(*sft(project, base, tmp_path / "on", *short, two, f"lora.start={peft}"), ranks=2)
    for name, model in {"merged": merged, "base": base}.items():
        sftrl(*sft(project, model, tmp_path / name, *short))
    whole = sft(project, base, tmp_path / "whole", *short, f"model.init_checkpoint={trained}")
    whole.remove(LORA)
    whole[whole.index(f"model.hf={base}")] = f"model.hf_config={base}"
    sftrl(*whole)
    on, truth, other, all_weights = (
        [metrics_of(tmp_path / name)[0][number] for number in ("loss", "nll")]
        for name in ("on", "merged", "base", "whole")
    )
    torch.testing.assert_close(torch.tensor(on), torch.tensor(truth), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.tensor(all_weights), torch.tensor(truth), rtol=1e-5, atol=1e-5)
    assert on != pytest.approx(other, abs=1e-3), "the start changes nothing"
    elsewhere = write_model(tmp_path / "elsewhere", "qwen2", vocab_size=VOCAB_SIZE, seed=1)
    make_tokenizer(elsewhere)
    (ended,) = sftrl_each([sft(project, elsewhere, tmp_path / "never", *short, f"lora.start={peft}")])
    assert "was trained over" in ended.expect(2).stderr


def test_an_answer_is_that_of_the_merged_model(
    project: Project, base: Path, trained: Path, tmp_path: Path
) -> None:
    """The cached decode of single tokens reads the weights without their modules."""
    merged = tmp_path / "merged"
    sftrl("convert", "to-hf", "--checkpoint", str(trained), "--out", str(merged))
    config, one = str(trained / "resolved.yaml"), ("parallel.tp=1", "parallel.sequence_parallel=false")
    ask = ["--prompts", str(project.valid), "--max-new-tokens", "12", "--temperature", "0"]
    answers = {}
    for name, more in {
        "adapters": [*one, "--checkpoint", str(trained)],
        "merged": [*one, "lora=null", f"model.hf={merged}", "--checkpoint", str(merged)],
        "base": [*one, "--checkpoint", str(base)],
    }.items():
        sftrl("generate", config, *more, *ask, "--out", str(tmp_path / f"of {name}"))
        answers[name] = [row["responses"] for row in read_rows(tmp_path / f"of {name}")]
    assert answers["adapters"] == answers["merged"] != answers["base"]


def test_grpo_samples_from_the_adapters_that_it_trains(grpo: GrpoProject, base: Path, tmp_path: Path) -> None:
    sftrl(*grpo_with_adapters(grpo, base, tmp_path / "run"), ranks=1)
    metrics = metrics_of(tmp_path / "run")
    assert all(row["mismatch/max"] < 1e-4 for row in metrics)
    if is_full():  # a generator has merged weights
        sftrl(*grpo_with_adapters(grpo, base, tmp_path / "apart"), "rollout.devices=1", ranks=2)
        apart = metrics_of(tmp_path / "apart")
        assert all(0 < row["mismatch/max"] < 1e-4 for row in apart)
        assert apart[-1]["loss"] == pytest.approx(metrics[-1]["loss"], abs=1e-4)


@pytest.mark.skipif(not is_full(), reason=HOW_TO_RUN_ALL)
@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_text"])
def test_a_hybrid_goes_the_whole_way(
    family: str, project: Project, grpo: GrpoProject, tmp_path: Path
) -> None:
    base = write_model(tmp_path / "base", family, vocab_size=VOCAB_SIZE, std=0.1)
    make_tokenizer(base)
    run, merged, peft = (tmp_path / name for name in ("run", "merged", "peft"))
    every = "lora={rank: 4, alpha: 8, dropout: 0.1}"
    layout = "parallel={tp: 2, sequence_parallel: true}"
    command = [each if each != LORA else every for each in sft(project, base, run)]
    sftrl(*command, layout, "optim.lr=0.02", ranks=2)
    losses = [row["loss"] for row in metrics_of(run)]
    assert losses[-1] < losses[0]
    export = ["convert", "to-hf", "--checkpoint", str(run)]
    said = sftrl(*export, "--out", str(merged), "--verify").stderr
    assert "verify: largest logit difference" in said
    said = sftrl(*export, "--out", str(peft), "--adapters").stderr
    assert ("PEFT over transformers 5 passes over" in said) == (family == "qwen3_next")
    weights, adapters = read_tensors(merged), read_tensors(peft)
    linear = {name for name in adapters if ".linear_attn." in name}
    assert len(linear) == 2 * (3 if family == "qwen3_next" else 5) * 2  # two layers, A and B
    for name, weight in read_tensors(base).items():
        inside = f"base_model.model.{name.removesuffix('.weight')}"
        if (down := adapters.get(f"{inside}.lora_A.weight")) is not None:
            weight = weight + SCALE * adapters[f"{inside}.lora_B.weight"] @ down
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-6, msg=name)
    for name, devices in {"beside": [], "apart": ["rollout.devices=1"]}.items():
        command = grpo_with_adapters(grpo, base, tmp_path / name)
        command = [each if each != LORA else every.replace("0.1", "0.0") for each in command]
        sftrl(*command, *devices, ranks=1 + len(devices))
        assert all(row["mismatch/max"] < 1e-4 for row in metrics_of(tmp_path / name))


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not here: bash tests/oracles.sh installs it")
@pytest.mark.skipif(not is_full(), reason=HOW_TO_RUN_ALL)
def test_vllm_samples_from_the_merged_adapters_of_every_step(grpo: GrpoProject, tmp_path: Path) -> None:
    # Heads of 32, the narrowest of vLLM's attention on the CPU.
    base = write_model(tmp_path / "base", "qwen2", vocab_size=VOCAB_SIZE, hidden_size=128)
    make_tokenizer(base)
    layout = ("parallel={tp: 2, sequence_parallel: true}", "rollout.engine=vllm", "rollout.vllm.tp=1")
    sftrl(*grpo_with_adapters(grpo, base, tmp_path / "run"), *layout, ranks=2)
    metrics = metrics_of(tmp_path / "run")
    assert [row["step"] for row in metrics] == [1, 2, 3]
    assert all(0 < row["mismatch/max"] < 1e-4 for row in metrics)
    # Weights of the step before would be off by what four updates have changed.
    assert all(0 < row["mismatch/probe"] < 1e-4 for row in metrics)


def grpo_with_adapters(grpo: GrpoProject, base: Path, run_dir: Path) -> list[str]:
    """The command of a run whose reference is the model with its adapters off."""
    model = ("model.architecture=null", f"model.hf={base}", LORA, "optim.lr=0.02")
    return grpo.command(run_dir, *model, "loss.kl_coefficient=0.1", "reference={kind: frozen}")


def test_what_does_not_fit_adapters_is_refused_by_name(
    project: Project, base: Path, trained: Path, tmp_path: Path
) -> None:
    full = sft(project, base, trained)
    full.remove(LORA)
    other = sft(project, base, trained, "lora.rank=2", "parallel={tp: 1}")
    ended = sftrl_each([full, other])
    said = [each.expect(2).stderr for each in ended]
    assert all("choose another run_dir" in each and "lora" in each for each in said), said
