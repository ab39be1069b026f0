"""The job scripts as files; needs no Slurm."""

from __future__ import annotations

import re
import socket
import subprocess
from pathlib import Path

import pytest

from megatron_sftrl.config.load import load_any_config
from megatron_sftrl.config.schema import GrpoConfig
from tests.ranks import ROOT

SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))
TRAINING = sorted((ROOT / "slurm").glob("*_70b.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_is_short_and_bash_can_read_it(script: Path) -> None:
    assert script.read_text().count("\n") <= 220
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("script", TRAINING, ids=lambda script: script.name)
def test_a_training_script_names_a_configuration_of_its_kind_and_can_be_requeued(script: Path) -> None:
    text = script.read_text()
    (found,) = re.findall(r'^train (\w+) "\$\{SFTRL_CONFIG:-\$home/(.+?)\}" "\$@"$', text, flags=re.M)
    kind, example = found
    assert isinstance(load_any_config(ROOT / example), GrpoConfig) == (kind == "grpo")
    for option in ("--signal=B:USR1@", "--requeue", "--open-mode=append", "--ntasks-per-node=1"):
        assert f"#SBATCH {option}" in text


def test_a_script_that_sbatch_did_not_start_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(TRAINING[0])], capture_output=True, text=True, check=False, cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode != 0
    assert "start it with sbatch" in done.stderr


def common(commands: str, **variables: str) -> str:
    """What bash prints behind the shared part of the scripts."""
    return subprocess.run(
        ["bash", "-c", f"source slurm/common.sh; {commands}"], capture_output=True, text=True, check=True,
        cwd=ROOT, env={"PATH": "/usr/bin:/bin", **variables},
    ).stdout  # fmt: skip


def chosen_port(job: int) -> int:
    return int(common("head=127.0.0.1; free_port; echo $port", SLURM_JOB_ID=str(job)))


def test_jobs_look_for_ports_at_different_places_and_take_none_that_is_in_use() -> None:
    first = chosen_port(7)
    assert abs(chosen_port(8) - first) > 1
    with socket.create_server(("127.0.0.1", first)):
        assert first < chosen_port(7) < 32768, "above are the kernel's own choices"


def test_hubs_are_not_asked_and_what_the_user_has_set_stays() -> None:
    said = common("home=/h logs=/l; environment; env", NCCL_IB_TIMEOUT="18", SFTRL_INTERFACE="ib0")
    for line in ("HF_HUB_OFFLINE=1", "NCCL_IB_TIMEOUT=18", "NCCL_SOCKET_IFNAME=ib0", "UCX_MEMTYPE_CACHE=n"):
        assert f"\n{line}\n" in f"\n{said}"


def ended(commands: str, **variables: str) -> tuple[int, str]:
    """Code and standard error of bash behind the shared part of the scripts."""
    done = subprocess.run(
        ["bash", "-c", f"source slurm/common.sh; {commands}"], capture_output=True, text=True, check=False,
        cwd=ROOT, env={"PATH": "/usr/bin:/bin", **variables},
    )  # fmt: skip
    return done.returncode, done.stderr


@pytest.mark.parametrize("name", ["SLURM_HET_SIZE", "SLURM_PACK_SIZE"])
def test_a_heterogeneous_job_is_refused(name: str, tmp_path: Path) -> None:
    code, said = ended("prepare", SLURM_JOB_ID="7", SLURM_SUBMIT_DIR=str(tmp_path), **{name: "2"})
    assert code == 2
    assert "a heterogeneous job of 2 parts" in said
    assert "sbatch --nodes=N" in said
    assert list(tmp_path.iterdir()) == []


CHECK = "check() { echo again >> $logs/calls; %s; }; is_ending=''; SLURM_JOB_ID=7"


@pytest.mark.parametrize(
    ("check", "calls", "code", "said"),
    [
        ("true", 1, 0, ""),
        ("return 1", 3, 1, "error: it did not pass"),
        ("[ $(wc -l < $logs/calls) = 2 ]", 2, 0, "which may pass: attempt 1 of 3"),
        ("touch $logs/refused; return 2", 1, 2, "error: it did not pass"),
        ("touch $logs/refused; return 137", 1, 2, "error: it did not pass"),
    ],
    ids=["passes", "fails", "fails once", "refuses", "refuses, and the other nodes are killed"],
)
def test_a_check_is_tried_again_after_a_failure_and_not_after_a_refusal(
    check: str, calls: int, code: int, said: str, tmp_path: Path
) -> None:
    found = ended(f"{CHECK % check}; passes check || stop_or 'it did not pass'", logs=str(tmp_path))
    assert found[0] == code
    assert said in found[1]
    assert (tmp_path / "calls").read_text().count("again") == calls
