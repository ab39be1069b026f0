"""A reward that does to its worker what the response says; loaded by path, as a user's file is."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

from megatron_sftrl import Canary, RewardConfig, RewardInputs, RewardOutput, register_reward


def channel() -> int:
    """The worker's socket."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
            return int(name)
    raise AssertionError("a worker has a socket")


def forge() -> None:
    """Write a perfect score into the socket before the worker answers."""
    os.write(channel(), b'{"id": 0, "outcome": "ok", "reward": 1e9, "lenient": 1e9, "metrics": {}}\n')
    time.sleep(60)


def answer_twice() -> None:
    """Leave a score for the next sample in the socket."""
    reply = b'{"id": %d, "outcome": "ok", "reward": 1e9, "lenient": 1e9, "metrics": {}}\n'
    os.write(channel(), b"".join(reply % number for number in range(1000)))


def speak_nonsense() -> None:
    """Send a line that is no JSON."""
    os.write(channel(), b"[" * 10**5 + b"\n")
    time.sleep(60)


def send_a_list() -> None:
    """Send JSON that is no reply."""
    os.write(channel(), b"[]\n")
    time.sleep(60)


def flood() -> None:
    """Send what never ends in a line."""
    while True:
        os.write(channel(), b"x" * 2**16)


def bomb() -> None:
    """Take memory without end."""
    held = []
    while True:
        held.append(bytes(2**26))


def hang() -> None:
    """Never return."""
    while True:
        pass


def chatter() -> None:
    """Print where a careless protocol would listen."""
    print('{"id": 0, "outcome": "ok", "reward": 1e9}', flush=True)
    os.write(1, b"garbage\n")
    os.write(2, b"\xff\xfe\n")
    os.write(0, b"more garbage\n")


ACTS = {
    "hang": hang,
    "sleep": lambda: time.sleep(60),
    "slow": lambda: time.sleep(1.5),
    "bomb": bomb,
    "exit": lambda: os._exit(0),
    "sys.exit": lambda: sys.exit(0),
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "real-time signal": lambda: os.kill(os.getpid(), 40),
    "segfault": lambda: ctypes.string_at(0),
    "recursion": lambda: json.loads("[" * 10**5),
    "raise": lambda: {}["no such key"],
    "interrupt": lambda: signal.raise_signal(signal.SIGINT),
    "forge": forge,
    "flood": flood,
    "answer twice": answer_twice,
    "nonsense": speak_nonsense,
    "list": send_a_list,
    "chatter": chatter,
    "processor": lambda: resource.setrlimit(resource.RLIMIT_CPU, (0, -1)) or hang(),
}

VALUES = {
    "nan": RewardOutput(reward=float("nan")),
    "huge": RewardOutput(reward=-1e308),
    "infinite": RewardOutput(reward=float("-inf")),
    "lenient nan": RewardOutput(reward=1.0, lenient=float("nan")),
    "metric nan": RewardOutput(reward=1.0, metrics={"m": float("nan")}),
    "text": RewardOutput(reward="much"),  # type: ignore[arg-type]
    "number": 1.0,
    "none": None,
}


@register_reward("hostile", is_confined=False)
def hostile(inputs: RewardInputs, config: RewardConfig) -> RewardOutput:
    """A number is the reward; a word is an act, or a value to return."""
    if inputs.response in VALUES:
        return VALUES[inputs.response]  # type: ignore[return-value]
    if inputs.response in ACTS:
        ACTS[inputs.response]()
        return RewardOutput(reward=7.0)
    return RewardOutput(reward=float(inputs.response))


@register_reward("checksum")
def checksum(inputs: RewardInputs, config: RewardConfig) -> RewardOutput:
    """Whether the text arrived as it was sent."""
    raw = inputs.response.encode("utf-8", "surrogatepass")
    return RewardOutput(reward=float(zlib.crc32(raw)), metrics={"length": len(inputs.response)})


@register_reward("inside")
def inside(inputs: RewardInputs, config: RewardConfig) -> RewardOutput:
    """What a worker can see of the trainer."""
    environment = json.dumps(dict(os.environ)) + Path("/proc/self/environ").read_text(errors="replace")
    links = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            continue  # the descriptor that listed the directory
    return RewardOutput(
        reward=1.0,
        metrics={
            "secrets": environment.count(str(inputs.row["secret"])),
            "parents_files": sum(link == inputs.row["file"] for link in links),
            "descriptors": len(links),
            "loaded_torch": "torch" in sys.modules,
            "pid": os.getpid(),
            "memory": resource.getrlimit(resource.RLIMIT_AS)[0],
            "core": resource.getrlimit(resource.RLIMIT_CORE)[0],
            "file": resource.getrlimit(resource.RLIMIT_FSIZE)[0],
            "processor": resource.getrlimit(resource.RLIMIT_CPU)[0] - time.process_time(),
            "is_home_its_directory": os.environ["HOME"] == os.getcwd() == os.environ["TMPDIR"],
        },
    )


@register_reward("leaves_a_child", is_confined=False)
def leaves_a_child(inputs: RewardInputs, config: RewardConfig) -> RewardOutput:
    """Start a process, write down both numbers, and hang."""
    child = subprocess.Popen(["sleep", "60"])
    with open(str(inputs.row["file"]), "w") as file:
        file.write(f"{os.getpid()} {child.pid}\n")
    hang()
    return RewardOutput(reward=1.0)


SPOILT = []


@register_reward("spoilt")
def spoilt(inputs: RewardInputs, config: RewardConfig) -> RewardOutput:
    """A number is the reward; `spoil` leaves a state behind in which nothing can be judged."""
    if inputs.response == "spoil":
        SPOILT.append(True)
    if SPOILT:
        raise RuntimeError("a cache is broken")
    return RewardOutput(reward=float(inputs.response))


@register_reward("always_raises", is_confined=False)
def always_raises(inputs: RewardInputs, config: RewardConfig) -> RewardOutput:
    """Write down the worker's number, and fail."""
    with open(str(inputs.row["file"]), "a") as file:
        file.write(f"{os.getpid()}\n")
    raise RuntimeError("the judge is not reachable")


@register_reward("late_at_first", is_confined=False)
def late_at_first(inputs: RewardInputs, config: RewardConfig) -> RewardOutput:
    """Never in time when it is asked first."""
    been_here = Path(str(inputs.row["file"]))
    if not been_here.exists():
        been_here.touch()
        time.sleep(60)
    return RewardOutput(reward=1.0)


@register_reward("evaluates")
def evaluates(inputs: RewardInputs, config: RewardConfig) -> RewardOutput:
    """Run the response as Python, as sympy's parser may."""
    eval(inputs.response)
    return RewardOutput(reward=1.0)


@register_reward("orphan", is_confined=False)
def orphan(inputs: RewardInputs, config: RewardConfig) -> RewardOutput:
    """Kill the trainer, and go on computing."""
    with open(str(inputs.row["file"]), "w") as file:
        file.write(f"{os.getpid()}\n")
    os.kill(os.getppid(), signal.SIGKILL)
    hang()
    return RewardOutput(reward=1.0)


def upside_down_examples(config: RewardConfig) -> Sequence[Canary]:
    """Right and wrong exchanged."""
    return [Canary(response="2", is_right=False), Canary(response="1", is_right=True)]


@register_reward("upside_down", canaries=upside_down_examples)
def upside_down(inputs: RewardInputs, config: RewardConfig) -> RewardOutput:
    """Its examples expect the opposite."""
    return RewardOutput(reward=float(inputs.response))


@register_reward("always_zero", canaries=lambda config: [Canary(response=r, is_right=r == "a") for r in "ab"])
def always_zero(inputs: RewardInputs, config: RewardConfig) -> RewardOutput:
    """A verifier whose library has changed."""
    return RewardOutput(reward=0.0)


@register_reward("broken", canaries=lambda config: [Canary(response=r, is_right=r == "a") for r in "ab"])
def broken(inputs: RewardInputs, config: RewardConfig) -> RewardOutput:
    """A verifier whose library is gone."""
    raise ImportError("no module named verifier")


@register_reward("one_sided", canaries=lambda config: [Canary(response="a", is_right=True)])
def one_sided(inputs: RewardInputs, config: RewardConfig) -> RewardOutput:
    """Examples of one kind."""
    return RewardOutput(reward=1.0)


@register_reward("tells_its_file", is_confined=False)
def tells_its_file(inputs: RewardInputs, config: RewardConfig) -> RewardOutput:
    """The digits of the response as a number; the row's file exists once it has been asked."""
    Path(str(inputs.row["file"])).touch()
    return RewardOutput(reward=float(inputs.response.replace(" ", "")))
