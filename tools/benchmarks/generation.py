"""Tokens per second of the rollout engines beside transformers.generate: same weights, same prompts.

    python -m tools.benchmarks.generation [--layers 6] [--hidden 256] [--vocab 32768] [--out FILE]

transformers (its cache, its default attention), in_process and vLLM (where it is installed) each live in a
process of their own and answer the same prompts in turns, so that a noisy machine disturbs all alike;
starting, importing and a first turn are not timed. Two kinds of work, at most --batch responses at once:

    equal    one response to each of --batch prompts, all of --new-tokens, no end token; greedy and sampled
    rollout  what a step of GRPO asks for: groups of --group responses to a prompt, sampled, four batches in
             all, ending by themselves after --new-tokens / 3 on average and at --new-tokens at the latest.
             transformers answers batch by batch, each to its longest response; the engines compute a prompt
             once for its group and give the place of a finished response to the next.

Counted are the tokens of responses up to the end token. Ratios are of tokens per second to transformers in
the same turn, medians over the turns: by the clock, and by processor seconds, which other programs on the
machine disturb less. Greedy responses that differ from those of transformers are counted: rounding may decide
between two almost equal logits, everything else would be an error. "floor" is what the matrix products of the
equal work alone take with these threads: it cannot be faster than that.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.nn.functional as F

from megatron_sftrl.models.architecture import Architecture, num_parameters
from megatron_sftrl.types import Prompt, SamplingParams
from tools.benchmarks.generation_contenders import (
    BASELINE,
    OURS,
    VLLM,
    Responses,
    architecture_of,
    config_of,
    contender,
    receive,
)

WANTED_RATIO = 2.0
"""Of in_process to transformers."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--batch", type=int, default=32, help="responses at once (32)")
    parser.add_argument("--group", type=int, default=8, help="responses to a prompt in the rollout work (8)")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3, help="turns of everybody (3)")
    parser.add_argument("--threads", type=int, default=2, help="of each contender on the CPU (2)")
    parser.add_argument(
        "--without", nargs="*", default=[], choices=[OURS, VLLM], help="contenders to leave out"
    )
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    with tempfile.TemporaryDirectory() as directory:
        facts = _benchmark(Path(directory), arguments)
    _print(facts)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(facts, indent=2) + "\n")


def _benchmark(directory: Path, arguments: argparse.Namespace) -> dict:
    architecture = architecture_of(config_of(directory, arguments))
    names = [BASELINE, OURS]
    if importlib.util.find_spec("vllm") is not None:
        names.append(VLLM)
    with contextlib.ExitStack() as stack:
        contenders = {
            # transformers comes first: it writes the weights that the others load.
            name: stack.enter_context(contender(name, directory, arguments))
            for name in names
            if name not in arguments.without
        }
        rows = [_measured(contenders, work, arguments) for work in ("greedy", "sampled", "rollout")]
    return {
        "parameters": num_parameters(architecture),
        **{name: value for name, value in vars(arguments).items() if name not in ("out", "without")},
        "dtype": config_of(directory, arguments).model.dtype,
        "torch": torch.__version__,
        "floor_tokens_per_second": _floor(architecture, arguments),
        "rows": rows,
    }


def _measured(contenders: dict[str, Connection], work: str, arguments: argparse.Namespace) -> dict:
    """One line of the table: everybody's turns at one kind of work."""
    prompts, sampling = _work(work, arguments)
    speed: dict[str, list[float]] = {name: [] for name in contenders}
    cpu_speed: dict[str, list[float]] = {name: [] for name in contenders}
    found: dict[str, Responses] = {}
    for turn in range(-1, arguments.repeats):
        for name, connection in contenders.items():
            connection.send((prompts, sampling))
            seconds, cpu_seconds, found[name] = receive(connection, name)
            num_tokens = sum(len(response) for group in found[name] for response in group)
            assert sampling.stop_ids or num_tokens == arguments.batch * arguments.new_tokens, name
            if turn >= 0:  # the first turn warms up
                speed[name].append(num_tokens / seconds)
                cpu_speed[name].append(num_tokens / cpu_seconds)
    ratios = {
        name: statistics.median(mine / base for base, mine in zip(speed[BASELINE], speed[name], strict=True))
        for name in contenders
    }
    cpu_ratios = {
        name: statistics.median(
            mine / base for base, mine in zip(cpu_speed[BASELINE], cpu_speed[name], strict=True)
        )
        for name in contenders
    }
    row: dict = {
        "work": work,
        "tokens_per_second": {name: statistics.median(each) for name, each in speed.items()},
        "ratio": ratios,
        "cpu_ratio": cpu_ratios,
    }
    if work == "greedy":
        row["differing"] = {
            name: sum(a != b for a, b in zip(found[BASELINE], mine, strict=True))
            for name, mine in found.items()
        }
    return row


def _work(work: str, arguments: argparse.Namespace) -> tuple[list[Prompt], SamplingParams]:
    generator = torch.Generator().manual_seed(7)
    num_samples = arguments.group if work == "rollout" else 1
    num_prompts = 4 * arguments.batch // num_samples if work == "rollout" else arguments.batch
    tokens = torch.randint(arguments.vocab, (num_prompts, arguments.prompt_tokens), generator=generator)
    stop_ids: list[int] = []
    if work == "rollout":
        # A random model draws each id about equally often: this many end a response every so many tokens.
        num_ends = max(1, round(3 * arguments.vocab / arguments.new_tokens))
        stop_ids = torch.randperm(arguments.vocab, generator=generator)[:num_ends].tolist()
    sampling = SamplingParams(
        temperature=0.0 if work == "greedy" else 1.0,
        max_new_tokens=arguments.new_tokens,
        num_samples=num_samples,
        stop_ids=frozenset(stop_ids),
        seed=1,
    )
    return [Prompt(id=i, tokens=tuple(row)) for i, row in enumerate(tokens.tolist())], sampling


def _floor(architecture: Architecture, arguments: argparse.Namespace) -> float:
    """Tokens per second if decoding were matrix products and nothing else; the best of many tries."""
    a = architecture
    heads = (a.num_attention_heads + 2 * a.num_query_groups) * a.head_dim
    shapes = [
        *[
            (heads, a.hidden_size),
            (a.hidden_size, a.num_attention_heads * a.head_dim),
            (2 * a.ffn_hidden_size, a.hidden_size),
            (a.hidden_size, a.ffn_hidden_size),
        ]
        * a.num_layers,
        (a.vocab_size, a.hidden_size),
    ]
    torch.set_num_threads(arguments.threads)
    pairs = [(torch.randn(arguments.batch, k), torch.randn(n, k)) for n, k in shapes]
    best = float("inf")
    for _ in range(50):
        start = time.perf_counter()
        for x, weight in pairs:
            F.linear(x, weight)
        best = min(best, time.perf_counter() - start)
    return arguments.batch / best


def _print(facts: dict) -> None:
    print(", ".join(f"{name} {value}" for name, value in facts.items() if name != "rows"))
    names = list(facts["rows"][0]["ratio"])
    others = [name for name in names if name != BASELINE]
    print(
        f"{'':<8}"
        + "".join(f" {name + ' tok/s':>19}" for name in names)
        + "".join(f" {name + ' ratio (cpu)':>24}" for name in others)
        + "  differing"
    )
    for row in facts["rows"]:
        ratios = [f"{row['ratio'][name]:.2f} ({row['cpu_ratio'][name]:.2f})" for name in others]
        print(
            f"{row['work']:<8}"
            + "".join(f" {row['tokens_per_second'][name]:>19,.0f}" for name in names)
            + "".join(f" {ratio:>24}" for ratio in ratios)
            + "  "
            + ", ".join(f"{name} {row['differing'][name]}" for name in others if "differing" in row)
        )
    got = ", ".join(f"{row['work']} {row['ratio'].get(OURS, float('nan')):.2f}" for row in facts["rows"])
    print(f"wanted: {WANTED_RATIO} x {BASELINE} at batch {facts['batch']}; got {got}")


if __name__ == "__main__":
    main()
