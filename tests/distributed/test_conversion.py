"""Hugging Face -> Megatron -> Hugging Face gives back every bit of every tensor.

Two ways lead there: the tools, which never build a model, and the engine, which loads the files into a model
and saves a training checkpoint of it. Wanted is every family at tp 1/2, pp 1/2, vp 2, ep 2
(mixtures), tied and untied, vocabulary padded or not, in bf16, fp32 and fp16, from one file and from several.
All products of these would take minutes and say no more than a set that covers

- each family with each way and each axis: tp 1 and 2, pp 1 and 2, vp 2, and ep 2 for the mixtures;
- each dtype with each way, tied and untied at tp 2 and at pp 2;
- a vocabulary that tp 2 pads (101) and one that it does not (102), in both ways.
"""

from __future__ import annotations

import functools
import json
import resource
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_sftrl.apps.convert.from_hf import Layout, convert_from_hf
from megatron_sftrl.apps.convert.to_hf import convert_to_hf
from megatron_sftrl.config.schema import RunConfig
from megatron_sftrl.errors import UserError
from megatron_sftrl.models.hf_config import from_hf_config
from tests.distributed.test_layouts import VOCAB_SIZE, step_batches
from tests.grid import cases
from tests.hf_models import FAMILIES, differing, read_tensors, write_model
from tests.ranks import run_ranks

MIXTURES = ("mixtral", "qwen3_moe")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
FILE_BYTES = 30_000
"""Of an exported file: a few files and an index in each export."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model directory."""

    name: str
    dtype: str = "fp32"
    max_shard_size: str = "1GB"
    changes: dict = field(default_factory=dict)


def convert_there_and_back(hf: Path, folder: Path, layouts: list[Layout]) -> None:
    """The tools' own functions, on every rank: a checkpoint and an export for each layout."""
    from megatron.core import parallel_state

    from megatron_sftrl.config.schema import ParallelSection
    from megatron_sftrl.engine.parallel import initialize_parallel

    initialize_parallel(ParallelSection())
    try:
        for number, layout in enumerate(layouts):
            checkpoint = convert_from_hf(
                hf,
                folder / f"checkpoint-{number}",
                layout=layout,
                dtype=None,
                allow_pickle=False,
                on_bytes=lambda done, total: None,
            )
            export(checkpoint, folder / f"export-{number}")
    finally:
        parallel_state.destroy_model_parallel()


def export(checkpoint: Path, out: Path, dtype: torch.dtype | None = None) -> Path:
    return convert_to_hf(
        checkpoint, out, dtype=dtype, max_file_bytes=FILE_BYTES, on_bytes=lambda done, total: None
    )


def run_config(hf: Path, parallel: dict, dtype: str) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run_dir": "unused",
            "model": {"hf": hf, "dtype": dtype},
            "tokenizer": {"path": "unused"},
            "parallel": parallel,
            "data": {"train": ["unused"], "max_length": 64},
            "batch": {"global_size": 8},
            "loss": {"name": "sft"},
            "optim": {"lr": 0.01},
            "train": {"steps": 3},
        }
    )


def load_train_and_export(
    hf: Path, folder: Path, parallel: dict, dtypes: tuple[str, str], num_steps: int
) -> list[float]:
    """On every rank: files -> model -> `num_steps` of training -> checkpoint with optimizer -> files.

    Args:
        hf: the files.
        folder: gets checkpoints/ and export/.
        parallel: layout.
        dtypes: of the training, and of the files.
        num_steps: 0 for the loaded weights themselves.
    Returns:
        The trainer's nll of the batches of steps 0, 1, ... num_steps, before each of them.
    """
    from megatron.core import parallel_state

    from megatron_sftrl.engine.checkpoint import CheckpointStore, TrainerState
    from megatron_sftrl.engine.live_weights import load_hf_weights
    from megatron_sftrl.engine.parallel import initialize_parallel
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.losses.registry import build_loss
    from megatron_sftrl.models import architecture_of
    from megatron_sftrl.models.hf_weights import open_weights

    config = run_config(hf, parallel, dtypes[0])
    context = initialize_parallel(config.parallel)
    architecture = architecture_of(config.model)
    policy = PolicyEngine(architecture, config, context)
    with open_weights(hf) as weights:
        load_hf_weights(policy.chunks, weights, architecture, context)
    policy.reload_optimizer_weights()
    loss, found = build_loss("sft", {}), []
    deal = functools.partial(
        step_batches,
        num_groups=context.dp_size,
        group=context.dp_rank,
        multiple=context.tp_size,
        num_microbatches=2,
    )
    for step in range(num_steps):
        found.append(policy.forward_backward(deal(step), loss).metrics["nll"])
        policy.optim_step(step, num_steps=num_steps)
    if num_steps:
        found.append(policy.evaluate(deal(num_steps), loss).metrics["nll"])
    store = CheckpointStore(folder / "checkpoints", context, keep_last=1)
    checkpoint = store.save(TrainerState(step=num_steps), policy, None)
    out_dtype = None if dtypes[0] == dtypes[1] else DTYPES[dtypes[1]]
    export(checkpoint, folder / "export", out_dtype)
    parallel_state.destroy_model_parallel()
    return found


TOOLS = {
    "llama": Source(name="llama", dtype="bf16", changes={"vocab_size": 102}),
    "mistral": Source(name="mistral", dtype="fp16", max_shard_size="20KB"),
    "qwen2": Source(name="qwen2", max_shard_size="20KB", changes={"tie_word_embeddings": True}),
    "qwen3": Source(name="qwen3", dtype="bf16", max_shard_size="20KB"),
    "mixtral": Source(name="mixtral", dtype="bf16", changes={"tie_word_embeddings": True}),
    "qwen3_moe": Source(name="qwen3_moe", max_shard_size="20KB"),
}
assert set(TOOLS) == set(FAMILIES)


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("family", TOOLS)
def test_the_tools_give_back_every_bit(family: str, num_processes: int, tmp_path: Path) -> None:
    source = TOOLS[family]
    hf = write_model(
        tmp_path / "hf",
        source.name,
        dtype=DTYPES[source.dtype],
        max_shard_size=source.max_shard_size,
        **source.changes,
    )
    # The number of processes and the layout are independent of each other.
    layouts = [Layout(), Layout(tp=2, pp=2)] if num_processes == 1 else [Layout(tp=2), Layout(pp=2)]
    if family in MIXTURES:
        layouts.append(Layout(tp=2, pp=num_processes, ep=2))
    run_ranks(num_processes, convert_there_and_back, hf, tmp_path, layouts)
    expected = read_tensors(hf)
    assert (hf / "model.safetensors.index.json").exists() == (source.max_shard_size == "20KB")
    for number in range(len(layouts)):
        found = tmp_path / f"export-{number}"
        assert differing(expected, read_tensors(found)) == [], layouts[number]
        assert (found / "model.safetensors.index.json").exists()


OTHER_FAMILIES = {
    "gemma3_text": Layout(tp=2, pp=2),
    "glm4_moe": Layout(tp=2, pp=2, ep=2),
    "gpt_oss": Layout(pp=2, ep=2),
    "mistral4": Layout(tp=2, pp=2, ep=2),
    "minimax_m2": Layout(tp=2, pp=2, ep=2),
    "phi3_longrope": Layout(tp=2, pp=2),
    "qwen3_5_text": Layout(tp=2, pp=2),
    "qwen3_5_moe_text": Layout(tp=2, pp=2, ep=2),
    "qwen3_next": Layout(tp=2, pp=2, ep=2),
}


@pytest.mark.parametrize(
    "family", cases(OTHER_FAMILIES, rarely=OTHER_FAMILIES.keys() - {"gemma3_text", "qwen3_next"})
)
def test_the_tools_give_back_every_bit_of_blocks_of_another_kind(family: str, tmp_path: Path) -> None:
    hf = write_model(tmp_path / "hf", family, dtype=torch.bfloat16)
    run_ranks(1, convert_there_and_back, hf, tmp_path, [OTHER_FAMILIES[family]])
    assert differing(read_tensors(hf), read_tensors(tmp_path / "export-0")) == []
    assert from_hf_config(tmp_path / "export-0") == from_hf_config(hf)
    sets = [json.loads((each / "config.json").read_text()) for each in (hf, tmp_path / "export-0")]
    assert sets[0]["rope_parameters"] == sets[1]["rope_parameters"]


# Of a published config.json what counts layers that draft tokens, and what an export has for vLLM, which
# chooses its router by it and which transformers does not write.
PUBLISHED: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "deepseek_v3": (
        {"num_nextn_predict_layers": 1},
        {"num_nextn_predict_layers": 0, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    ),
    "minimax_m2_published": (
        {"num_mtp_modules": 1},
        {"num_mtp_modules": 0, "rotary_dim": 4, "scoring_func": "sigmoid", "use_routing_bias": True},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_comes_back_with_every_bit_in_bf16_and_without_what_is_not_trained(
    tmp_path: Path, name: str
) -> None:
    """Matrices of 8 bits with scales by blocks, layers that draft tokens, the name of its own code."""
    asked, exported_keys = PUBLISHED[name]
    hf = write_model(tmp_path / "hf", name, dtype=torch.bfloat16, num_hidden_layers=4)
    tensors, expected = read_tensors(hf), read_tensors(hf)
    tensors["model.layers.4.eh_proj.weight"] = torch.ones(8, 8)
    block, ends = 16, ("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight")
    for name in [each for each in expected if each.endswith(ends)]:
        values = expected[name].float()
        rows, columns = (torch.arange(size) // block for size in values.shape)
        scales = torch.rand(int(rows[-1]) + 1, int(columns[-1]) + 1) * 1e-2
        each = scales[rows][:, columns]
        tensors[name] = (values / each).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scales
        expected[name] = (tensors[name].float() * each).bfloat16()
    save_file(tensors, hf / "model.safetensors", {"format": "pt"})
    config = json.loads((hf / "config.json").read_text())
    quantised = {"quant_method": "fp8", "fmt": "float8_e4m3fn", "weight_block_size": [block, block]}
    config["quantization_config"] = quantised
    config |= {**asked, "auto_map": {"AutoModel": "modeling_own.Model"}}
    (hf / "config.json").write_text(json.dumps(config))

    run_ranks(1, convert_there_and_back, hf, tmp_path, [Layout(tp=2, pp=2, ep=2)])
    assert differing(expected, read_tensors(tmp_path / "export-0")) == []
    exported = json.loads((tmp_path / "export-0" / "config.json").read_text())
    assert not {"quantization_config", "auto_map"} & exported.keys()
    assert exported_keys.items() <= exported.items()


def convert_on_full_disks(hf: Path, folder: Path) -> list[str]:
    """What the user is told where no file may grow beyond 20 kB, there and back."""
    limits, said = resource.getrlimit(resource.RLIMIT_FSIZE), []
    convert_there_and_back(hf, folder, [Layout()])
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        for work in (
            lambda: convert_there_and_back(hf, folder / "full", [Layout()]),
            lambda: export(folder / "checkpoint-0", folder / "full" / "export-0"),
        ):
            with pytest.raises(UserError) as caught:
                work()
            said.append(str(caught.value))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return [*said, *map(str, (folder / "full").iterdir())]


def test_a_disk_that_fills_up_is_told_as_the_users_error_and_nothing_is_left(tmp_path: Path) -> None:
    hf = write_model(tmp_path / "hf", "llama")
    [said] = run_ranks(1, convert_on_full_disks, hf, tmp_path)
    assert len(said) == 2
    assert all("File too large" in each for each in said)


SEQUENCE = {"tp": 2, "sequence_parallel": True}
DEEPSEEK = Source(name="deepseek_v3", dtype="bf16", changes={"num_hidden_layers": 4})
MISTRAL4 = Source(name="mistral4", dtype="bf16", changes={"num_hidden_layers": 4}, max_shard_size="20KB")
MINIMAX_M2 = Source(name="minimax_m2", dtype="bf16", max_shard_size="20KB")
ENGINE = {
    "llama tp2": (2, {"tp": 2}, "bf16", Source(name="llama", dtype="bf16")),
    "llama tied pp2 vp2": (
        2,
        {"pp": 2, "vp": 2},
        "fp32",
        Source(name="llama_tied", changes={"num_hidden_layers": 4, "vocab_size": 102}),
    ),
    "mistral pp2, fp16 files": (2, {"pp": 2}, "fp32", Source(name="mistral", dtype="fp16")),
    "mistral vp2": (
        2,
        {"pp": 2, "vp": 2},
        "bf16",
        Source(name="mistral", dtype="bf16", changes={"num_hidden_layers": 4}),
    ),
    "qwen2 tied tp2, several files": (
        2,
        {"tp": 2},
        "fp32",
        Source(name="qwen2", max_shard_size="20KB", changes={"tie_word_embeddings": True}),
    ),
    "qwen2 pp2": (2, {"pp": 2}, "fp32", Source(name="qwen2")),
    "qwen3 1 + 3 layers": (
        2,
        {"pp": 2, "first_stage_layers": 1},
        "fp32",
        Source(name="qwen3", changes={"num_hidden_layers": 4}),
    ),
    "qwen2 tied vp2": (2, {"pp": 2, "vp": 2}, "bf16", Source(name="qwen2_window", dtype="bf16")),
    "qwen3 tp2, sharded optimizer": (
        2,
        {"tp": 2, "sequence_parallel": True},
        "bf16",
        Source(name="qwen3", dtype="bf16"),
    ),
    "qwen3 one process": (1, {}, "fp32", Source(name="qwen3")),
    "qwen3 dp2": (2, {"distributed_optimizer": True}, "bf16", Source(name="qwen3", dtype="bf16")),
    "qwen3 vp2": (2, {"pp": 2, "vp": 2}, "fp32", Source(name="qwen3_window")),
    "mixtral ep2": (2, {"ep": 2}, "bf16", Source(name="mixtral", dtype="bf16")),
    "mixtral tp2": (2, SEQUENCE, "fp32", Source(name="mixtral", max_shard_size="20KB")),
    "mixtral tied pp2": (
        2,
        {"pp": 2},
        "fp32",
        Source(name="mixtral", changes={"tie_word_embeddings": True}),
    ),
    "qwen3_moe ep2, fp16 files": (2, {"ep": 2}, "fp32", Source(name="qwen3_moe", dtype="fp16")),
    "qwen3_moe tp2 etp1 ep2": (2, {**SEQUENCE, "etp": 1, "ep": 2}, "fp32", Source(name="qwen3_moe")),
    "deepseek_v3 tp2 ep2": (2, {**SEQUENCE, "etp": 1, "ep": 2}, "bf16", DEEPSEEK),
    "deepseek_v3 vp2": (2, {"pp": 2, "vp": 2}, "bf16", DEEPSEEK),
    "mistral4 tp2 ep2": (2, {**SEQUENCE, "etp": 1, "ep": 2}, "bf16", MISTRAL4),
    "mistral4 vp2": (2, {"pp": 2, "vp": 2}, "bf16", MISTRAL4),
    "minimax_m2 tp2 ep2": (2, {**SEQUENCE, "etp": 1, "ep": 2}, "bf16", MINIMAX_M2),
    "qwen3_moe vp2": (
        2,
        {"pp": 2, "vp": 2},
        "bf16",
        Source(name="qwen3_moe", dtype="bf16", changes={"num_hidden_layers": 4}),
    ),
}


@pytest.mark.parametrize("case", ENGINE)
def test_a_model_loaded_from_the_files_and_saved_as_a_training_checkpoint_gives_back_every_bit(
    case: str, tmp_path: Path
) -> None:
    num_processes, parallel, dtype, source = ENGINE[case]
    hf = write_model(
        tmp_path / "hf",
        source.name,
        dtype=DTYPES[source.dtype],
        max_shard_size=source.max_shard_size,
        **source.changes,
    )
    run_ranks(num_processes, load_train_and_export, hf, tmp_path, parallel, (dtype, source.dtype), 0)
    # Shapes too: the vocabulary of the config, whatever padding the layout needed.
    assert differing(read_tensors(hf), read_tensors(tmp_path / "export")) == []


@pytest.mark.parametrize("name", ["qwen2_window", "qwen3"])
def test_a_checkpoint_of_a_trained_model_exports_with_the_loss_that_the_trainer_saw(
    name: str, tmp_path: Path
) -> None:
    hf = write_model(tmp_path / "hf", name)
    parallel = {"tp": 2, "pp": 2}
    losses = run_ranks(4, load_train_and_export, hf, tmp_path, parallel, ("fp32", "fp32"), 3)[0]
    before, after = transformers_loss(hf, 0), transformers_loss(tmp_path / "export", 3)
    # fp32 rounding of a loss near 5 nats: 2e-7 of it (measured), far below what a step changes.
    assert losses[0] == pytest.approx(before, rel=1e-5)
    assert losses[3] == pytest.approx(after, rel=1e-5)
    assert abs(transformers_loss(hf, 3) - after) > 0.01, "the export holds the weights before training"


@torch.no_grad()
def transformers_loss(directory: Path, step: int) -> float:
    """Mean negative log-likelihood, nats, of the loss tokens of a step's batch, each sequence run alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    total = 0.0
    for batch in step_batches(step, num_groups=1, group=0, multiple=1, num_microbatches=1):
        assert int(batch.tokens.max()) < VOCAB_SIZE
        for start, stop in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
            rows = slice(start, stop)
            logits = model(batch.tokens[None, rows]).logits[0].double()
            nll = torch.nn.functional.cross_entropy(logits, batch.labels[rows], reduction="none")
            total += float((nll * batch.token_weight[rows]).sum())
    return total
