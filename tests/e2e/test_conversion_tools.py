"""Both conversion tools as a user types them, and a run that starts from model.hf."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml

from tests.e2e.conversion import GENERATION_CONFIG, TO_HF, TO_MEGATRON, publish, tools
from tests.e2e.product import run_product, sftrl, start_product
from tests.e2e.project import VOCAB_SIZE, Project, make_tokenizer, metrics_of, read_rows
from tests.hf_models import differing, read_tensors, write_model
from tests.ranks import close_ranks

CONVERT = ["-m", "megatron_sftrl", "convert"]
MESSAGES = [{"role": "user", "content": "2+2="}, {"role": "assistant", "content": "4"}]


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published model; read only."""
    return publish(tmp_path_factory.mktemp("published") / "hf")


@pytest.fixture(scope="module")
def checkpoint(hf: Path) -> Path:
    """`hf`, converted; read only."""
    out = hf.parent / "checkpoint"
    (done,) = tools([TO_MEGATRON, "--hf", hf, "--out", out, "--tp", "2"])
    done.expect(0)
    return out


def weight_dtypes(directory: Path) -> set[torch.dtype]:
    return {tensor.dtype for tensor in read_tensors(directory).values()}


def test_under_torchrun_both_tools_convert_and_verify(hf: Path, tmp_path: Path) -> None:
    """One as a script, one as a command: that both words start the same is in tests/unit/cli."""
    arguments = ("--hf", hf, "--out", tmp_path / "checkpoint", "--tp", "2", "--verify")
    said = run_product(*arguments, log=tmp_path / "log", ranks=2, program=[TO_MEGATRON])
    assert said.count("verify: largest logit difference") == 1
    assert "peak memory" in said
    arguments = ("--checkpoint", tmp_path / "checkpoint", "--out", tmp_path / "hf", "--max-file-gb", "2e-5")
    said = run_product(*arguments, "--verify", log=tmp_path / "log2", ranks=2, program=[*CONVERT, "to-hf"])
    assert said.count("verify: largest logit difference") == 1
    assert differing(read_tensors(hf), read_tensors(tmp_path / "hf")) == []
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    files = {path.name for path in (tmp_path / "hf").glob("*.safetensors")}
    assert len(files) > 1
    assert set(index["weight_map"].values()) == files


def test_what_travels_beside_the_weights_arrives(hf: Path, checkpoint: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    out = tmp_path / "hf"
    (done,) = tools([TO_HF, "--checkpoint", checkpoint, "--out", out])
    said = done.expect(0).stderr
    assert "generation_config.json, tokenizer.json" in said
    assert "no tokenizer" not in said
    assert (out / "generation_config.json").read_text() == GENERATION_CONFIG
    before, after = (
        json.loads((hf / "config.json").read_text()),
        json.loads((out / "config.json").read_text()),
    )
    assert after == before
    texts = [
        AutoTokenizer.from_pretrained(directory).apply_chat_template(MESSAGES, tokenize=False)
        for directory in (hf, out)
    ]
    assert texts[0] == texts[1] == "<|user|>2+2=<|assistant|>4<|end|>"


def test_weights_without_a_tokenizer_are_converted_and_it_is_said(hf: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(hf, bare, ignore=shutil.ignore_patterns("token*", "chat*", "special*"))
    both = tools(
        [TO_MEGATRON, "--hf", bare, "--out", tmp_path / "checkpoint"],
        [TO_HF, "--checkpoint", tmp_path / "checkpoint", "--out", tmp_path / "hf"],
    )
    assert all("no tokenizer came along" in done.expect(0).stderr for done in both)
    assert differing(read_tensors(bare), read_tensors(tmp_path / "hf")) == []


def test_dtypes_are_kept_or_chosen_on_both_ways(hf: Path, checkpoint: Path, tmp_path: Path) -> None:
    wide, out, narrow = tmp_path / "fp32", tmp_path / "fp32-hf", tmp_path / "fp16-hf"
    for done in tools(
        [TO_MEGATRON, "--hf", hf, "--out", wide, "--dtype", "fp32"],
        [TO_HF, "--checkpoint", wide, "--out", out],
        [TO_HF, "--checkpoint", checkpoint, "--out", narrow, "--dtype", "fp16", "--verify"],
    ):
        done.expect(0)
    published = read_tensors(hf)
    assert differing({name: tensor.float() for name, tensor in published.items()}, read_tensors(out)) == []
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    assert differing({name: tensor.half() for name, tensor in published.items()}, read_tensors(narrow)) == []
    assert weight_dtypes(narrow) == {torch.float16}
    assert json.loads((narrow / "config.json").read_text())["dtype"] == "float16"


def swap_gate_and_up() -> None:
    """An export that writes the gate's rows under the name of the other half, and these under the gate's."""
    from megatron_sftrl.engine.checkpoint import converted

    right = converted.fill_whole

    def wrong(whole, name, tensor, read_into):
        names = [run.name for run in tensor.rows]
        swapped = dict(zip(names, reversed(names), strict=True)) if len(names) == 2 else {}
        right(whole, swapped.get(name, name), tensor, read_into)

    converted.fill_whole = wrong


def test_verify_finds_two_swapped_tensors(checkpoint: Path, tmp_path: Path) -> None:
    (done,) = tools(
        [TO_HF, "--checkpoint", checkpoint, "--out", tmp_path / "hf", "--verify"], plant=swap_gate_and_up
    )
    close_ranks()  # the next test gets a process without the plant
    assert "more than rounding; do not use the result" in done.expect(2).stderr


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 200 MB, so that a conversion takes long enough to be killed in its middle."""
    sizes = {"hidden_size": 1024, "vocab_size": 32_000, "intermediate_size": 2048, "num_hidden_layers": 4}
    return write_model(
        tmp_path_factory.mktemp("large") / "hf", "llama", dtype=torch.bfloat16, std=0.02, **sizes
    )


def test_a_killed_conversion_leaves_nothing_under_the_name_and_can_be_repeated(
    large: Path, tmp_path: Path
) -> None:
    checkpoint, back = tmp_path / "checkpoint", tmp_path / "back"
    there = ("--hf", large, "--out", checkpoint)
    kill_while_writing(TO_MEGATRON, there, checkpoint, "*.distcp", tmp_path / "log")
    (done,) = tools([TO_MEGATRON, *there])
    done.expect(0)
    home = ("--checkpoint", checkpoint, "--out", back)
    kill_while_writing(TO_HF, (*home, "--max-file-gb", "0.05"), back, "*.safetensors", tmp_path / "log2")
    (done,) = tools([TO_HF, *home])
    done.expect(0)
    assert differing(read_tensors(large), read_tensors(back)) == []
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def kill_while_writing(tool: str, arguments: Sequence[object], out: Path, pattern: str, log: Path) -> None:
    """SIGKILL once a file of that pattern has content; the output must not have its name then."""
    temporary = out.parent / f".{out.name}.tmp"
    with start_product(*map(str, arguments), log=log, program=[tool]) as started:
        while not any(path.stat().st_size for path in temporary.glob(pattern)):
            assert started.is_running, started.output()
            time.sleep(0.002)
        started.kill()
    assert not out.exists()
    assert temporary.exists()


def test_a_run_starts_from_a_hugging_face_directory_and_its_export_has_the_trained_loss(
    project: Project, tmp_path: Path
) -> None:
    directory, run_dir, out = tmp_path / "hf", tmp_path / "run", tmp_path / "export"
    write_model(directory, "qwen3", vocab_size=VOCAB_SIZE, tie_word_embeddings=True)
    make_tokenizer(directory)
    (directory / "generation_config.json").write_text(GENERATION_CONFIG)
    config = yaml.safe_load(project.yaml.read_text())
    rows = read_rows(project.train)
    del config["tokenizer"], config["reference"]  # the tokenizer is that of model.hf
    config |= {
        "run_dir": str(run_dir),
        "model": {"hf": str(directory), "dtype": "fp32"},
        "loss": {"name": "sft"},
        "batch": {"global_size": len(rows), "micro_size": 9},  # a step is all rows, in whatever order
        "train": {"steps": 3},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    sftrl("sft", tmp_path / "run.yaml", "parallel.tp=2", ranks=2)
    (done,) = tools([TO_HF, "--checkpoint", run_dir, "--out", out, "--verify"])
    done.expect(0)
    metrics = metrics_of(run_dir)
    # fp32 rounding of losses near 5 nats in two implementations; a step of training changes them by 1e-2.
    assert metrics[0]["loss"] == pytest.approx(transformers_loss(directory, rows), rel=1e-5)
    held_out = read_rows(project.valid)
    assert metrics[-1]["valid/nll"] == pytest.approx(transformers_loss(out, held_out), rel=1e-5)
    assert abs(transformers_loss(directory, held_out) - metrics[-1]["valid/nll"]) > 0.01
    assert (out / "generation_config.json").read_text() == GENERATION_CONFIG


@torch.no_grad()
def transformers_loss(directory: Path, rows: list[dict]) -> float:
    """Mean negative log-likelihood over the responses and their end tokens, everything by transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    losses = []
    for row in rows:
        messages = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["response"]},
        ]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
        logits = model(ids[None, :-1]).logits[0].double()
        learned = len(row["response"]) + 1
        losses.append(torch.nn.functional.cross_entropy(logits[-learned:], ids[-learned:], reduction="none"))
    return float(torch.cat(losses).mean())
