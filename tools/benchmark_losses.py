"""Time and memory of output layer and loss, forward and backward, fused and with all logits in memory.

    python tools/benchmark_losses.py [--tokens 2048] [--vocab-size 151936] [--hidden 1024] [--tp 1]
                                     [--repeats 3] [--only gift+sft] [--out benchmark_losses.json]

Every contender is a process of its own (tp of them), one after the other in each repeat, so that a noisy
machine disturbs all alike; figures are medians over the repeats of the ratio to `plain` in the same repeat.

    plain           output layer, Megatron's vocab_parallel_cross_entropy (in place), weight gradient added
                    to its buffer: one [T, V] array in all
    gift, released  the formula as the authors' trainer has it: softmax, clamp, log, +beta, softmax, product
    NAME            the registered loss, fused with the output layer; a reference's output layer is included
    NAME, logits    the same loss with the logits of policy and reference in memory

Memory is the peak of the process beyond what stood before (weights, their gradient buffer, hidden states),
and on CUDA that of the allocator.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_sftrl import LossInputs, TokenBatch, TokenDistribution, build_loss
from megatron_sftrl.config.schema import ParallelSection
from megatron_sftrl.doctor.ranks import free_port
from megatron_sftrl.engine.parallel import parallel_context
from megatron_sftrl.losses.one_pass import one_pass
from megatron_sftrl.losses.weights import weighted_sum
from megatron_sftrl.vocab_parallel import OutputLayer

PLAIN, RELEASED = "plain", "gift, released"
LOSSES: dict[str, dict[str, Any]] = {
    "sft": {},
    "gift": {},
    "curiosft": {},
    "entropy": {},
    "pear": {"variant": "token"},
    "pear block": {"variant": "block"},
    "pear sequence": {"variant": "sequence"},
}
TIME_LIMITS = {"sft": 1.1, "gift": 1.4, "curiosft": 1.5, **{n: 1.5 for n in LOSSES if n.startswith("pear")}}
MEMORY_LIMITS = {**{name: 0.25 for name in TIME_LIMITS}, "sft": 0.2}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of one process's share of the work."""

    tokens: int
    vocab_size: int
    hidden: int
    tp: int

    @property
    def columns(self) -> int:
        """V_local, padded alike on all ranks."""
        return -(-self.vocab_size // self.tp)


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """Hidden states and output weights of policy and reference, and the weight's gradient buffer."""

    hidden: Tensor
    weight: Tensor
    main_grad: Tensor
    reference_hidden: Tensor
    reference_weight: Tensor


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
    contenders = [PLAIN, RELEASED, *LOSSES, *(f"{name}, logits" for name in ("sft", "gift", "curiosft"))]
    if arguments.only:
        wanted = [name.strip() for name in arguments.only.split("+")]
        contenders = [name for name in contenders if name == PLAIN or name in wanted]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for _ in range(arguments.repeats):
        for name in contenders:
            found[name].append(_in_children(name, sizes))
    facts = _facts(found, sizes)
    _print(facts)
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
        step = _step(name, _model(sizes, device), _batch(sizes, device), sizes)
        before = _reset_peak(device)
        step()
        peak = _peak(device) - before
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return {"seconds": time.perf_counter() - start, "peak_bytes": peak}


def _model(sizes: Sizes, device: torch.device) -> Model:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    def weight() -> Tensor:
        return normal(sizes.columns, sizes.hidden) * (3.0 / sizes.hidden**0.5)

    return Model(
        hidden=normal(sizes.tokens, sizes.hidden).requires_grad_(),
        weight=weight().requires_grad_(),
        main_grad=torch.zeros(sizes.columns, sizes.hidden, device=device),
        reference_hidden=normal(sizes.tokens, sizes.hidden),
        reference_weight=weight(),
    )


def _batch(sizes: Sizes, device: torch.device) -> TokenBatch:
    """Eight sequences; every token carries loss."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, sizes.vocab_size, (sizes.tokens + 1,), generator=generator)
    length = sizes.tokens // 8
    bounds = torch.arange(9, dtype=torch.int32) * length
    bounds[-1] = sizes.tokens
    place = torch.arange(sizes.tokens)
    return TokenBatch(
        tokens=tokens[:-1],
        labels=tokens[1:],
        positions=place - bounds[torch.bucketize(place, bounds[1:], right=True)],
        loss_mask=torch.ones(sizes.tokens, dtype=torch.bool),
        cu_seqlens=bounds,
        token_weight=torch.full((sizes.tokens,), 1.0 / sizes.tokens),
        behavior_logprobs=torch.full((sizes.tokens,), -10.0),
    ).to(device)


def _step(name: str, model: Model, batch: TokenBatch, sizes: Sizes) -> Callable[[], None]:
    """Forward and backward of one contender."""
    if name == PLAIN:
        total = functools.partial(_plain, model, batch)
    elif name == RELEASED:
        total = functools.partial(_released_gift, model, batch)
    elif name.endswith(", logits"):
        total = functools.partial(_with_logits, name.removesuffix(", logits"), model, batch, sizes)
    else:
        total = functools.partial(_fused, name, model, batch, sizes)

    def step() -> None:
        model.hidden.grad = None
        model.main_grad.zero_()
        total().backward()

    return step


def _plain(model: Model, batch: TokenBatch) -> Tensor:
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    logits = _Linear.apply(model.hidden, model.weight, model.main_grad)
    loss = vocab_parallel_cross_entropy(logits, batch.labels)
    return weighted_sum(loss, batch.token_weight)


def _released_gift(model: Model, batch: TokenBatch) -> Tensor:
    """arXiv:2601.09233's trainer, beta 20 and eps 1e-10, on all logits of one process."""
    logits = _Linear.apply(model.hidden, model.weight, model.main_grad)
    with torch.no_grad():
        prior = F.softmax(F.linear(model.reference_hidden, model.reference_weight).float(), dim=-1)
        tilted = torch.log(prior + 1e-10)
        tilted.scatter_add_(1, batch.labels[:, None], torch.full_like(tilted[:, :1], 20.0))
        target = F.softmax(tilted, dim=-1)
    loss = -(target * F.log_softmax(logits.float(), dim=-1)).sum(-1)
    return weighted_sum(loss, batch.token_weight)


def _with_logits(name: str, model: Model, batch: TokenBatch, sizes: Sizes) -> Tensor:
    def distribution(logits: Tensor) -> TokenDistribution:
        return TokenDistribution.from_logits(logits, **_where(sizes))

    reference = F.linear(model.reference_hidden, model.reference_weight) if _has_reference(name) else None
    inputs = LossInputs(
        policy=distribution(_Linear.apply(model.hidden, model.weight, model.main_grad)),
        batch=batch,
        reference=None if reference is None else distribution(reference),
    )
    return weighted_sum(_loss(name)(inputs).token_loss, batch.token_weight)


def _fused(name: str, model: Model, batch: TokenBatch, sizes: Sizes) -> Tensor:
    loss, reference = _loss(name), None
    policy = OutputLayer(hidden=model.hidden, weight=model.weight, main_grad=model.main_grad)
    if _has_reference(name):
        reference = OutputLayer(hidden=model.reference_hidden, weight=model.reference_weight)

    def of_tokens(
        policy: TokenDistribution, reference: TokenDistribution | None, batch: TokenBatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        output = loss(LossInputs(policy=policy, reference=reference, batch=batch, is_part=True))
        return output.token_loss, output.metrics

    if loss.is_token_local:
        to_distribution = functools.partial(TokenDistribution.from_logits, is_scratch=True, **_where(sizes))
        return one_pass(of_tokens, policy, reference, batch, to_distribution).total
    assert reference is None
    inputs = LossInputs(policy=TokenDistribution.from_output_layer(policy, **_where(sizes)), batch=batch)
    return weighted_sum(loss(inputs).token_loss, batch.token_weight)


class _Linear(torch.autograd.Function):
    """hidden @ weight.T that adds the weight's gradient to its buffer, as Megatron's fused kernel does."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, main_grad: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.main_grad = main_grad
        return F.linear(hidden, weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        hidden, weight = ctx.saved_tensors
        if grad.dtype == ctx.main_grad.dtype:
            ctx.main_grad.addmm_(grad.t(), hidden)
        else:
            ctx.main_grad.add_(torch.mm(grad.t(), hidden, out_dtype=ctx.main_grad.dtype))
        return grad @ weight, None, None


def _loss(name: str):
    return build_loss(name.split()[0], LOSSES[name])


def _has_reference(name: str) -> bool:
    return "reference" in _loss(name).needs


def _where(sizes: Sizes) -> dict[str, Any]:
    group = dist.group.WORLD if sizes.tp > 1 else None
    return {
        "vocab_size": sizes.vocab_size,
        "group": group,
        "padded_vocab_size": sizes.columns * sizes.tp,
    }


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
