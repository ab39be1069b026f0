"""Step time of each loss against the same Megatron step with Megatron's own vocab_parallel_cross_entropy.

    python -m tools.benchmarks.step [--tokens 512] [--repeats 3] [--out step.json]
    torchrun --nproc-per-node 2 -m tools.benchmarks.step --tp 2

One process (or a tp group) trains one model of about 100M parameters. The losses take turns of five steps,
so that a noisy machine disturbs all alike and CurioSFT's moving average, which follows every fifth step, has
its exact share. Reported: seconds of a step (forward_backward, optim_step, moving average) and the median
over the turns of its ratio to the baseline's step in the same turn.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor

from megatron_sftrl import TokenBatch, build_loss
from megatron_sftrl.config.schema import ReferenceSection, RunConfig
from megatron_sftrl.engine.parallel import ParallelContext, destroy_parallel, initialize_parallel
from megatron_sftrl.engine.policy import PolicyEngine
from megatron_sftrl.engine.reference import ReferenceModel
from megatron_sftrl.engine.schedule import LastStageInput, as_megatron_loss, run_schedule
from megatron_sftrl.models.architecture import from_section, num_parameters
from tools.benchmarks.model import add_model_arguments, benchmark_run, random_batch

BASELINE = "megatron cross-entropy"
STEPS_PER_TURN = 5
LIMITS = {"sft": 1.05, "pear": 1.05, "gift": 1.45, "curiosft": 1.45}


def main() -> None:
    arguments = _parse()
    config = benchmark_run(arguments, max_length=arguments.tokens, parallel={"tp": arguments.tp})
    assert config.model.architecture is not None
    architecture = from_section(config.model.architecture)
    parallel = initialize_parallel(config.parallel)
    steps = _build_steps(config, parallel)
    batch = random_batch(arguments.tokens, architecture.vocab_size, parallel.device, behavior=-10.0)
    for step in steps.values():  # the first step allocates optimizer state and memory
        step(batch)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(arguments.repeats):
        for name, step in steps.items():
            seconds[name].append(_timed(step, batch, parallel.device))
    if parallel.rank == 0:
        facts = {
            "parameters": num_parameters(architecture),
            "vocab_size": architecture.vocab_size,
            "tokens": arguments.tokens,
            "tp": arguments.tp,
            "device": str(parallel.device),
        }
        _report(seconds, facts, arguments.out)
    destroy_parallel()


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512, help="tokens of the micro-batch")
    parser.add_argument("--repeats", type=int, default=3, help="turns of five steps of every loss")
    parser.add_argument("--tp", type=int, default=1, help="tensor parallel size")
    add_model_arguments(parser)
    parser.add_argument("--out", type=Path, default=None, help="JSON file for the numbers")
    return parser.parse_args()


def _build_steps(config: RunConfig, parallel: ParallelContext) -> dict[str, Callable[[TokenBatch], None]]:
    """One closure per loss, all on the same policy; the baseline first."""
    assert config.model.architecture is not None
    architecture = from_section(config.model.architecture)
    policy = PolicyEngine(architecture, config, parallel)
    reference = ReferenceModel(architecture, config, ReferenceSection(kind="frozen"), parallel)
    reference.copy_from(policy.chunks)
    average = ReferenceSection(kind="moving_average")
    teacher = ReferenceModel(architecture, config, average, parallel)
    teacher.copy_from(policy.chunks)

    def cross_entropy(stage: LastStageInput) -> tuple[Tensor, Tensor, Tensor]:
        logits = stage.model.logits(stage.hidden_states).float()
        token_loss = vocab_parallel_cross_entropy(logits[:, None], stage.batch.labels[:, None])[:, 0]
        total = (token_loss * stage.batch.token_weight).sum()
        return as_megatron_loss(total, total.detach().clone())

    def baseline(batch: TokenBatch) -> None:
        policy.zero_gradients()
        run_schedule(policy.wrapped, [batch], cross_entropy, parallel, forward_only=False)
        policy.optim_step(0, num_steps=1)

    def step_of(name: str) -> Callable[[TokenBatch], None]:
        loss = build_loss(name, {})
        model = {"gift": reference, "curiosft": teacher}.get(name)
        steps_done = itertools.count()

        def step(batch: TokenBatch) -> None:
            policy.forward_backward([batch], loss, model)
            policy.optim_step(0, num_steps=1)
            if model is not None and model.is_due(next(steps_done)):
                model.follow(policy.chunks)

        return step

    return {BASELINE: baseline, **{name: step_of(name) for name in LIMITS}}


def _timed(step: Callable[[TokenBatch], None], batch: TokenBatch, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(STEPS_PER_TURN):
        step(batch)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / STEPS_PER_TURN


def _report(seconds: dict[str, list[float]], facts: dict[str, object], out: Path | None) -> None:
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print(f"{'loss':<24} {'s / step':>9} {'ratio':>7} {'limit':>7}")
    rows = {}
    for name, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(times, seconds[BASELINE], strict=True))
        rows[name] = {"seconds": statistics.median(times), "ratio": ratio, "limit": LIMITS.get(name)}
        limit = f"{LIMITS[name]:.2f}" if name in LIMITS else ""
        print(f"{name:<24} {rows[name]['seconds']:>9.3f} {ratio:>7.3f} {limit:>7}")
    if out is not None:
        temporary = out.with_name(out.name + ".tmp")
        temporary.write_text(json.dumps({"facts": facts, "losses": rows}, indent=2) + "\n")
        temporary.replace(out)


if __name__ == "__main__":
    main()
