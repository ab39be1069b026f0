"""GIFT with adapters against GIFT on all weights beside a resident reference: peak memory and step time.

    python -m tools.benchmarks.lora [--tokens 512] [--repeats 5] [--rank 16] [--out lora.json]

Each has a process of its own, and they take turns of three steps (forward_backward and optim_step of one
micro-batch). Memory is the process's peak above what it held before its models were built, on CUDA what torch
allocated. The model is that of tools/benchmarks/step.py.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from megatron_sftrl import build_loss
from megatron_sftrl.config.lora import LoraSection
from megatron_sftrl.config.schema import ReferenceSection
from megatron_sftrl.engine.parallel import destroy_parallel, initialize_parallel
from megatron_sftrl.engine.policy import PolicyEngine
from megatron_sftrl.engine.reference import ReferenceModel, SharedReference
from megatron_sftrl.models.architecture import from_section, num_parameters
from tools.benchmarks.model import add_model_arguments, benchmark_run, random_batch

STEPS_PER_TURN = 3
KINDS = ("all weights", "adapters")
LIMITS = {"memory": 0.55, "seconds": 0.85}


def main() -> None:
    arguments = _parse()
    spawn = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    for kind in KINDS:
        pipes[kind], theirs = spawn.Pipe()
        processes.append(spawn.Process(target=_serve, args=(theirs, kind, arguments)))
        processes[-1].start()
        facts = pipes[kind].recv()  # it is built, and its first step done
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(arguments.repeats):
        for kind in KINDS:
            pipes[kind].send("turn")
            seconds[kind].append(pipes[kind].recv())
    memory = {}
    for kind in KINDS:
        pipes[kind].send("end")
        memory[kind] = pipes[kind].recv()
    for process in processes:
        process.join()
    _report(seconds, memory, {**facts, "tokens": arguments.tokens, "rank": arguments.rank}, arguments.out)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512, help="tokens of the micro-batch")
    parser.add_argument("--repeats", type=int, default=5, help="turns of three steps of each")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters, on all matrices")
    add_model_arguments(parser)
    parser.add_argument("--out", type=Path, default=None, help="JSON file for the numbers")
    return parser.parse_args()


def _serve(pipe: Connection, kind: str, arguments: argparse.Namespace) -> None:
    """A policy and its reference, in a process of their own: a step for each that is asked for."""
    config = benchmark_run(arguments, max_length=arguments.tokens)
    if kind == "adapters":
        lora = LoraSection(rank=arguments.rank, alpha=float(arguments.rank))
        config = config.model_copy(update={"lora": lora})
    assert config.model.architecture is not None
    architecture = from_section(config.model.architecture)
    parallel = initialize_parallel(config.parallel)
    before = _peak_bytes()
    policy = PolicyEngine(architecture, config, parallel)
    section = ReferenceSection(kind="frozen")
    if kind == "adapters":
        reference = SharedReference(section, parallel, policy.chunks, keeps_start=False)
    else:
        reference = ReferenceModel(architecture, config, section, parallel)
        reference.copy_from(policy.chunks)
    batch = random_batch(arguments.tokens, architecture.vocab_size, parallel.device, behavior=-10.0)
    loss = build_loss("gift", {})

    def steps(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            policy.forward_backward([batch], loss, reference)
            policy.optim_step(0, num_steps=1)
        if parallel.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / count

    steps(1)
    pipe.send({"parameters": num_parameters(architecture), "device": str(parallel.device)})
    while pipe.recv() == "turn":
        pipe.send(steps(STEPS_PER_TURN))
    pipe.send(_peak_bytes() - before)
    destroy_parallel()


def _peak_bytes() -> int:
    """Most that this process has held so far."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _report(
    seconds: dict[str, list[float]], memory: dict[str, int], facts: dict[str, object], out: Path | None
) -> None:
    whole, adapters = KINDS
    ratios = {
        "memory": memory[adapters] / memory[whole],
        "seconds": statistics.median(a / b for a, b in zip(seconds[adapters], seconds[whole], strict=True)),
    }
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print(f"{'GIFT with':<12} {'peak GB':>8} {'s / step':>9}")
    for kind in KINDS:
        print(f"{kind:<12} {memory[kind] / 1e9:>8.3f} {statistics.median(seconds[kind]):>9.3f}")
    print(f"{'ratio':<12} {ratios['memory']:>8.3f} {ratios['seconds']:>9.3f}")
    print(f"{'limit':<12} {LIMITS['memory']:>8.2f} {LIMITS['seconds']:>9.2f}")
    if out is not None:
        found = {
            kind: {"peak_bytes": memory[kind], "seconds": statistics.median(seconds[kind])} for kind in KINDS
        }
        values = {"facts": facts, **found, "ratios": ratios, "limits": LIMITS}
        temporary = out.with_name(out.name + ".tmp")
        temporary.write_text(json.dumps(values, indent=2) + "\n")
        temporary.replace(out)


if __name__ == "__main__":
    main()
