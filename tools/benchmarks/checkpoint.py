"""How long a save stops the training, synchronous and asynchronous, in one run.

    python -m tools.benchmarks.checkpoint [--out-dir DIR] [--repeats 3] [--json checkpoint.json]
    torchrun --nproc-per-node 2 -m tools.benchmarks.checkpoint --tp 2

A model and its Adam state (some 100s of MB) are trained with the sft loss. Each turn measures a step, a
synchronous save, an asynchronous one and the steps beside its writing. Reported: seconds that a save blocked
the training (median over the turns; the first asynchronous save takes its memory and is shown apart), their
ratio, whose goal is at most 0.2, and how much longer a step takes beside a save that is being written.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_sftrl import TokenBatch, build_loss
from megatron_sftrl.engine.checkpoint import CheckpointStore, TrainerState
from megatron_sftrl.engine.parallel import ParallelContext, destroy_parallel, initialize_parallel
from megatron_sftrl.engine.policy import PolicyEngine
from megatron_sftrl.models.architecture import from_section, num_parameters
from tools.benchmarks.model import add_model_arguments, benchmark_run, random_batch

LIMIT = 0.2


@dataclass(slots=True)
class Seconds:
    """What was measured, once a turn."""

    step: list[float] = field(default_factory=list)
    step_beside_a_save: list[float] = field(default_factory=list)
    blocked_sync: list[float] = field(default_factory=list)
    blocked_async: list[float] = field(default_factory=list)
    written_async: list[float] = field(default_factory=list)


def main() -> None:
    arguments = _parse()
    config = benchmark_run(arguments, max_length=arguments.tokens, parallel={"tp": arguments.tp})
    assert config.model.architecture is not None
    architecture = from_section(config.model.architecture)
    parallel = initialize_parallel(config.parallel)
    policy = PolicyEngine(architecture, config, parallel)
    step = _step_of(
        policy, random_batch(arguments.tokens, architecture.vocab_size, parallel.device, behavior=-10.0)
    )
    with tempfile.TemporaryDirectory(dir=arguments.out_dir, prefix="benchmark-checkpoint-") as mine:
        shared = [mine]
        dist.broadcast_object_list(shared, src=0)
        seconds, num_bytes = _measure(Path(shared[0]), policy, parallel, step, arguments.repeats)
        dist.barrier()
    if parallel.rank == 0:
        facts = {
            "parameters": num_parameters(architecture),
            "checkpoint_bytes": num_bytes,
            "processes": parallel.world_size,
            "device": str(parallel.device),
        }
        _report(seconds, facts, arguments.json)
    destroy_parallel()


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--out-dir", type=Path, default=None, help="disk to write to; the system's when not given"
    )
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a step")
    parser.add_argument("--repeats", type=int, default=3, help="turns")
    parser.add_argument("--tp", type=int, default=1, help="tensor parallel size")
    add_model_arguments(parser, hidden=512, vocab=16384)
    parser.add_argument("--json", type=Path, default=None, help="file for the numbers")
    return parser.parse_args()


def _step_of(policy: PolicyEngine, batch: TokenBatch) -> Callable[[], None]:
    loss = build_loss("sft", {})

    def step() -> None:
        policy.forward_backward([batch], loss)
        policy.optim_step(0, num_steps=1)
        if batch.tokens.is_cuda:
            torch.cuda.synchronize()

    return step


def _measure(
    directory: Path, policy: PolicyEngine, parallel: ParallelContext, step: Callable[[], None], turns: int
) -> tuple[Seconds, int]:
    """Seconds of every turn, and the bytes of a checkpoint."""
    waiting = CheckpointStore(directory / "sync", parallel, keep_last=1)
    beside = CheckpointStore(directory / "async", parallel, keep_last=1, async_save=True)
    seconds, num_bytes = Seconds(), 0
    step()  # allocates the optimizer's state
    for turn in range(1, turns + 2):  # the first asynchronous save takes its memory
        seconds.step += [_timed(step), _timed(step)]
        for store, blocked in ((waiting, seconds.blocked_sync), (beside, seconds.blocked_async)):
            blocked.append(_timed(partial(store.save, TrainerState(step=turn), policy, None)))
        while (written := beside.written()) is None:
            seconds.step_beside_a_save.append(_timed(step))
        seconds.written_async.append(written.seconds)
        num_bytes = written.num_bytes
    return seconds, num_bytes


def _timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _report(seconds: Seconds, facts: dict[str, object], out: Path | None) -> None:
    sync, blocked = statistics.median(seconds.blocked_sync), statistics.median(seconds.blocked_async[1:])
    alone, beside = statistics.median(seconds.step), statistics.median(seconds.step_beside_a_save)
    rows = {
        "synchronous save, blocked": sync,
        "first asynchronous save, blocked": seconds.blocked_async[0],
        "asynchronous save, blocked": blocked,
        "asynchronous save, written": statistics.median(seconds.written_async),
        "step": alone,
        "step beside a save": beside,
    }
    ratios = {
        "first asynchronous / synchronous": seconds.blocked_async[0] / sync,
        "asynchronous / synchronous": blocked / sync,
        "step beside a save / step": beside / alone,
    }
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    for name, value in rows.items():
        print(f"{name:<34} {value:8.3f} s")
    for name, value in ratios.items():
        limit = f"   at most {LIMIT}" if name == "asynchronous / synchronous" else ""
        print(f"{name:<34} {value:8.3f}{limit}")
    if out is not None:
        temporary = out.with_name(out.name + ".tmp")
        temporary.write_text(json.dumps({"facts": facts, "seconds": rows, "ratios": ratios}, indent=2) + "\n")
        temporary.replace(out)


if __name__ == "__main__":
    main()
