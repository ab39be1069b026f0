"""What runs inside a reward worker: `python -m megatron_sftrl.rl.rewards.worker`, started by process.py.

It reads JSON lines from the socket that it finds as file descriptor 0 and writes one JSON line for each:
first the setup, answered by ready or failed, then jobs. Nothing but that socket ties it to the trainer, and
nothing that it sends can run code there.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
import resource
import signal
from collections.abc import Mapping
from typing import Any, BinaryIO

from megatron_sftrl.config.schema import RewardSection
from megatron_sftrl.errors import UserError, error_of
from megatron_sftrl.rl.rewards.api import LARGEST, RewardInputs, RewardOutput
from megatron_sftrl.rl.rewards.confinement import Confinement, enter_kernel_domain
from megatron_sftrl.rl.rewards.registry import Reward, build_rewards
from megatron_sftrl.rl.rewards.scored import OUTCOMES

# Larger than any log of a verifier; what a sample writes to files must not fill the disk.
LARGEST_FILE = 64 * 2**20
LONGEST_DETAIL = 500


def main() -> None:
    """Serve until the trainer closes its end, or is gone."""
    # A trainer started in the background of a script passes on that SIGINT is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _survive_signals_to_the_job()
    requests, replies = _take_channel()
    setup = json.loads(requests.readline())
    _limit(resource.RLIMIT_AS, setup["memory_bytes"])
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, LARGEST_FILE)
    logging.disable(logging.WARNING)  # sympy's and math-verify's remarks would hide why a worker died
    try:
        rewards = build_rewards([RewardSection(**section) for section in setup["rewards"]])
        if all(reward.entry.is_confined for reward in rewards):
            enter_kernel_domain()
        for name in dict.fromkeys(name for reward in rewards for name in reward.entry.imports):
            importlib.import_module(name)
    except Exception as error:
        is_users = isinstance(error_of("", error), UserError)
        text = str(error)[:LONGEST_DETAIL] if isinstance(error, UserError) else _text(error)
        _send(replies, {"failed": text, "is_users": is_users})
        return
    _send(replies, {"ready": True})
    confinement = Confinement()
    for line in requests:
        job = json.loads(line)
        _allow_processor_time(setup["seconds"])
        reward = rewards[job["reward"]]
        reply = _score(reward, job["inputs"], confinement)
        _send(replies, {"id": job["id"], **reply})
        if reply.get("is_last"):
            return


def _survive_signals_to_the_job() -> None:
    """Do nothing on SIGTERM and SIGUSR1; a process that a verifier forks or starts does as usual."""
    worker = os.getpid()

    def note(number: int, frame: object) -> None:
        if os.getpid() != worker:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, note)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGUSR1})


def _score(reward: Reward, inputs: Mapping[str, Any], confinement: Confinement) -> dict[str, Any]:
    try:
        with confinement.on(enabled=reward.entry.is_confined):
            output = reward(RewardInputs(**inputs))
        return _reply(output)
    except MemoryError:
        # Whatever was being built may be half there; the next sample gets a fresh process.
        return {
            "outcome": "error",
            "detail": "MemoryError: more than the worker's memory_gb",
            "is_last": True,
        }
    except Exception as error:
        return {"outcome": "error", "detail": _text(error)}


def _reply(output: object) -> dict[str, Any]:
    if not isinstance(output, RewardOutput):
        raise UserError(f"expected the reward to return a RewardOutput, got {type(output).__name__}")
    reward = float(output.reward)
    lenient = reward if output.lenient is None else float(output.lenient)
    if not isinstance(output.metrics, Mapping):
        raise UserError(f"expected metrics to be numbers by name, got {type(output.metrics).__name__}")
    metrics = {str(name): float(value) for name, value in output.metrics.items()}
    if taken := sorted({"lenient", *OUTCOMES} & metrics.keys()):
        raise UserError(f"metric {taken[0]!r} is a number that every reward has; give it another name")
    for name, value in {"reward": reward, "lenient": lenient, **metrics}.items():
        if not abs(value) <= LARGEST:
            detail = f"{name} is {value}, expected a finite number of at most {LARGEST:g} in size"
            return {"outcome": "nonfinite", "detail": detail}
    return {"outcome": "ok", "reward": reward, "lenient": lenient, "metrics": metrics}


def _take_channel() -> tuple[BinaryIO, BinaryIO]:
    """Both directions of the socket, moved to where no print and no read of standard input reaches it."""
    channel = os.dup(0)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.close(null)
    return os.fdopen(channel, "rb"), os.fdopen(os.dup(channel), "wb")


def _send(replies: BinaryIO, message: Mapping[str, Any]) -> None:
    replies.write(json.dumps(message).encode("ascii") + b"\n")
    replies.flush()


def _limit(which: int, amount: int) -> None:
    hard = resource.getrlimit(which)[1]
    if hard != resource.RLIM_INFINITY:
        amount = min(amount, hard)
    resource.setrlimit(which, (amount, amount))


def _allow_processor_time(seconds: float) -> None:
    """Move the limit for the next sample; it also ends a worker whose trainer was killed in mid-sample."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    limit = math.ceil(usage.ru_utime + usage.ru_stime) + math.ceil(seconds)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(
        resource.RLIMIT_CPU, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard)
    )


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:LONGEST_DETAIL]


if __name__ == "__main__":
    main()
