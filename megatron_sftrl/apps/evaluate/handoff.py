"""`sftrl handoff`: is a checkpoint of SFT ready for RL? Numbers of its own samples, each with a limit.

A policy that has nothing left to try, is right always or never, or does not end its answers gives GRPO
nothing to learn from, whatever its accuracy is.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_sftrl.apps.evaluate.limits import Limits
from megatron_sftrl.apps.evaluate.run import EvalRequest, answers_of, run_evaluation
from megatron_sftrl.apps.evaluate.statistics import Answer, Estimate, estimate
from megatron_sftrl.config.schema import GrpoConfig
from megatron_sftrl.errors import UserError
from megatron_sftrl.observability.run_directory import write_atomically
from megatron_sftrl.rl.advantages import pass_at_k

Group = Sequence[Answer]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A number by the name of its limit, what it is held to, and whether it keeps that."""

    name: str
    found: Estimate
    limit: float | None
    is_kept: bool
    meaning: str
    source: str


def judge(groups: Sequence[Group], limits: Limits, *, seed: int, kl: Estimate | None = None) -> list[Finding]:
    """Each number and its limit, in the order of Limits; one without a limit keeps it.

    Args:
        groups: the responses to each prompt.
        kl: to the base, on demonstrations; left out when None.
    Raises:
        UserError: no prompt has two responses that could be judged.
    """
    judged = [[each for each in group if each.is_right is not None] for group in groups]
    judged = [group for group in judged if len(group) > 1]
    if not judged:
        raise UserError(
            "handoff: expected prompts with two judged responses, got none; generations.jsonl has what failed"
        )
    numbers: dict[str, tuple[Callable[[Group], float], Sequence[Group]]] = {
        "min_entropy": (_entropy, groups),
        "max_equal_groups": (_is_equal, judged),
        "min_headroom": (_headroom, judged),
        "min_finished": (lambda group: _mean([each.is_finished for each in group]), groups),
        "max_format_loss": (lambda group: _mean([_format_loss(each) for each in group]), judged),
    }
    findings = []
    for limit in fields(Limits):
        bound = getattr(limits, limit.name)
        if limit.name in numbers:
            of, over = numbers[limit.name]
            found = estimate([of(group) for group in over], seed=seed)
        elif kl is not None:
            found = kl
        else:
            continue
        if bound is None:
            is_kept = True
        elif limit.name == "min_headroom":
            is_kept = (found.value if found.low is None else found.low) > bound
        else:
            is_kept = found.value >= bound if limit.name.startswith("min_") else found.value <= bound
        findings.append(Finding(name=limit.name, found=found, limit=bound, is_kept=is_kept, **limit.metadata))
    return findings


def _entropy(group: Group) -> float:
    return _mean([value for each in group for value in each.entropies])


def _is_equal(group: Group) -> float:
    return float(len({each.is_right for each in group}) == 1)


def _headroom(group: Group) -> float:
    right = sum(bool(each.is_right) for each in group)
    return pass_at_k(len(group), right, len(group)) - right / len(group)


def _format_loss(answer: Answer) -> float:
    return float(bool(answer.is_right_leniently)) - float(bool(answer.is_right))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def run_handoff(config: GrpoConfig, request: EvalRequest, limits: Limits) -> bool:
    """Sample at temperature 1, judge, and tell; every rank calls it, rank 0 tells.

    Returns:
        Every number keeps its limit.
    Raises:
        UserError: as run_evaluation; fewer than two responses to a prompt.
    """
    if request.num_samples < 2:
        raise UserError(f"--samples: expected 2 or more, got {request.num_samples}")
    if limits.max_kl is not None and request.base is None:
        raise UserError("--max-kl: it is a limit on the distance from --base; give --base as well")
    for name, limit in asdict(limits).items():
        most = math.inf if name in ("min_entropy", "max_kl") else 1.0
        if limit is None:
            continue
        if not -1.0 <= limit <= most or not math.isfinite(limit):
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option}: expected a number from -1 to {most:g}, got {limit}")
    rollout = config.rollout.model_copy(update={"temperature": 1.0, "top_p": 1.0, "top_k": 0})
    is_teller = run_evaluation(config.model_copy(update={"rollout": rollout}), request)
    kl = None
    if request.base is not None:
        told = json.loads((request.out / "results.json").read_text(encoding="utf-8"))["results"]
        kl = Estimate(**told["demonstrations"]["kl_to_base"])
    findings = judge(answers_of(request.out, "sampled"), limits, seed=request.seed, kl=kl)
    if is_teller:
        _tell(findings, request.out)
    return all(each.is_kept for each in findings)


def _tell(findings: Sequence[Finding], out: Path) -> None:
    told = {each.name: asdict(each) for each in findings}
    write_atomically(out / "handoff.json", json.dumps(told, indent=1) + "\n")
    console = Console(file=sys.stdout, width=max(100, Console().width))  # sources in one line
    table = Table("", "found", "95 % interval", "limit", "of", "", title="ready for RL?")
    for each in findings:
        found = each.found
        interval = "" if found.low is None or found.high is None else f"{found.low:.3g} to {found.high:.3g}"
        verdict = "" if each.limit is None else "ok" if each.is_kept else "FLAGGED"
        sign = {"min_headroom": ">"}.get(each.name, ">=" if each.name.startswith("min_") else "<=")
        bound = "" if each.limit is None else f"{sign} {each.limit:g}"
        name = each.name.partition("_")[2].replace("_", " ")
        table.add_row(name, f"{found.value:.3g}", interval, bound, each.source, verdict)
    console.print(table)
    for each in findings:
        if not each.is_kept:
            console.print(f"{each.name}: {each.meaning}: {each.found.value:.3g}")
