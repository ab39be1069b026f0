"""Seconds, GB/s and memory of an update of a rollout engine's weights, beside gathering everything.

    torchrun --nproc-per-node 2 -m tools.benchmarks.reshard [--repeats 3] [--bucket-mib 64] [--out FILE]

Two ranks hold a model of about 0.5 GB as the trainer does and stream it to engines of several tp. For each
pair of layouts, in turns: the stream (whose tensors are dropped at once), a plain copy of as many bytes from
and to memory that was touched before, and the naive way: all_gather of every parameter, the whole model kept
on every rank. Seconds are of the slower rank, the median over the turns. Memory is the worse rank's: live is
what the stream's messages and tensors occupied at once, peak what the process grew by (on the CPU its
resident set, with what the C library's allocator keeps of freed blocks).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_sftrl.engine.model import LanguageModel
from megatron_sftrl.engine.parallel import ParallelContext, destroy_parallel, initialize_parallel
from megatron_sftrl.engine.policy import PolicyEngine
from megatron_sftrl.models.architecture import Architecture, from_section, num_parameters
from megatron_sftrl.models.engine_shards import EngineLayout
from megatron_sftrl.rollout.reshard import between_all_ranks
from tools.benchmarks.model import add_model_arguments, benchmark_run

CASES = (("tp2", {"tp": 2}, 1), ("tp2", {"tp": 2}, 2), ("pp2", {"pp": 2}, 2), ("tp1", {}, 1))
"""Name and layout of the trainer, tp of the engine."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One pair of layouts.

    Args:
        trainer, engine: names of the layouts.
        seconds: of the stream.
        copy_seconds: of a plain copy of the engine's share.
        naive_seconds: of gathering everything.
        share_bytes: that each engine rank receives.
        network_bytes: of them, from another rank.
        peak_bytes, naive_peak_bytes: memory beyond the trainer's.
        accounted_bytes: what the stream itself says that it occupied.
    """

    trainer: str
    engine: str
    seconds: float
    copy_seconds: float
    naive_seconds: float
    share_bytes: int
    network_bytes: int
    peak_bytes: int
    naive_peak_bytes: int
    accounted_bytes: int


def main() -> None:
    arguments = _parse()
    results, facts = [], {}
    for name, layout, engine_tp in CASES:
        config = benchmark_run(arguments, max_length=8, parallel=layout, global_size=2)
        assert config.model.architecture is not None
        architecture = from_section(config.model.architecture)
        parallel = initialize_parallel(config.parallel)
        if parallel.world_size != 2:
            raise SystemExit(f"2 ranks expected, got {parallel.world_size}: torchrun --nproc-per-node 2")
        chunks = PolicyEngine(architecture, config, parallel, with_optimizer=False).chunks
        results.append(_measure(name, engine_tp, chunks, architecture, parallel, arguments))
        element_bytes = next(chunks[0].parameters()).element_size()
        facts = {
            "model_gigabytes": num_parameters(architecture) * element_bytes / 1e9,
            "bucket_mib": arguments.bucket_mib,
            "repeats": arguments.repeats,
            "device": str(parallel.device),
        }
        del chunks
        parallel_state.destroy_model_parallel()
    if dist.get_rank() == 0:
        _print(results, facts)
        if arguments.out is not None:
            document = {"facts": facts, "cases": [asdict(each) for each in results]}
            temporary = arguments.out.with_name(arguments.out.name + ".tmp")
            temporary.write_text(json.dumps(document, indent=2) + "\n")
            temporary.replace(arguments.out)
    destroy_parallel()


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="turns of everything")
    parser.add_argument("--bucket-mib", type=int, default=64, help="size of a bucket")
    add_model_arguments(parser, layers=12)
    parser.add_argument("--out", type=Path, default=None, help="JSON file for the numbers")
    return parser.parse_args()


def _measure(
    trainer: str,
    engine_tp: int,
    chunks: list[LanguageModel],
    architecture: Architecture,
    parallel: ParallelContext,
    arguments: argparse.Namespace,
) -> Measured:
    layout = EngineLayout(tp=engine_tp, world_size=parallel.world_size)
    resharder = between_all_ranks(
        chunks, architecture, parallel, layout, bucket_bytes=arguments.bucket_mib * 2**20
    )

    def stream() -> None:
        with resharder.stream() as tensors:
            for _, tensor in tensors:
                del tensor  # an engine has copied its share by now

    def naive() -> None:
        kept = _gather_everything(chunks, parallel)
        del kept

    stream()  # opens the connections, and tells how large the share is
    report = resharder.last_report
    assert report is not None
    share = report.received_bytes + report.copied_bytes
    source = torch.ones(share, dtype=torch.uint8, device=parallel.device)
    target = torch.zeros_like(source)
    ways: dict[str, Callable[[], object]] = {
        "stream": stream,
        "copy": lambda: target.copy_(source),
        "naive": naive,
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    peaks: dict[str, int] = dict.fromkeys(ways, 0)
    for _ in range(arguments.repeats):
        for way, action in ways.items():
            once, peak = _timed(action, parallel.device)
            seconds[way].append(once)
            peaks[way] = max(peaks[way], peak)
    return Measured(
        trainer=trainer,
        engine=f"tp{engine_tp}",
        seconds=statistics.median(seconds["stream"]),
        copy_seconds=statistics.median(seconds["copy"]),
        naive_seconds=statistics.median(seconds["naive"]),
        share_bytes=_worst(share),
        network_bytes=_worst(report.received_bytes),
        peak_bytes=peaks["stream"],
        naive_peak_bytes=peaks["naive"],
        accounted_bytes=_worst(report.peak_bytes),
    )


@torch.no_grad()
def _gather_everything(chunks: list[LanguageModel], parallel: ParallelContext) -> list[list[Tensor]]:
    """Every parameter of every rank on every rank; a rank that holds the whole model copies it.

    Sorted by size, so that stages with different ends gather tensors of about the same size together; the
    smaller one is padded. Names and layouts are not even converted: the naive way would pay for that too.
    """
    parameters = sorted(
        (parameter.detach() for chunk in chunks for parameter in chunk.parameters()),
        key=lambda parameter: parameter.numel(),
    )
    if parallel.dp_size == parallel.world_size:
        return [[parameter.clone()] for parameter in parameters]
    counts: list[list[int]] = [[]] * parallel.world_size
    dist.all_gather_object(counts, [parameter.numel() for parameter in parameters])
    num_parameters = max(len(each) for each in counts)
    kept = []
    for index in range(num_parameters):
        size = max(each[index] for each in counts if index < len(each))
        padded = parameters[0].new_zeros(size)
        if index < len(parameters):
            padded[: parameters[index].numel()] = parameters[index].view(-1)
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        kept.append(parts)
    return kept


def _timed(action: Callable[[], object], device: torch.device) -> tuple[float, int]:
    """Seconds and extra memory of the worst rank."""
    gc.collect()
    dist.barrier()
    before = _restart_peak(device)
    start = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    extra = _peak(device) - before
    return _worst(int(seconds * 1e9)) / 1e9, _worst(extra)


def _restart_peak(device: torch.device) -> int:
    """Bytes in use now; the peak is counted from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    # Memory that earlier turns freed and the C library keeps would hide what this one needs.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _worst(value: int) -> int:
    values: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return max(values)


def _print(results: list[Measured], facts: dict[str, object]) -> None:
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print(
        f"{'layouts':<12} {'share MB':>9} {'network MB':>11} {'s':>7} {'GB/s':>6} {'x copy':>7} "
        f"{'live MB':>8} {'peak MB':>8} {'naive s':>8} {'x ours':>7} {'naive peak MB':>14}"
    )
    for each in results:
        print(
            f"{each.trainer + ' -> ' + each.engine:<12} {each.share_bytes / 1e6:>9.0f} "
            f"{each.network_bytes / 1e6:>11.0f} {each.seconds:>7.3f} "
            f"{each.share_bytes / each.seconds / 1e9:>6.2f} {each.seconds / each.copy_seconds:>7.2f} "
            f"{each.accounted_bytes / 1e6:>8.0f} {each.peak_bytes / 1e6:>8.0f} {each.naive_seconds:>8.3f} "
            f"{each.naive_seconds / each.seconds:>7.2f} {each.naive_peak_bytes / 1e6:>14.0f}"
        )


if __name__ == "__main__":
    main()
