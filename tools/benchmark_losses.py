"""Time and memory of output layer and loss, forward and backward, fused and with all logits in memory.

    python tools/benchmark_losses.py [--tokens 2048] [--vocab-size 151936] [--hidden 1024] [--tp 1]
                                     [--repeats 3] [--only gift+sft] [--out benchmark_losses.json]

Every contender is a process of its own (tp of them), one after the other in each repeat, so that a noisy
machine disturbs all alike; figures are medians over the repeats of the ratio to `plain` in the same repeat.

    plain           output layer, Megatron's vocab_parallel_cross_entropy (in place), weight gradient added
                    to its buffer: one [T, V] array in all
    gift, released  the formula as the authors' trainer has it: softmax, clamp, log, +beta, softmax, product;
                    one process only
    NAME            the registered loss, fused with the output layer; a reference's output layer is included
    NAME, logits    the same loss with the logits of policy and reference in memory

On CUDA it also tells how much of the bandwidth of a copy the elementwise part reaches, with all logits in
memory and nothing but the loss in the time; that wants many tokens (16384). And how much of the rate of one
matrix product each contender reaches with the products that it cannot do without.

Memory is the peak of the process beyond what stood before (weights, their gradient buffer, hidden states),
and on CUDA that of the allocator.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from loss_bandwidth import bandwidth_fractions, matmul_fractions
from loss_contenders import LOSSES, PLAIN, Sizes, contenders, make_batch, make_model, make_step

from megatron_sftrl.config.schema import ParallelSection
from megatron_sftrl.doctor.ranks import free_port
from megatron_sftrl.engine.parallel import parallel_context

TIME_LIMITS = {"sft": 1.1, "gift": 1.4, "curiosft": 1.5, **{n: 1.5 for n in LOSSES if n.startswith("pear")}}
MEMORY_LIMITS = {**{name: 0.25 for name in TIME_LIMITS}, "sft": 0.2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocab-size", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", help="contenders, with + between them; plain always runs")
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = Sizes(
        tokens=arguments.tokens, vocab_size=arguments.vocab_size, hidden=arguments.hidden, tp=arguments.tp
    )
    if arguments.child:
        print(json.dumps(_measured(arguments.child, sizes)))
        return
    names = contenders(sizes.tp)
    if arguments.only:
        wanted = [name.strip() for name in arguments.only.split("+")]
        if unknown := [name for name in wanted if name not in names]:
            parser.error(f"--only: not at tp {sizes.tp}: {', '.join(unknown)}; known: {' + '.join(names)}")
        names = [name for name in names if name == PLAIN or name in wanted]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(arguments.repeats):
        for name in names:
            found[name].append(_in_children(name, sizes))
    facts = _facts(found, sizes)
    _print(facts)
    if torch.cuda.is_available():
        device = torch.device("cuda")
        facts["bandwidth"] = bandwidth_fractions(sizes, device)
        rate, shares = _rate_and_shares(facts["bandwidth"])
        print(f"elementwise part, of a copy's {rate / 1e9:.0f} GB/s: {shares}")
        facts["matmul"] = matmul_fractions(_median_seconds(found), sizes, device)
        rate, shares = _rate_and_shares(facts["matmul"])
        print(f"output layer and loss, of one product's {rate / 1e12:.0f} TFLOP/s: {shares}")
    if arguments.out:
        arguments.out.write_text(json.dumps(facts, indent=2) + "\n")


def _in_children(name: str, sizes: Sizes) -> dict[str, float]:
    """Run a contender on tp processes; the slowest and the largest of them."""
    command = [sys.executable, "-W", "ignore", __file__, "--child", name]
    command += ["--tokens", str(sizes.tokens), "--vocab-size", str(sizes.vocab_size)]
    command += ["--hidden", str(sizes.hidden), "--tp", str(sizes.tp)]
    threads = max(1, (os.cpu_count() or 1) // sizes.tp)
    base = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    base |= {"WORLD_SIZE": str(sizes.tp), "LOCAL_WORLD_SIZE": str(sizes.tp)}
    base |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    base["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
    places = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(sizes.tp)]
    children = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=base | place) for place in places
    ]
    lines = [child.communicate()[0] for child in children]
    if any(child.returncode for child in children):
        raise SystemExit(f"{name} failed")
    results = [json.loads(line.splitlines()[-1]) for line in lines]
    return {key: max(result[key] for result in results) for key in ("seconds", "peak_bytes")}


def _measured(name: str, sizes: Sizes) -> dict[str, float]:
    with parallel_context(ParallelSection(tp=sizes.tp)) as parallel:
        device = parallel.device
        step = make_step(name, make_model(sizes, device), make_batch(sizes, device), sizes)
        before = _reset_peak(device)
        step()
        peak = _peak(device) - before
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return {"seconds": time.perf_counter() - start, "peak_bytes": peak}


def _reset_peak(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else _status_bytes("VmHWM")


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"no {key} in /proc/self/status: this benchmark needs Linux")


def _facts(found: dict[str, list[dict[str, float]]], sizes: Sizes) -> dict[str, Any]:
    def ratios(name: str, key: str) -> float:
        pairs = zip(found[name], found[PLAIN], strict=True)
        return statistics.median(turn[key] / plain[key] for turn, plain in pairs)

    return {
        **{key: getattr(sizes, key) for key in ("tokens", "vocab_size", "hidden", "tp")},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "turns": found,
        "time": {name: ratios(name, "seconds") for name in found},
        "memory": {name: ratios(name, "peak_bytes") for name in found},
    }


def _median_seconds(found: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    return {name: statistics.median(turn["seconds"] for turn in turns) for name, turns in found.items()}


def _rate_and_shares(fractions: dict[str, float]) -> tuple[float, str]:
    rate, *_ = fractions.values()
    return rate, ", ".join(f"{name} {share:.2f}" for name, share in list(fractions.items())[1:])


def _print(facts: dict[str, Any]) -> None:
    print(f"T {facts['tokens']}, V {facts['vocab_size']}, H {facts['hidden']}, tp {facts['tp']}")
    print(f"{'':18}{'seconds':>9}{'of plain':>10}{'limit':>7}{'peak MB':>10}{'of plain':>10}{'limit':>7}")
    for name, turns in facts["turns"].items():
        seconds = statistics.median(turn["seconds"] for turn in turns)
        peak = statistics.median(turn["peak_bytes"] for turn in turns)
        print(
            f"{name:18}{seconds:9.2f}{facts['time'][name]:10.2f}{TIME_LIMITS.get(name, ''):>7}"
            f"{peak / 1e6:10.0f}{facts['memory'][name]:10.2f}{MEMORY_LIMITS.get(name, ''):>7}"
        )
    slow = [name for name, limit in TIME_LIMITS.items() if facts["time"].get(name, 0) > limit]
    large = [name for name, limit in MEMORY_LIMITS.items() if facts["memory"].get(name, 0) > limit]
    print(f"above the limit of time: {', '.join(slow) or 'none'}; of memory: {', '.join(large) or 'none'}")


if __name__ == "__main__":
    main()
