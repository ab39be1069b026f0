"""`sftrl convert to-hf --adapters`: PEFT loads the directory, and has our numbers; `lora.start` reads it."""

from __future__ import annotations

import importlib.util
import itertools
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_sftrl.apps.convert.adapters import passed_over_by_peft
from tests.contract.models import VOCAB_SIZE, save_versions
from tests.distributed.hf_models import auto_model, save_model
from tests.distributed.test_layouts import step_batches
from tests.distributed.test_lora import losses_of, policy_over
from tests.grid import cases
from tests.hf_models import read_tensors
from tests.ranks import run_ranks

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="peft is not here: bash tests/oracles.sh installs it"
)

LORA = {"rank": 4, "alpha": 6}
SP2 = {"tp": 2, "sequence_parallel": True}
WHOLE = {"modules_to_save": ["embed_tokens", "lm_head"]}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj", "out_proj"]
CASES: dict[str, tuple[str, dict, dict]] = {
    "q, k and v in one": ("phi3", SP2, {}),
    "experts": ("qwen3_moe", {"ep": 2}, {}),
    "experts of a mixtral": ("mixtral", {"pp": 2}, {"targets": ["w1", "w2", "w3"]}),
    "experts of a minimax": ("minimax_m2", {"pp": 2}, {"targets": ["q_proj", "w1", "w2", "w3"]}),
    "a hybrid": ("qwen3_5_text", SP2, {}),
    "a hybrid with experts": (
        "qwen3_next",
        {"pp": 2},
        {"targets": [*ATTENTION, "in_proj_qkvz", "in_proj_ba"]},
    ),
    "a hybrid with experts of a Qwen3.5": (
        "qwen3_5_moe_text",
        {"ep": 2},
        {"targets": [*ATTENTION, "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"]},
    ),
    "embedding and head": ("qwen3", SP2, {**WHOLE, "targets": ["q_proj", "up_proj"]}),
}
"""Model, layout, section."""
SELDOM = [
    *("experts of a mixtral", "experts of a minimax"),
    *("a hybrid with experts", "a hybrid with experts of a Qwen3.5"),
]


IN_PART = ["qwen2_moe", "glm4_moe", "qwen3_next", "qwen3_5_moe_text"]
MLP = ["gate_proj", "up_proj", "down_proj"]


def saved(directory: Path, parallel: dict, lora: dict, checkpoints: Path) -> Tensor:
    """The losses of a policy with adapters, and a checkpoint of it; runs on every rank."""
    from megatron.core import parallel_state

    from megatron_sftrl.engine.checkpoint import CheckpointStore, TrainerState
    from megatron_sftrl.engine.lora import whole_weights
    from megatron_sftrl.engine.policy import Base
    from megatron_sftrl.models.hf_weights import open_weights
    from megatron_sftrl.trainers.origins import hash_of_weights

    policy, _ = policy_over(directory, parallel, lora)
    with torch.no_grad():
        for weight in whole_weights(policy.chunks):
            weight.mul_(0.5)
    policy.reload_optimizer_weights()
    with open_weights(directory) as weights:
        policy.base = Base(path=str(directory), weights=hash_of_weights(directory, weights))
    with CheckpointStore(checkpoints, policy.parallel, keep_last=1) as store:
        store.save(TrainerState(step=1), policy, None)
    losses = losses_of(policy, is_one_group=True)
    parallel_state.destroy_model_parallel()
    return losses


def export(checkpoints: Path, out: Path) -> None:
    from megatron.core import parallel_state

    from megatron_sftrl.apps.convert.adapters import convert_to_peft
    from megatron_sftrl.config.schema import ParallelSection
    from megatron_sftrl.engine.parallel import initialize_parallel

    initialize_parallel(ParallelSection())
    convert_to_peft(checkpoints / "step-00000001", out)
    parallel_state.destroy_model_parallel()


def started(directory: Path, lora: dict, start: Path) -> list[Tensor]:
    """The losses of a policy with this start; after an update, those of its reference, too."""
    from megatron.core import parallel_state

    from megatron_sftrl.config.schema import ReferenceSection
    from megatron_sftrl.engine.lora import trained_weights
    from megatron_sftrl.engine.policy import Base
    from megatron_sftrl.engine.reference import SharedReference
    from megatron_sftrl.trainers.adapters import load_start, open_start

    policy, config = policy_over(directory, {}, {**lora, "start": start})
    policy.base = Base(path=str(directory), weights="of the test")
    with open_start(config, policy.architecture) as weights:
        load_start(policy, config, weights)
    reference = SharedReference(
        ReferenceSection(kind="frozen"), policy.parallel, policy.chunks, keeps_start=True
    )
    first = losses_of(policy, is_one_group=True)
    with torch.no_grad():
        for weight in trained_weights(policy.chunks):
            weight.mul_(2)
    both = losses_of(policy, reference, is_one_group=True)
    parallel_state.destroy_model_parallel()
    return [first, both]


def with_adapter(directory: Path, adapter: Path) -> Any:
    """PEFT's model, which has found every tensor that it wants and wanted every one that it found."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="sdpa")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys.*")
        return PeftModel.from_pretrained(base, str(adapter)).eval()


def peft_losses(directory: Path, adapter: Path) -> Tensor:
    model, found = with_adapter(directory, adapter), []
    with torch.no_grad():
        for batch in step_batches(0, num_groups=1, group=0, multiple=2, num_microbatches=2):
            for start, stop in itertools.pairwise(batch.cu_seqlens.tolist()):
                logits = model(batch.tokens[None, start:stop]).logits[0].log_softmax(-1)
                found.append(logits.gather(1, batch.labels[start:stop, None])[:, 0])
    return torch.cat(found)


@pytest.mark.parametrize("name", cases(CASES, rarely=SELDOM))
def test_peft_has_our_numbers_and_a_run_goes_on_from_its_directory(name: str, tmp_path: Path) -> None:
    model, parallel, section = CASES[name]
    base, out, lora = tmp_path / "base", tmp_path / "peft", {**LORA, **section}
    save_model(model, base)
    ranks = run_ranks(2, saved, base, parallel, lora, tmp_path / "checkpoints")
    ours = next(losses for losses in reversed(ranks) if losses.numel())[0]
    run_ranks(1, export, tmp_path / "checkpoints", out)
    torch.testing.assert_close(ours, peft_losses(base, out), rtol=0, atol=1e-5 * float(ours.abs().max()))
    (seen,) = run_ranks(1, started, base, lora, out)
    first, both = seen
    torch.testing.assert_close(first[0], ours, rtol=0, atol=1e-5 * float(ours.abs().max()))
    assert torch.equal(both[1], first[0]), "the frozen reference has moved"
    assert (both[0] - both[1]).abs().max() > 0.1


@pytest.mark.parametrize("family", cases(IN_PART, rarely=["qwen2_moe", "glm4_moe", "qwen3_next"]))
def test_of_experts_beside_others_peft_passes_over_what_is_said(family: str, tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "peft"
    save_model(family, base)
    run_ranks(1, saved, base, {}, {**LORA, "targets": MLP}, tmp_path / "checkpoints")
    run_ranks(1, export, tmp_path / "checkpoints", out)
    adapters = {name.removeprefix("base_model.model."): each for name, each in read_tensors(out).items()}
    passed_over, weights = passed_over_by_peft(adapters, family), read_tensors(base)
    assert passed_over
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if (down := adapters.get(f"{module}.lora_A.weight")) is not None and module not in passed_over:
            weights[name] = weight + 1.5 * adapters[f"{module}.lora_B.weight"] @ down
    (tmp_path / "loaded").mkdir()
    shutil.copy(base / "config.json", tmp_path / "loaded")
    save_file(weights, tmp_path / "loaded" / "model.safetensors", metadata={"format": "pt"})
    loaded = auto_model().from_pretrained(tmp_path / "loaded", dtype=torch.float32).eval()
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        theirs, ours = with_adapter(base, out)(tokens).logits, loaded(tokens).logits
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5 * float(ours.abs().max()))


def answered_by_vllm(directory: Path, adapter: Path, prompts: list[list[int]]) -> list[tuple[list, list]]:
    """Greedy tokens with vLLM's own LoRA, and their log-probabilities; it has none of prompts on the CPU."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    engine = LLM(
        str(directory),
        skip_tokenizer_init=True,
        dtype="float32",
        enable_lora=True,
        max_lora_rank=8,
        max_model_len=64,
        max_num_seqs=len(prompts),
        kv_cache_memory_bytes=2**24,
        enforce_eager=True,
        enable_prefix_caching=False,
        logprobs_mode="raw_logprobs",
    )
    asked: list[Any] = [{"prompt_token_ids": tokens} for tokens in prompts]
    sampling = SamplingParams(temperature=0, max_tokens=8, logprobs=0, detokenize=False, ignore_eos=True)
    ours = LoRARequest("ours", 1, str(adapter))
    found = []
    for answer in engine.generate(asked, sampling, lora_request=ours, use_tqdm=False):
        (output,) = answer.outputs
        tokens, told = [*output.token_ids], output.logprobs
        assert told is not None
        found.append((tokens, [said[token].logprob for token, said in zip(tokens, told, strict=True)]))
    return found


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not here")
@pytest.mark.parametrize("model", cases(["qwen3"], rarely=["qwen3"]))
def test_vllm_reads_the_directory_with_its_own_lora(model: str, tmp_path: Path) -> None:
    (base,) = save_versions(model, tmp_path, num_versions=1).directories
    checkpoints, out = tmp_path / "checkpoints", tmp_path / "peft"
    run_ranks(1, saved, base, {}, LORA, checkpoints)
    run_ranks(1, export, checkpoints, out)
    drawn = torch.randint(VOCAB_SIZE, (3, 20), generator=torch.Generator().manual_seed(0)).tolist()
    (answers,) = run_ranks(1, answered_by_vllm, base, out, drawn, timeout_s=300)
    adapted = with_adapter(base, out)
    for prompt, (tokens, logprobs) in zip(drawn, answers, strict=True):
        with torch.no_grad():
            rows = adapted(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
        ours = rows.double().log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logprobs).double(), ours, rtol=0, atol=1e-5)
