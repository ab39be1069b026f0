"""A private Slurm of two nodes on this machine: munge, slurmctld and two slurmd, in a directory of their own.

Each node has two GPUs in Slurm's books, so that the shipped scripts ask for GPUs as they do on a real
cluster; the programs find no CUDA and train on the CPU. node1 runs in a mount namespace in which one
directory is another one: what a cluster has that is not shared.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.ranks import ROOT, free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "setpriv", "unshare")
GPUS_PER_NODE = 2
GRACE_S = 120  # between the notice and the end of a job that one of the partition `urgent` preempts
TIMEOUT_S = 600.0  # a run takes half a minute; the machine may be shared with other jobs
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}
_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


def missing_programs() -> list[str]:
    """What this machine lacks for a private Slurm; root counts as a program."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]
    return missing if os.geteuid() == 0 else [*missing, "root"]


@dataclass(frozen=True)
class Cluster:
    """A running Slurm; jobs see no environment but its own."""

    root: Path
    environment: dict[str, str]

    @property
    def logs(self) -> Path:
        """Of all jobs: NAME-JOBID.out of the batch script, NAME-JOBID/ of the nodes."""
        return self.root / "logs"

    @property
    def unshared(self) -> Path:
        """A directory that each node has for itself."""
        return self.root / "unshared"

    def run(self, *command: str | Path, **environment: str) -> str:
        """Output of a command of Slurm's, which must succeed."""
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, cwd=ROOT, check=False,
            env=self.environment | environment,
        )  # fmt: skip
        assert done.returncode == 0, f"{command} failed:\n{done.stdout}{done.stderr}"
        return done.stdout

    def submit(
        self, script: str, *arguments: str | Path, options: Sequence[str] = (), **environment: str
    ) -> Job:
        """sbatch of a script of slurm/, from the repository's root, with logs in the cluster's directory."""
        words = [f"--output={self.logs}/%x-%j.out", *options, f"slurm/{script}", *arguments]
        number = self.run("sbatch", "--parsable", *words, **environment)
        return Job(self, int(number.strip().split(";")[0]))


@dataclass(frozen=True)
class Job:
    """A submitted job."""

    cluster: Cluster
    number: int

    @property
    def logs(self) -> Path:
        """The directory that common.sh makes for it."""
        return self.cluster.logs / f"{self.fields()['JobName']}-{self.number}"

    @property
    def batch_log(self) -> Path:
        """What the batch script has said."""
        return self.logs.with_name(f"{self.logs.name}.out")

    def fields(self) -> dict[str, str]:
        """What `scontrol show job` says."""
        text = self.cluster.run("scontrol", "show", "job", str(self.number), "--oneliner")
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    @property
    def state(self) -> str:
        """Slurm's word: PENDING, RUNNING, COMPLETED, ..."""
        return self.fields()["JobState"]

    def wait_until(self, is_true: Callable[[], bool], *, what: str, timeout_s: float = TIMEOUT_S) -> None:
        """Poll; the test fails with the job's logs when it ends before, or when the time is over."""
        deadline = time.monotonic() + timeout_s
        while not is_true():
            state = self.state
            if (state in ENDED and not is_true()) or time.monotonic() > deadline:
                raise AssertionError(f"{what}: not reached, the job is {state}\n{self.said()}")
            time.sleep(0.1)

    def ended(self, *, timeout_s: float = TIMEOUT_S) -> tuple[str, int]:
        """State and exit code of the batch script, once it has ended."""
        self.wait_until(lambda: self.state in ENDED, what="the end of the job", timeout_s=timeout_s)
        fields = self.fields()
        return fields["JobState"], int(fields["ExitCode"].split(":")[0])

    def said(self) -> str:
        """All logs of the batch script and of the nodes."""
        files = [self.batch_log, *sorted(self.logs.glob("*.log"))]
        return "\n".join(
            f"== {file.name}\n{file.read_text(errors='replace')}" for file in files if file.exists()
        )

    def processes(self, kind: str) -> list[psutil.Process]:
        """The job's agents (`agent`) or ranks (`rank`), in the order of node and rank."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                environment = process.environ()
                if (
                    environment.get("SLURM_JOB_ID") == str(self.number)
                    and _kind(process, environment) == kind
                ):
                    found.append((int(environment["SLURM_NODEID"]), int(environment.get("RANK", 0)), process))
        return [process for *_, process in sorted(found, key=lambda each: each[:2])]


def _kind(process: psutil.Process, environment: dict[str, str]) -> str:
    words = process.cmdline()
    if "python" not in Path(words[0]).name:
        return "other"
    if "torch.distributed.run" in words:
        return "agent"
    return "rank" if "RANK" in environment and "megatron_sftrl" in words else "other"


@contextlib.contextmanager
def slurm_cluster(root: Path) -> Iterator[Cluster]:
    """Start the daemons below `root`, and kill them with everything that they started at the end."""
    for name in ("state", "spool-node0", "spool-node1", "unshared", "node1_disk", "logs"):
        (root / name).mkdir(parents=True)
    key = root / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    (root / "gres.conf").write_text("NodeName=node[0-1] Name=gpu File=/dev/tty[0-1]\n")
    configuration = root / "slurm.conf"
    configuration.write_text(
        _CONFIGURATION.format(root=root, ports=[free_port() for _ in range(3)], host=_host(), grace_s=GRACE_S)
    )
    bind = f"mount --bind {root}/node1_disk {root}/unshared && exec slurmd -D -N node1 -f {configuration}"
    commands = [
        ["munged", "--foreground", "--force", f"--socket={root}/munge.sock", f"--key-file={key}",
         f"--log-file={root}/munge.log", f"--pid-file={root}/munge.pid", f"--seed-file={root}/munge.seed"],
        ["slurmctld", "-D", "-f", str(configuration)],
        ["slurmd", "-D", "-N", "node0", "-f", str(configuration)],
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", bind],
    ]  # fmt: skip
    environment = _environment(root, configuration)
    with (
        (root / "daemons.log").open("w") as log,
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("daemons.py")), *map(json.dumps, commands)],
            stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, cwd=root,
            start_new_session=True,  # what kills the test's process group shall not end it first
        ) as daemons,
    ):  # fmt: skip
        cluster = Cluster(root, environment)
        try:
            _wait_for_nodes(cluster)
            yield cluster
        finally:
            assert daemons.stdin is not None
            daemons.stdin.close()
            daemons.wait(60)


def _wait_for_nodes(cluster: Cluster) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        done = subprocess.run(
            ["sinfo", "-h", "-o", "%D %t"],
            capture_output=True,
            text=True,
            env=cluster.environment,
            check=False,
        )
        if re.fullmatch(r"2 idle", done.stdout.strip()):
            return
        time.sleep(0.2)
    logs = "\n".join(path.read_text() for path in cluster.root.glob("*.log") if path.is_file())
    raise AssertionError(f"no two idle nodes: {done.stdout}{done.stderr}\n{logs}")


def _environment(root: Path, configuration: Path) -> dict[str, str]:
    """No variable of another Slurm, of torchrun or of a test's ranks reaches a job."""
    ours = ("SLURM", "SBATCH", "SFTRL", "PET_", "TORCHELASTIC", "PYTEST")
    ranks = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(ours) and name not in ranks
    }
    return kept | {
        "PATH": f"{Path(sys.executable).parent}:{_PATH}",
        "SLURM_CONF": str(configuration),
        "SFTRL_DEVICE": "cpu",  # the GPUs that this Slurm gives are terminals
        "SFTRL_LOGS": str(root / "logs"),
        "SFTRL_PREFLIGHT": "0",  # a start of all processes; one test has it
        "SFTRL_PYTHON": sys.executable,
        "WANDB_SILENT": "true",
    }


def _host() -> str:
    return os.uname().nodename.split(".")[0]


_CONFIGURATION = """\
ClusterName=private
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.sock,cred_expire=20
CredType=cred/munge
SlurmctldPort={ports[0]}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=requeue_delay=1
GresTypes=gpu
JobRequeue=1
KillWait=30
MinJobAge=86400
NodeName=node0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 RealMemory=8000 Gres=gpu:2
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.2 Port={ports[2]} CPUs=4 RealMemory=8000 Gres=gpu:2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=node[0-1] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime={grace_s}
PartitionName=urgent Nodes=node[0-1] MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
"""
