"""The first minutes on a borrowed GPU: everything that only a GPU can tell, within a time limit.

    bash tools/device_check.sh [--seconds 480] [--out FOLDER] [--rehearse] [--only losses+step]

Parts run one after the other, each a process of its own: a part that fails, or is still running when its
time is up, is reported as that and the next one begins. device_check.json and the table in device_check.txt
are written again after each part, so that a machine that is taken away leaves what was measured. --rehearse
runs the same commands with small sizes and no bounds, on the CPU as well, where tests that need CUDA are
skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_SHORTEST = 5.0  # seconds of time left under which no part is begun


@dataclass(frozen=True, slots=True, kw_only=True)
class Number:
    """One measured number and its bound, `limit` from above or, with is_least, from below."""

    value: float
    limit: float | None = None
    is_least: bool = False

    @property
    def is_kept(self) -> bool:
        if self.limit is None:
            return True
        return self.value >= self.limit if self.is_least else self.value <= self.limit

    def __str__(self) -> str:
        bound = "" if self.limit is None else f" ({'>=' if self.is_least else '<='} {self.limit:g})"
        return f"{self.value:.3g}{bound}{'' if self.is_kept else ' MISSED'}"


Numbers = dict[str, Number]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One command.

    Args:
        command: behind `python -m`; {out} is the file that it writes.
        rehearsed: what its options are in a rehearsal.
        seconds: after which it is ended.
        read: from its file to numbers.
    """

    name: str
    command: Sequence[str]
    seconds: float
    read: Callable[[Path], Numbers]
    rehearsed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a part ended: passed, missed (a bound), failed, out of time, or not begun."""

    part: str
    status: str
    seconds: float
    command: str
    numbers: Numbers
    said: str = ""


def junit_counts(file: Path) -> Numbers:
    """Of a JUnit file: none may fail, and not all may be skipped."""
    suites = ElementTree.parse(file).getroot().iter("testsuite")
    counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for suite in suites:
        counts = {name: count + int(suite.get(name, "0")) for name, count in counts.items()}
    failed = counts["failures"] + counts["errors"]
    return {
        "passed": Number(value=counts["tests"] - failed - counts["skipped"], limit=1, is_least=True),
        "failed": Number(value=failed, limit=0),
        "skipped": Number(value=counts["skipped"]),
    }


# What GIFT's four products against three, and everything else in the shadow of a product, come to.
_TIME_OF_PLAIN = {"sft": 1.05, "gift": 1.40}
_SHARE_OF_BANDWIDTH = 0.8
OTHERS = ("liger", "cut-cross-entropy")


def loss_numbers(file: Path) -> Numbers:
    """Time of each loss against plain cross-entropy, sft against others' kernels, and used bandwidth."""
    facts = json.loads(file.read_text(encoding="utf-8"))
    time_of_plain, seconds, peak = facts["time"], facts["seconds"], facts["peak_bytes"]
    numbers = {
        f"{name}, time of plain": Number(value=ratio, limit=_TIME_OF_PLAIN.get(name))
        for name, ratio in time_of_plain.items()
        if name != "plain"
    }
    for other in OTHERS:
        if other in seconds and "sft" in seconds:
            share = {"time": seconds["sft"] / seconds[other], "memory": peak["sft"] / peak[other]}
            numbers |= {
                f"sft, {what} of {other}": Number(value=value, limit=1.0) for what, value in share.items()
            }
    for name, share in list(facts.get("bandwidth", {}).items())[1:]:
        numbers[f"{name}, share of a copy's bandwidth"] = Number(
            value=share, limit=_SHARE_OF_BANDWIDTH, is_least=True
        )
    return numbers


def step_numbers(file: Path) -> Numbers:
    """Time of a step with each loss against Megatron's step with its own cross-entropy."""
    rows = json.loads(file.read_text(encoding="utf-8"))["losses"]
    return {name: Number(value=row["ratio"], limit=row["limit"]) for name, row in rows.items()}


def _tests(name: str, *files: str, seconds: float) -> Part:
    command = ("pytest", "-q", "-p", "no:cacheprovider", "--junitxml={out}", *files)
    return Part(name=name, command=command, seconds=seconds, read=junit_counts)


def _options(**options: object) -> tuple[str, ...]:
    return tuple(word for name, value in options.items() for word in (f"--{name}", str(value)))


# Most telling first: what comes late may find no time. The sizes of the losses are Qwen2.5-7B's.
PARTS = (
    _tests("kernels", "tests/gpu/test_kernels.py", seconds=120),
    Part(
        name="losses",
        command=(
            "tools.benchmarks.losses",
            *_options(tokens=8192, **{"vocab-size": 152_064}, hidden=3584, repeats=2),
            *_options(only="sft+gift+liger+cut-cross-entropy", out="{out}"),
        ),
        rehearsed={
            "--tokens": "64",
            "--vocab-size": "512",
            "--hidden": "32",
            "--repeats": "1",
            "--only": "sft+gift",
        },
        seconds=180,
        read=loss_numbers,
    ),
    _tests("training", "tests/gpu/test_cuda.py", "tests/gpu/test_te_generation.py", seconds=150),
    _tests("offload", "tests/gpu/test_offload.py", seconds=90),
    Part(
        name="step",
        command=(
            "tools.benchmarks.step",
            *_options(tokens=8192, hidden=2048, layers=16, vocab=151_936, repeats=3, out="{out}"),
        ),
        rehearsed={"--tokens": "32", "--hidden": "128", "--layers": "1", "--vocab": "512", "--repeats": "1"},
        seconds=90,
        read=step_numbers,
    ),
    _tests("switches", "tests/gpu/test_switches.py", seconds=120),
)


def run_parts(parts: Sequence[Part], folder: Path, *, seconds: float, rehearse: bool) -> list[Outcome]:
    """Every part within `seconds` in all; files and results in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    deadline, facts, outcomes = time.monotonic() + seconds, machine(), []
    for part in parts:
        left = deadline - time.monotonic()
        if left < _SHORTEST:
            outcome = Outcome(part=part.name, status="not begun", seconds=0.0, command="", numbers={})
        else:
            outcome = run_part(part, folder, seconds=min(left, part.seconds), rehearse=rehearse)
        outcomes.append(outcome)
        print(*lines_of(outcome), sep="\n", flush=True)
        write_results(folder, facts, outcomes)
    return outcomes


def run_part(part: Part, folder: Path, *, seconds: float, rehearse: bool) -> Outcome:
    """One part, ended with all of its children after `seconds`."""
    out = (folder / f"{part.name}.out").absolute()
    out.unlink(missing_ok=True)
    words = [word.replace("{out}", str(out)) for word in part.command]
    if rehearse:
        for name, value in part.rehearsed.items():
            words[words.index(name) + 1] = value
    start = time.monotonic()
    with (folder / f"{part.name}.log").open("w+") as log:
        started = subprocess.Popen(
            [sys.executable, "-m", *words],
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = started.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(started.pid, signal.SIGKILL)
            started.wait()
        log.seek(0)
        said = log.read()[-2000:]
    numbers: Numbers = {}
    try:
        numbers = part.read(out)
    except (OSError, ValueError, KeyError, ElementTree.ParseError):
        code = -1 if code == 0 else code  # it ended well and left no results
    if rehearse:  # small sizes say nothing about speed, and a CPU skips tests
        numbers = {name: Number(value=number.value) for name, number in numbers.items()}
    is_kept = all(number.is_kept for number in numbers.values())
    status = "out of time" if code is None else "missed" if not is_kept else "failed" if code else "passed"
    return Outcome(
        part=part.name,
        status=status,
        seconds=time.monotonic() - start,
        command=" ".join(["python -m", *words]),
        numbers=numbers,
        said="" if status == "passed" else said,
    )


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    import torch

    facts: dict[str, Any] = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "commit": _said("git", "rev-parse", "HEAD"),
        "device": "cpu",
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {"device": properties.name, "memory": properties.total_memory, "cuda": torch.version.cuda}
        facts["driver"] = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return facts


def _said(*command: str) -> str | None:
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


def lines_of(outcome: Outcome) -> list[str]:
    """A part's lines of the table."""
    head = f"{outcome.part:<10} {outcome.status:<12} {outcome.seconds:6.1f} s"
    numbers = [f"    {name:<44} {number}" for name, number in outcome.numbers.items()]
    if outcome.status in ("failed", "out of time"):
        numbers += [f"    | {line}" for line in outcome.said.strip().splitlines()[-5:]]
    return [head, *numbers]


def write_results(folder: Path, facts: Mapping[str, Any], outcomes: Sequence[Outcome]) -> None:
    """device_check.json and device_check.txt, under temporary names first."""
    table = [", ".join(f"{name} {value}" for name, value in facts.items())]
    table += [line for outcome in outcomes for line in lines_of(outcome)]
    whole = {"machine": facts, "parts": [asdict(outcome) for outcome in outcomes]}
    for name, text in (("json", json.dumps(whole, indent=2)), ("txt", "\n".join(table))):
        temporary = folder / f"device_check.{name}.tmp"
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(folder / f"device_check.{name}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=480.0, help="for everything (480)")
    parser.add_argument("--out", type=Path, default=Path("device_check"), help="folder (device_check)")
    parser.add_argument("--rehearse", action="store_true", help="small sizes")
    parser.add_argument("--only", help="parts, with + between them")
    arguments = parser.parse_args()
    names = [part.name for part in PARTS]
    wanted = arguments.only.split("+") if arguments.only else names
    if unknown := sorted(set(wanted) - set(names)):
        parser.error(f"--only: unknown {', '.join(unknown)}; known: {', '.join(names)}")
    parts = [part for part in PARTS if part.name in wanted]
    outcomes = run_parts(parts, arguments.out, seconds=arguments.seconds, rehearse=arguments.rehearse)
    return 0 if all(outcome.status == "passed" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
