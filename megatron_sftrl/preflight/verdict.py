"""Compares what all nodes found; the odd one is named. Pure functions."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_sftrl.preflight.node import NodeFacts

LARGEST_SKEW_S = 5.0
"""Clocks that differ by more make time stamps of files and logs of different nodes useless."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The outcome of one check.

    Args:
        check: what was looked at.
        detail: what was seen.
        problems: what is wrong, with the node's name and what to do; empty when all is well.
        failures: what went wrong and may pass, such as a stale file handle; told like the problems.
    """

    check: str
    detail: str
    problems: tuple[str, ...] = ()
    failures: tuple[str, ...] = ()


def compare_processes(facts: Sequence[NodeFacts]) -> Finding:
    """Every node runs the same number of processes on the same GPUs, one each."""
    nodes = {fact.node: fact for fact in facts}
    counts = {name: str(fact.local_processes) for name, fact in nodes.items()}
    problems = [
        f"{name} runs {count} processes, most nodes {usual}: submit to nodes that are alike"
        for name, count, usual in _odd_ones(counts)
    ]
    gpus = {name: "; ".join(fact.gpus) or "none" for name, fact in nodes.items()}
    problems += [
        f"{name} has the GPUs [{found}], most nodes [{usual}]: submit to nodes that are alike, or exclude it"
        for name, found, usual in _odd_ones(gpus)
    ]
    problems += [
        f"{name} has GPUs of several types [{gpus[name]}]: submit to nodes with GPUs of one"
        for name, fact in nodes.items()
        if len(set(fact.gpus)) > 1
    ]
    problems += [
        f"{name} runs {fact.local_processes} processes on {len(fact.gpus)} GPUs: start one a GPU"
        for name, fact in nodes.items()
        if fact.gpus and fact.local_processes > len(fact.gpus)
    ]
    shown = Counter(f"{len(fact.gpus)} GPUs ({fact.gpus[0]})" for fact in nodes.values() if fact.gpus)
    seen = ", ".join(f"{count} x {what}" for what, count in shown.items()) or "no GPU: the CPU run"
    return Finding(
        check="processes and GPUs",
        detail=f"{len(facts)} processes on {len(nodes)} node(s); {seen}",
        problems=tuple(problems),
    )


def compare_versions(facts: Sequence[NodeFacts]) -> Finding:
    """Every process has the same packages."""
    problems = []
    for package in facts[0].versions:
        found = {fact.node: fact.versions[package] for fact in facts}
        problems += [
            f"{node} has {package} {version}, most nodes {usual}: use one environment or image for all"
            for node, version, usual in _odd_ones(found)
        ]
    shown = ("torch", "megatron-core", "transformers")
    detail = ", ".join(f"{name} {facts[0].versions[name]}" for name in shown)
    return Finding(check="versions", detail=detail, problems=tuple(problems))


def compare_clocks(clocks: Mapping[str, float]) -> Finding:
    """The clocks of the nodes, read after one barrier, agree.

    Args:
        clocks: seconds since 1970 by node.
    """
    middle = statistics.median_low(clocks.values())
    skews = {node: clock - middle for node, clock in clocks.items()}
    problems = [
        f"the clock of {node} is {skew:+.1f} s off: let it be set (chrony, NTP), or exclude the node"
        for node, skew in skews.items()
        if abs(skew) > LARGEST_SKEW_S
    ]
    largest = max(map(abs, skews.values()))
    return Finding(check="clocks", detail=f"within {largest:.2f} s", problems=tuple(problems))


def _odd_ones(values: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """(node, its value, the usual value) of every node that is not like most."""
    usual = Counter(values.values()).most_common(1)[0][0]
    return [(node, value, usual) for node, value in values.items() if value != usual]
