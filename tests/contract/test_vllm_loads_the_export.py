"""vLLM loads what we export, with no code of ours, and says what transformers says of the original."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from megatron_sftrl.apps.convert.from_hf import Layout
from tests.contract.models import EXPERTS, longrope
from tests.distributed.hf_models import ORIGINAL_LENGTH
from tests.distributed.test_conversion import convert_there_and_back
from tests.grid import is_full
from tests.hf_models import write_model
from tests.ranks import run_ranks

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not here: bash tests/oracles.sh installs it"
)

# Heads of 32: the smallest that vLLM's attention for the CPU knows.
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 8 * ORIGINAL_LENGTH,
}
MODELS: dict[str, tuple[str, dict]] = {
    "qwen2": ("qwen2", {}),
    "llama tied": ("llama_tied", {}),
    "llama with yarn rope": ("llama_yarn", {}),
    "ministral3": ("ministral3", {}),  # vLLM reads a key that transformers does not write
    "deepseek_v3": ("deepseek_v3", EXPERTS["deepseek_v3"]),  # as well
    "qwen3_moe": ("qwen3_moe", {"moe_intermediate_size": 64}),
}
if is_full():
    MODELS |= {
        "qwen3": ("qwen3", {}),
        "llama with llama3 rope": ("llama_llama3", {}),
        "mixtral": ("mixtral", {"intermediate_size": 64}),
        "glm4_moe": ("glm4_moe", {"moe_intermediate_size": 64}),
        "minimax_m2": ("minimax_m2", {"intermediate_size": 64, "rotary_dim": 16}),
        "gpt_oss": ("gpt_oss", {"intermediate_size": 64, "swiglu_limit": 7.0}),
        "granite": ("granite", {}),
        "phi3": ("phi3", {}),
        # Up to its original length: a longer engine takes long_factor.
        "phi3_longrope": ("phi3_longrope", longrope(4 * ORIGINAL_LENGTH)),
        "glm4": ("glm4", {}),
        "gemma3_text": ("gemma3_text", {}),
        "olmo3": ("olmo3", {}),
        "smollm3": ("smollm3", {}),
        "olmo2": ("olmo2", {}),
        "qwen2_moe": ("qwen2_moe", EXPERTS["qwen2_moe"]),
    }
# One shorter than a block of vLLM's cache, others of several; the last beyond the ropes' original length.
LENGTHS = (5, 40, 2 * ORIGINAL_LENGTH)
NUM_NEW = 12
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GB; its default wants nearly all of the memory
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_MLA_DISABLE": "1",  # its latent attention on the CPU does not know fp32
}


@dataclass(frozen=True)
class Scored:
    """A response and the log-probabilities of every token but the prompt's first, nats."""

    tokens: list[int]
    logprobs: list[float]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each model as transformers wrote it (original/) and after a conversion there and back (export-0/)."""
    root = tmp_path_factory.mktemp("vllm")
    for name, (base, changes) in MODELS.items():
        # Logits of about 1: fp32 can tell log-probs of 5 nats apart to 5e-7, those of 20 to 2e-6 only.
        original = write_model(root / name / "original", base, std=0.1, **{**SIZES, **changes})
        run_ranks(1, convert_there_and_back, original, root / name, [Layout(pp=2)])
    return root


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(101, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def answers(root: Path, prompts: list[list[int]]) -> dict[str, list[dict]]:
    """vLLM's scores of every export, from one process: each start costs seconds of imports."""
    request, answer = root / "request.json", root / "answer.json"
    directories = [str(root / name / "export-0") for name in MODELS]
    request.write_text(json.dumps({"directories": directories, "prompts": prompts, "num_new": NUM_NEW}))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("vllm_scores.py")), str(request), str(answer)],
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": ""},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads(answer.read_text())


@torch.no_grad()
def transformers_scores(directory: Path, prompts: list[list[int]]) -> list[Scored]:
    """Greedy responses, the whole sequence run anew for each token; the scores in float64 at the end."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    found = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(NUM_NEW):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        logprobs = model(torch.tensor([tokens])).logits[0, :-1].double().log_softmax(-1)
        labels = torch.tensor(tokens[1:])[:, None]
        found.append(Scored(tokens[len(prompt) :], logprobs.gather(1, labels)[:, 0].tolist()))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_vllm_gives_transformers_greedy_tokens_and_logprobs(
    name: str, root: Path, prompts: list[list[int]], answers: dict[str, list[dict]]
) -> None:
    expected = transformers_scores(root / name / "original", prompts)
    found = [Scored(**each) for each in answers[str(root / name / "export-0")]]
    assert [each.tokens for each in found] == [each.tokens for each in expected]
    pairs = [
        pair
        for ours, theirs in zip(found, expected, strict=True)
        for pair in zip(ours.logprobs, theirs.logprobs, strict=True)
    ]
    largest = max(abs(ours - theirs) for ours, theirs in pairs)
    print(f"\n{name}: largest difference {largest:.1e} nats, log-probs down to {min(pairs)[0]:.1f}")
    # The promised bound: fp32 rounding of two implementations; a wrong tensor gives 1e-2 and more.
    assert largest <= 3e-6
