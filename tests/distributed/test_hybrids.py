"""Hybrids of attention and gated delta nets: generation in flight; and the files of multimodal models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sftrl.apps.doctor.ranks import RankError
from tests.contract.models import save_versions
from tests.distributed.engine_outputs import engine_config
from tests.distributed.hf_models import CONFIGS
from tests.distributed.test_cached_generation import SAMPLING, Generated, assert_same, both_ways
from tests.distributed.test_conversion import export
from tests.grid import cases
from tests.hf_models import read_tensors
from tests.ranks import run_ranks

HYBRID = "qwen3_5_text"
# A prefix goes through its chunks, a new token through the recurrence: the same in fp32 up to rounding.
SAME_NATS = 5e-6
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "sp2": (2, {"tp": 2, "sequence_parallel": True}),
    "pp2": (2, {"pp": 2}),
}


def generated(directory: Path, parallel: dict[str, Any]) -> Generated:
    from megatron.core import parallel_state

    from megatron_sftrl.engine.parallel import initialize_parallel
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.models import architecture_of
    from tests.contract.rollout_contract import load

    config = engine_config(directory, parallel, "fp32")
    context = initialize_parallel(config.parallel)
    policy = PolicyEngine(architecture_of(config.model), config, context, with_optimizer=False)
    load(policy, directory)
    found = both_ways(policy)
    parallel_state.destroy_model_parallel()
    return found


@pytest.mark.parametrize("layout", cases(LAYOUTS, rarely=["sp2"]))
def test_states_follow_their_sequences(tmp_path: Path, layout: str) -> None:
    """Through a prompt's copies, and the slots that responses leave and others take."""
    world_size, parallel = LAYOUTS[layout]
    directory = save_versions(HYBRID, tmp_path, num_versions=1).directories[0]
    for each in run_ranks(world_size, generated, directory, parallel):
        assert each.num_cached_steps >= SAMPLING.max_new_tokens - 1
        assert_same(each.cached, each.again, layout, nats=SAME_NATS)
        lengths = {len(rollout.response_tokens) for group in each.cached for rollout in group.rollouts}
        assert len(lengths) > 1, "all responses have one length: blind to their ends"


def write_multimodal(name: str, directory: Path) -> None:
    """As it is published: the language model among a tower for images, and layers that draft tokens."""
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForImageTextToText

    text = language_model_of(name)
    sizes = {"hidden_size": 16, "intermediate_size": 16}
    vision = {
        "qwen3_5": {"depth": 1, "num_heads": 2, "out_hidden_size": 32, "num_position_embeddings": 16},
        "gemma3": {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 4},
    }
    vision["mistral3"] = {**vision["gemma3"], "head_dim": 8}
    text = {key: value for key, value in CONFIGS[text].items() if value is not None}
    text["tie_word_embeddings"] = name == "gemma3"
    tied = {"tie_word_embeddings": False} if name == "mistral3" else {}
    config = AutoConfig.for_model(name, text_config=text, vision_config={**sizes, **vision[name]}, **tied)
    torch.manual_seed(0)
    model: Any = AutoModelForImageTextToText.from_config(config)
    model.to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    model.save_pretrained(directory)
    tensors = read_tensors(directory)
    assert any(name.startswith(NOT_TEXT) for name in tensors)
    if name == "qwen3_5":
        save_file({**tensors, "mtp.fc.weight": torch.zeros(2)}, directory / "model.safetensors")


def language_model_of(name: str) -> str:
    return "mistral4" if name == "mistral3" else f"{name}_text"


NOT_TEXT = ("model.visual.", "mtp.", "vision_tower.", "multi_modal_projector.")


def convert(hf: Path, folder: Path, text_only: bool) -> None:
    from megatron.core import parallel_state

    from megatron_sftrl.apps.convert.from_hf import Layout, convert_from_hf
    from megatron_sftrl.config.schema import ParallelSection
    from megatron_sftrl.engine.parallel import initialize_parallel

    initialize_parallel(ParallelSection())
    try:
        checkpoint = convert_from_hf(
            hf,
            folder / "checkpoint",
            layout=Layout(tp=2, pp=2),
            dtype=None,
            allow_pickle=False,
            text_only=text_only,
            on_bytes=lambda done, total: None,
        )
        export(checkpoint, folder / "export")
    finally:
        parallel_state.destroy_model_parallel()


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("qwen3_5", "model.language_model."),
        ("gemma3", "language_model.model."),
        ("mistral3", "language_model.model."),
    ],
)
def test_the_language_model_of_a_multimodal_one_comes_back_bit_by_bit(
    tmp_path: Path, name: str, prefix: str
) -> None:
    import transformers

    hf = tmp_path / "hf"
    write_multimodal(name, hf)
    with pytest.raises(RankError, match=r"UserError.*--text-only"):
        run_ranks(1, convert, hf, tmp_path, False)
    run_ranks(1, convert, hf, tmp_path, True)
    written = read_tensors(tmp_path / "export")
    expected = {
        each.replace(prefix, "model.").removeprefix("language_model."): tensor
        for each, tensor in read_tensors(hf).items()
        if not each.startswith(NOT_TEXT)
    }
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[each], expected[each]) for each in expected)
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["model_type"] == language_model_of(name)
    tokens = torch.arange(70)[None]
    logits = []
    for path in (hf, tmp_path / "export"):
        kind = getattr(transformers, json.loads((path / "config.json").read_text())["architectures"][0])
        logits.append(kind.from_pretrained(path, dtype=torch.float32).eval()(tokens).logits)
    assert torch.equal(*logits)
