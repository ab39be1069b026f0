"""What the nodes of a job tell before its first step; two of them, as processes without Slurm."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import ROOT

H100, A100 = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"


def check(logs: Path, gpus: list[list[str]], *run: str) -> tuple[int, str]:
    """Code and words of the first node, where each node has these GPUs."""
    programs = []
    for index in reversed(range(len(gpus))):  # the first one waits for the others
        folder = logs / f"bin-{index}"
        folder.mkdir(parents=True)
        lines = [f"GPU {place}: {name} (UUID: GPU-{place})" for place, name in enumerate(gpus[index])]
        (folder / "nvidia-smi").write_text("#!/bin/sh\ncat << END\n" + "\n".join(lines) + "\nEND\n")
        (folder / "nvidia-smi").chmod(0o755)
        environment = {
            **os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{folder}:{os.environ['PATH']}",
            "SLURM_NODEID": str(index), "SLURM_NNODES": str(len(gpus)), "SLURM_JOB_ID": "7",
            "SLURMD_NODENAME": f"node{index}", "SLURM_GPUS_PER_NODE": "2",
            "SFTRL_LAUNCH_NODES": " ".join(f"node{each}" for each in range(len(gpus))),
        }  # fmt: skip
        programs.append(
            subprocess.Popen(
                [sys.executable, str(ROOT / "slurm/check_node.py"), str(logs), "2", *run],
                env=environment,
                text=True,
                stderr=subprocess.PIPE,
            )
        )
    ended = [(program.communicate(timeout=120)[1], program.returncode) for program in programs]
    return ended[-1][1], ended[-1][0]


def test_nodes_with_gpus_of_one_type_pass(tmp_path: Path) -> None:
    assert check(tmp_path, [[H100, H100], [H100, H100]]) == (0, "")
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("gpus", "seen"),
    [
        ([[H100, H100], [A100, A100]], f"({H100}: node0; {A100}: node1)"),
        ([[A100, H100], [A100, H100]], f"({A100}: node0 node1; {H100}: node0 node1)"),
    ],
    ids=["between nodes", "inside a node"],
)
def test_gpus_of_several_types_are_refused_with_the_nodes_that_have_them(
    gpus: list[list[str]], seen: str, tmp_path: Path
) -> None:
    code, said = check(tmp_path, gpus)
    assert code == 2
    assert f"error: the nodes have GPUs of 2 types {seen}: ask for one" in said
    assert "--exclude" in said
    assert (tmp_path / "refused").exists(), "the mark after which common.sh does not try again"


def test_a_mistake_in_the_configuration_is_refused_and_a_file_system_that_fails_is_not(
    tmp_path: Path,
) -> None:
    wrong = check(tmp_path / "wrong", [[H100, H100]], "sft", str(tmp_path / "absent.yaml"))
    assert (wrong[0], (tmp_path / "wrong/refused").exists()) == (2, True)
    assert "error: no such configuration file" in wrong[1]
    # Nothing can be read from this file: an I/O error (EIO), which a disk that fails would give.
    failing = check(tmp_path / "failing", [[H100, H100]], "sft", "/proc/self/mem")
    assert (failing[0], (tmp_path / "failing/refused").exists()) == (1, False)
    assert "Input/output error" in failing[1]
