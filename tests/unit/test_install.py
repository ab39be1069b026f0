"""slurm/install.sh, with a Python that only writes down what it is asked for."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.unit.test_dependencies import ROOT, setup_arguments

RECORDER = """#!/bin/bash
# Stands for python3.X and for a virtual environment's python.
[ "$1" != -c ] || {{ [ {version} = right ]; exit; }}
[ "$1 $2" != "-m venv" ] || {{ mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; }}
printf '%s\\n' "$(printf ' %q' "$@")" >> {log}
[[ "$*" != *{fails}* ]]
"""
PIP = ["-m", "pip", "--disable-pip-version-check", "install"]


class Machine:
    """A folder with a recording Python, and an environment to be made in it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.venv, self.log = folder, folder / "shared/venv", folder / "log"

    def install(
        self, *arguments: str, version: str = "right", fails: str = "never"
    ) -> subprocess.CompletedProcess[str]:
        """The script, with pip failing where its words hold `fails`."""
        for name in ("python3.11", "python3.12"):
            python = self.folder / name
            python.write_text(RECORDER.format(log=self.log, version=version, fails=fails))
            python.chmod(0o755)
        environment = {name: value for name, value in os.environ.items() if name != "SFTRL_PYTHON"}
        path = f"{self.folder}:/usr/bin:/bin"
        return subprocess.run(
            ["bash", "slurm/install.sh", *arguments],
            cwd=ROOT,
            env={**environment, "PATH": path, "SFTRL_VENV": str(self.venv)},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def asked(self) -> list[list[str]]:
        """Arguments of every Python that was started, but for `-c`."""
        return [shlex.split(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_torch_comes_first_then_what_compiles_then_what_is_compiled_for_this_torch(machine: Machine) -> None:
    done = machine.install()
    assert done.returncode == 0, done.stderr
    first, torch, builders, engine, ours, check = machine.asked()
    assert first == ["-m", "venv", str(machine.venv)]
    assert torch == [*PIP, "torch==2.13.0", "cuda-toolkit[cccl,crt]"]
    assert builders[:4] == PIP
    assert {Requirement(word).name for word in builders[4:]} == {
        "setuptools", "wheel", "ninja", "pybind11", "packaging",
    }  # fmt: skip
    (wanted,) = ast.literal_eval(setup_arguments()["extras_require"])["gpu"]
    assert engine == [*PIP, "--no-build-isolation", "torch==2.13.0", wanted]
    assert ours == [*PIP, "--no-build-isolation", "torch==2.13.0", "-e", f"{ROOT}[gpu,vllm,report]"]
    assert check == [str(ROOT / "slurm/check_install.py")]


def test_the_torch_is_that_of_the_tests_and_within_what_setup_py_asks_for() -> None:
    texts = [(ROOT / name).read_text() for name in ("slurm/install.sh", "tools/environment.sh")]
    first, second = ({*re.findall(r"torch==([\d.]+\d)", text)} for text in texts)
    assert len(first) == 1
    assert first == second
    (wanted,) = (
        Requirement(text)
        for text in ast.literal_eval(setup_arguments()["install_requires"])
        if Requirement(text).name == "torch"
    )
    assert wanted.specifier.contains(*first)


def test_the_recipe_inside_a_container_installs_all_but_what_the_container_has() -> None:
    text = (ROOT / "docs/cluster.md").read_text()
    recipe = text[text.index("    pip install --no-deps -e .") : text.index("Its torch has to be")]
    words = shlex.split(recipe.replace("\\\n", " "))
    named = {word for word in words if word[0].isalpha() and word not in ("pip", "install")}
    wanted = set(ast.literal_eval(setup_arguments()["install_requires"]))
    assert named == {text for text in wanted if Requirement(text).name not in ("torch", "numpy")}


def test_again_it_makes_no_other_environment(machine: Machine) -> None:
    machine.install()
    before = machine.asked()
    assert machine.install().returncode == 0
    assert machine.asked()[len(before) :] == before[1:]


def test_print_says_the_same_commands_and_runs_none(machine: Machine) -> None:
    done = machine.install("--print")
    assert done.returncode == 0, done.stderr
    assert machine.asked() == []
    assert not machine.venv.exists()
    printed = [shlex.split(line.removeprefix("+")) for line in done.stdout.splitlines()]
    machine.install()
    assert [words[1:] for words in printed] == machine.asked()


def test_check_only_looks(machine: Machine) -> None:
    machine.install()
    before = machine.asked()
    assert machine.install("--check").returncode == 0
    assert machine.asked()[len(before) :] == before[-1:]


@pytest.mark.parametrize("step", ["pybind11", "transformer-engine", "vllm", "check_install"])
def test_what_fails_ends_it(machine: Machine, step: str) -> None:
    assert machine.install(fails=step).returncode == 1
    assert step in " ".join(machine.asked()[-1])


def test_another_python_or_word_is_refused(machine: Machine) -> None:
    done = machine.install(version="wrong")
    assert done.returncode == 2
    assert "no Python 3.11 or 3.12" in done.stderr
    assert machine.install("--prin").returncode == 2
    assert machine.asked() == []


@pytest.mark.parametrize("extras", ["gpu", "test,vllm"])
def test_the_quick_start_s_environment_sends_gpus_there(extras: str, tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", "tools/environment.sh", extras],
        cwd=ROOT,
        env={**os.environ, "SFTRL_VENV": str(tmp_path / "venv")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "slurm/install.sh" in done.stderr
    assert not (tmp_path / "venv").exists()
