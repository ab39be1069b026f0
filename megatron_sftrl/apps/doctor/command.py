"""`sftrl doctor loss`: examine a loss, say what holds, and give for what does not a command that shows it."""

from __future__ import annotations

import argparse
import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sftrl.apps.doctor.case import LENGTHS, VOCAB_SIZE
from megatron_sftrl.apps.doctor.checks import CHECKS, Check, Examination, Finding, examine
from megatron_sftrl.apps.doctor.evaluation import LossSpec
from megatron_sftrl.apps.doctor.ranks import RankPool
from megatron_sftrl.config.load import options_of
from megatron_sftrl.errors import UserError
from megatron_sftrl.losses.registry import DEFAULT_REGISTRY
from megatron_sftrl.registry import load_module, nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorRequest:
    """What `sftrl doctor loss` is asked.

    Args:
        loss: registered name; the one that `modules` register when not given.
        options: key=value words, values in YAML.
        only: names of checks; all when empty.
        timeout_s: seconds for one layout of several ranks.
    """

    loss: str | None
    modules: Sequence[str]
    options: Sequence[str]
    only: Sequence[str]
    seed: int
    timeout_s: float


def request_of(parsed: argparse.Namespace) -> DoctorRequest:
    """The request that a command line makes (add_loss_arguments)."""
    return DoctorRequest(
        loss=parsed.loss,
        modules=parsed.module,
        options=parsed.option,
        only=parsed.only,
        seed=parsed.seed,
        timeout_s=parsed.timeout,
    )


def run_doctor(request: DoctorRequest) -> bool:
    """Print a line for each property of the loss as it is found; whether all of them hold.

    Raises:
        UserError: an unknown loss, option or check, a module that registers none or several losses.
    """
    checks = _checks(request.only)
    spec = LossSpec(
        name=request.loss or _only_loss_of(request.modules),
        options=options_of(request.options),
        modules=tuple(request.modules),
    )
    loss = spec.build()
    needs = ", ".join(loss.needs) or "nothing more"
    print(
        f"doctor: loss {loss.name} (needs {needs}), seed {request.seed}: {len(LENGTHS)} sequences, "
        f"{sum(LENGTHS)} tokens, vocabulary {VOCAB_SIZE}"
    )
    findings: list[Finding] = []
    with RankPool() as pool:
        examination = Examination(
            spec=spec, loss=loss, seed=request.seed, pool=pool, timeout_s=request.timeout_s
        )
        for finding in examine(examination, checks):
            findings.append(finding)
            _print_finding(finding, request, spec)
    num_bad = sum(bool(finding.problems) for finding in findings)
    skipped = len(checks) - len(findings)
    if skipped:
        print(f"{skipped} properties were not looked at: the loss gives no answer to compare with")
    print(
        f"{num_bad} of {len(findings)} properties FAILED"
        if num_bad
        else f"all {len(findings)} properties hold"
    )
    return not num_bad


def _checks(names: Sequence[str]) -> list[Check]:
    known = [check.name for check in CHECKS]
    for name in names:
        if name not in known:
            raise UserError(
                f"--only: unknown property {name!r}{nearest(name, known)}; known: {', '.join(known)}"
            )
    return [check for check in CHECKS if not names or check.name in names]


def _only_loss_of(modules: Sequence[str]) -> str:
    """The one loss that the modules register."""
    if not modules:
        raise UserError("doctor loss: expected --loss NAME or --module FILE, got neither")
    files = [str(Path(load_module(module, key="--module").__file__ or "").resolve()) for module in modules]
    names = [name for name in DEFAULT_REGISTRY.names() if DEFAULT_REGISTRY.get(name).origin in files]
    if len(names) != 1:
        raise UserError(
            f"doctor loss: expected one loss registered in {', '.join(modules)}, got "
            f"{', '.join(names) or 'none'}; choose with --loss NAME"
        )
    return names[0]


def _print_finding(finding: Finding, request: DoctorRequest, spec: LossSpec) -> None:
    says = next(check.says for check in CHECKS if check.name == finding.check)
    verdict = "FAILED" if finding.problems else "ok"
    print(f"{finding.check:<14}{verdict:<8}{says if finding.problems else finding.detail}", flush=True)
    for problem in finding.problems:
        print(textwrap.indent(problem, " " * 4))
    if finding.problems:
        print(f"    again: {_again(finding.check, request, spec)}", flush=True)


def _again(check: str, request: DoctorRequest, spec: LossSpec) -> str:
    """The command line that runs this check alone."""
    words = ["sftrl", "doctor", "loss", "--loss", spec.name]
    words += [word for module in request.modules for word in ("--module", module)]
    words += [word for option in request.options for word in ("--option", option)]
    return shlex.join([*words, "--only", check, "--seed", str(request.seed)])
