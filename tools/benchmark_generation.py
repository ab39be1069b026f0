"""Tokens per second of the rollout engines beside transformers.generate: same weights, same prompts.

    python tools/benchmark_generation.py [--layers 6] [--hidden 256] [--vocab 32768] [--out FILE]

One process holds one random model, which reaches transformers as a Hugging Face directory. Everybody answers
the same prompts, greedily and sampled from the whole distribution, with 1, 8 and 32 responses at once and no
end token. They take turns, so that a noisy machine disturbs all alike; reported are the medians over the
turns of tokens per second and of the ratio to transformers.generate in the same turn. vLLM takes part where
it is installed. Greedy responses that differ from those of transformers are counted: rounding may decide
between two almost equal logits, everything else would be an error.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from megatron_sftrl.architectures.architecture import from_section, num_parameters
from megatron_sftrl.config.schema import RunConfig
from megatron_sftrl.engine.hf_weights import load_hf_weights
from megatron_sftrl.engine.parallel import parallel_context
from megatron_sftrl.engine.policy import PolicyEngine
from megatron_sftrl.hf.weights import open_weights
from megatron_sftrl.rollout.api import RolloutEngine
from megatron_sftrl.rollout.in_process import InProcessEngine
from megatron_sftrl.types import Prompt, SamplingParams

BASELINE, OURS, VLLM = "transformers", "in_process", "vllm"
BATCHES = (1, 8, 32)
SMALLEST_RATIO = 2.0
"""Of in_process to transformers at the largest batch."""

Contender = Callable[[Sequence[Prompt], SamplingParams], list[tuple[int, ...]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3, help="turns of everybody (3)")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch on the CPU (2)")
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # vLLM reads it
    with tempfile.TemporaryDirectory() as directory:
        facts = _benchmark(Path(directory), arguments)
    _print(facts)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(facts, indent=2) + "\n")


def _benchmark(directory: Path, arguments: argparse.Namespace) -> dict:
    config = _config(directory, arguments)
    assert config.model.architecture is not None
    architecture = from_section(config.model.architecture)
    with parallel_context(config.parallel) as parallel:
        policy = PolicyEngine(architecture, config, parallel, with_optimizer=False)
        contenders = {BASELINE: _transformers(policy, directory, parallel.device)}
        with open_weights(directory) as weights:
            load_hf_weights(policy.chunks, weights, architecture)
        contenders[OURS] = _engine(InProcessEngine(parallel, max_responses=max(BATCHES)), policy)
        if importlib.util.find_spec("vllm") is not None:
            contenders[VLLM] = _engine(_vllm(policy, arguments), policy)
        rows = [
            _measured(contenders, how, batch, arguments, str(parallel.device.type))
            for how in ("greedy", "sampled")
            for batch in BATCHES
        ]
    return {
        "parameters": num_parameters(architecture),
        **{name: getattr(arguments, name) for name in ("layers", "hidden", "vocab", "threads", "repeats")},
        "prompt_tokens": arguments.prompt_tokens,
        "new_tokens": arguments.new_tokens,
        "device": str(parallel.device),
        "dtype": config.model.dtype,
        "torch": torch.__version__,
        "rows": rows,
    }


def _config(directory: Path, arguments: argparse.Namespace) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run_dir": "unused",
            "model": {
                "architecture": {
                    "family": "qwen3",
                    "num_layers": arguments.layers,
                    "hidden_size": arguments.hidden,
                    "ffn_hidden_size": 3 * arguments.hidden,
                    "num_attention_heads": arguments.hidden // 32,
                    "num_query_groups": arguments.hidden // 64,
                    "head_dim": 32,
                    "vocab_size": arguments.vocab,
                    "max_position_embeddings": arguments.prompt_tokens + arguments.new_tokens,
                    # Logits with some spread: the greedy choice shall not hang on rounding.
                    "init_std": 0.1,
                },
                "dtype": "bf16" if torch.cuda.is_available() else "fp32",
            },
            "tokenizer": {"path": str(directory)},
            "data": {"train": ["unused"], "max_length": arguments.prompt_tokens},
            "batch": {"global_size": 1},
            "loss": {"name": "sft"},
            "optim": {"lr": 1e-4},
            "train": {"steps": 1},
        }
    )


def _transformers(policy: PolicyEngine, directory: Path, device: torch.device) -> Contender:
    """transformers.generate with its default attention; writes its random weights to `directory`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from megatron_sftrl.architectures.hf_config_writer import hf_config_values

    dtype = policy.config.params_dtype
    values = hf_config_values(policy.architecture, dtype=dtype)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values), dtype=dtype)
    model = model.to(device).eval()
    model.save_pretrained(directory)

    def generate(prompts: Sequence[Prompt], sampling: SamplingParams) -> list[tuple[int, ...]]:
        tokens = torch.tensor([prompt.tokens for prompt in prompts], device=device)
        choice = (
            {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
            if sampling.temperature > 0
            else {"do_sample": False}
        )
        with torch.no_grad():
            whole = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=sampling.max_new_tokens,
                **choice,  # type: ignore[arg-type]
            )
        return [tuple(row) for row in whole[:, tokens.shape[1] :].tolist()]

    return generate


def _engine(engine: RolloutEngine, policy: PolicyEngine) -> Contender:
    engine.update(policy, version=0)

    def generate(prompts: Sequence[Prompt], sampling: SamplingParams) -> list[tuple[int, ...]]:
        return [group.rollouts[0].response_tokens for group in engine.generate(prompts, sampling)]

    return generate


def _vllm(policy: PolicyEngine, arguments: argparse.Namespace) -> RolloutEngine:
    from megatron_sftrl.rollout.vllm_colocated import VllmEngine
    from megatron_sftrl.rollout.vllm_settings import VllmSettings

    length = arguments.prompt_tokens + arguments.new_tokens
    return VllmEngine(policy, VllmSettings(tp=1, max_model_len=length, max_num_seqs=max(BATCHES)))


def _measured(
    contenders: dict[str, Contender], how: str, batch: int, arguments: argparse.Namespace, device: str
) -> dict:
    """One line of the table: everybody's turns at one batch size."""
    generator = torch.Generator().manual_seed(batch)
    size = (batch, arguments.prompt_tokens)
    prompts = [
        Prompt(id=i, tokens=tuple(tokens))
        for i, tokens in enumerate(torch.randint(0, arguments.vocab, size, generator=generator).tolist())
    ]
    temperature = 1.0 if how == "sampled" else 0.0
    short = SamplingParams(temperature=temperature, max_new_tokens=2, num_samples=1)
    sampling = SamplingParams(
        temperature=temperature, max_new_tokens=arguments.new_tokens, num_samples=1, seed=1
    )
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    found: dict[str, list[tuple[int, ...]]] = {}
    for contender in contenders.values():
        contender(prompts, short)
    for _ in range(arguments.repeats):
        for name, contender in contenders.items():
            start = time.perf_counter()
            found[name] = contender(prompts, sampling)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    total = batch * arguments.new_tokens
    for name, responses in found.items():
        assert sum(map(len, responses)) == total, f"{name} stopped early"
    row: dict = {"how": how, "batch": batch, "tokens_per_second": {}, "ratio": {}, "differing": {}}
    for name, times in seconds.items():
        row["tokens_per_second"][name] = statistics.median(total / each for each in times)
        row["ratio"][name] = statistics.median(
            base / mine for base, mine in zip(seconds[BASELINE], times, strict=True)
        )
        if how == "greedy":
            row["differing"][name] = sum(a != b for a, b in zip(found[BASELINE], found[name], strict=True))
    return row


def _print(facts: dict) -> None:
    print(", ".join(f"{name} {value}" for name, value in facts.items() if name != "rows"))
    names = list(facts["rows"][0]["ratio"])
    others = [name for name in names if name != BASELINE]
    print(
        f"{'':<8} {'batch':>5}"
        + "".join(f" {name + ' tok/s':>19}" for name in names)
        + "".join(f" {name + ' ratio':>17} {'differing':>9}" for name in others)
    )
    for row in facts["rows"]:
        print(
            f"{row['how']:<8} {row['batch']:>5}"
            + "".join(f" {row['tokens_per_second'][name]:>19,.0f}" for name in names)
            + "".join(f" {row['ratio'][name]:>17.2f} {row['differing'].get(name, ''):>9}" for name in others)
        )
    largest = [row["ratio"][OURS] for row in facts["rows"] if row["batch"] == max(BATCHES)]
    print(f"target: {SMALLEST_RATIO} x {BASELINE} at batch {max(BATCHES)}; got {min(largest):.2f}")


if __name__ == "__main__":
    main()
