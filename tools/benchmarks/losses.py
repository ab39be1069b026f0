"""Time and memory of output layer and loss, forward and backward, fused and with all logits in memory.

    python -m tools.benchmarks.losses [--tokens 2048] [--vocab-size 151936] [--hidden 1024] [--tp 1]
                                      [--repeats 3] [--only gift+sft] [--out losses.json]

Every contender is a process of its own (tp of them), one after the other in each repeat, so that a noisy
machine disturbs all alike; figures are medians over the repeats of the ratio to `plain` in the same repeat.

    plain           output layer, Megatron's vocab_parallel_cross_entropy (in place), weight gradient added
                    to its buffer: one [T, V] array in all
    megatron linear, liger, cut-cross-entropy, cut-cross-entropy, compiled
                    cross-entropy fused with the output layer by others: Megatron's where megatron-core has
                    it (CUDA; 0.16.1 has not), Liger's (CUDA), Apple's kernels (CUDA) and its torch.compile
                    version, after `pip install liger-kernel cut-cross-entropy`. All but Megatron's know one
                    process only. The weight gradient that they return is added to its buffer.
    NAME, released  the formula in the plain dense way, as the authors' trainer has it for gift and curiosft,
                    transformers for sft, verl for entropy; for pear, which has no release, as in the paper.
                    One process only; a reference's output layer is included. See released_losses.py
    NAME            the registered loss, fused with the output layer; a reference's output layer is included
    NAME, logits    the same loss with the logits of policy and reference in memory

Who cannot run is named under the table with the reason. When a loss ran with its released formula, its share
of that one's time and memory is printed, too.

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
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from megatron_sftrl.apps.doctor.ranks import free_port
from megatron_sftrl.config.schema import ParallelSection
from megatron_sftrl.engine.parallel import parallel_context
from megatron_sftrl.errors import UserError
from tools.benchmarks.loss_bandwidth import bandwidth_fractions, matmul_fractions
from tools.benchmarks.loss_contenders import PLAIN, Sizes, contenders, make_batch, make_model, make_step
from tools.benchmarks.loss_report import fraction_line, loss_facts, report_lines, write_json
from tools.benchmarks.other_kernels import KERNELS


class ContenderError(RuntimeError):
    """A contender's process failed; the message is what it said."""


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
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    names, left_out = contenders(tp=sizes.tp, device_type=device_type)
    if arguments.only:
        wanted = [name.strip() for name in arguments.only.split("+")]
        if unknown := [name for name in wanted if name not in names]:
            reasons = ", ".join(f"{name} ({left_out.get(name, 'unknown')})" for name in unknown)
            parser.error(f"--only: not here: {reasons}; known: {' + '.join(names)}")
        names, left_out = [name for name in names if name == PLAIN or name in wanted], {}
    turns, failed = _measure_all(names, sizes, arguments.repeats)
    facts = {
        **asdict(sizes),
        "device": torch.cuda.get_device_name() if device_type == "cuda" else "cpu",
        "torch": torch.__version__,
        **loss_facts(turns, left_out | failed),
    }
    print(f"T {sizes.tokens}, V {sizes.vocab_size}, H {sizes.hidden}, tp {sizes.tp}, {facts['device']}")
    print(*report_lines(facts), sep="\n")
    if device_type == "cuda":
        device = torch.device("cuda")
        facts["bandwidth"] = bandwidth_fractions(sizes, device)
        print(fraction_line("elementwise part, of a copy's", "GB/s", 1e9, facts["bandwidth"]))
        facts["matmul"] = matmul_fractions(facts["seconds"], sizes, device)
        print(fraction_line("output layer and loss, of one product's", "TFLOP/s", 1e12, facts["matmul"]))
    if arguments.out:
        write_json(facts, arguments.out)


def _measure_all(
    names: list[str], sizes: Sizes, repeats: int
) -> tuple[dict[str, list[dict[str, float]]], dict[str, str]]:
    """Turns by contender, and of other people's kernels that failed the reason."""
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    failed: dict[str, str] = {}
    for _ in range(repeats):
        for name in [name for name in names if name not in failed]:
            try:
                turns[name].append(_in_children(name, sizes))
            except ContenderError as error:
                if name not in KERNELS:
                    raise SystemExit(f"{name} failed:\n{error}") from error
                failed[name] = _exception_in(str(error))
    return {name: found for name, found in turns.items() if name not in failed}, failed


def _in_children(name: str, sizes: Sizes) -> dict[str, float]:
    """Run a contender on tp processes; the slowest and the largest of them."""
    command = [sys.executable, "-W", "ignore", "-m", "tools.benchmarks.losses", "--child", name]
    command += ["--tokens", str(sizes.tokens), "--vocab-size", str(sizes.vocab_size)]
    command += ["--hidden", str(sizes.hidden), "--tp", str(sizes.tp)]
    threads = max(1, (os.cpu_count() or 1) // sizes.tp)
    base = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    base |= {"WORLD_SIZE": str(sizes.tp), "LOCAL_WORLD_SIZE": str(sizes.tp)}
    base |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    places = [Path(__file__).resolve().parents[2], os.environ.get("PYTHONPATH")]
    base["PYTHONPATH"] = os.pathsep.join(str(place) for place in places if place)
    with tempfile.TemporaryFile("w+") as said:
        children = [
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                env=base | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(sizes.tp)
        ]
        outputs = [child.communicate()[0] for child in children]
        if any(child.returncode for child in children):
            said.seek(0)
            raise ContenderError(said.read())
    results = [json.loads(output.splitlines()[-1]) for output in outputs]
    return {key: max(result[key] for result in results) for key in ("seconds", "peak_bytes")}


def _exception_in(text: str) -> str:
    """The last line that reads like an exception's, else the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    exceptions = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Exit)\b", line)]
    return [f"failed: {line[:200]}" for line in exceptions or lines or ["it said nothing"]][-1]


def _measured(name: str, sizes: Sizes) -> dict[str, float]:
    with parallel_context(ParallelSection(tp=sizes.tp)) as parallel:
        device = parallel.device
        if name in KERNELS:  # what they compile takes time and memory once
            few = replace(sizes, tokens=64)
            make_step(name, make_model(few, device), make_batch(few, device), few)()
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
    raise UserError(f"no {key} in /proc/self/status: this benchmark needs Linux")


if __name__ == "__main__":
    main()
