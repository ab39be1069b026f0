"""What lies between the nodes: who arrived, whether they reach each other, and how fast they sum."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_sftrl.apps.preflight.node import node_name
from megatron_sftrl.engine.device import select_device, start_torch_distributed

_CONNECT_S = 5.0
_FAREWELL_S = 10.0
_REPEATS = 4


class Meeting:
    """All processes of the job, through the launcher's key-value store: it works where a group might not.

    A context: rank 0 may serve the store, so on leaving it waits until the others have read what they need.

    Args:
        timeout_s: how long to wait for a process before it counts as absent.
    """

    def __init__(self, timeout_s: float) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self._timeout = timedelta(seconds=timeout_s)
        self._rounds = 0
        self._answered: list[int] = []  # ranks, at the last gathering
        if "MASTER_ADDR" in os.environ:
            try:
                store, _, _ = next(iter(dist.rendezvous("env://", timeout=self._timeout)))
            except (dist.DistStoreError, dist.DistNetworkError) as error:
                place = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT')}"
                reason = str(error).partition("\n")[0]
                raise RuntimeError(
                    f"preflight: {node_name()} rank {self.rank} did not meet all {self.size} processes at "
                    f"{place} within {timeout_s:.0f} s ({reason}): look at the logs of the other nodes"
                ) from error
        else:
            store = dist.HashStore()
        self.store = dist.PrefixStore("preflight", store)

    def __enter__(self) -> Meeting:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(dist.DistError):  # a rank that died has told why, or its node's log has
            if self.rank:
                self.store.set(f"left/{self.rank}", "")
            elif others := [rank for rank in self._answered if rank]:
                self.store.wait([f"left/{rank}" for rank in others], timedelta(seconds=_FAREWELL_S))

    def gather(self, what: str, value: Any) -> list[Any]:
        """Every process's value (JSON), by rank, on every process.

        Raises:
            RuntimeError: on every process that is there, naming the ranks that did not come.
        """
        self._rounds += 1
        key = f"{self._rounds}"
        self.store.set(f"{key}/{self.rank}", json.dumps([node_name(), value]))
        found: dict[int, Any] = {}
        deadline = time.monotonic() + self._timeout.total_seconds()
        for rank in range(self.size):
            left = max(0.01, deadline - time.monotonic())
            with contextlib.suppress(dist.DistStoreError):
                self.store.wait([f"{key}/{rank}"], timedelta(seconds=left))
                found[rank] = json.loads(self.store.get(f"{key}/{rank}"))
        self._answered = list(found)
        if len(found) < self.size:
            absent = [str(rank) for rank in range(self.size) if rank not in found]
            present = ", ".join(sorted({node for node, _ in found.values()}))
            raise RuntimeError(
                f"preflight, {what}: {len(absent)} of {self.size} processes did not answer within "
                f"{self._timeout.total_seconds():.0f} s, ranks {', '.join(absent)}; the nodes that did are "
                f"{present}: look at the logs of the others"
            )
        return [found[rank][1] for rank in range(self.size)]


@contextlib.contextmanager
def world(meeting: Meeting, timeout_s: float) -> Iterator[torch.device]:
    """One group of all processes, NCCL where CUDA is, else gloo; yields this process's device.

    Raises:
        RuntimeError: on every process, naming the nodes where it failed.
    """
    device = torch.device("cpu")
    problem = None
    try:
        device = select_device()
        start_torch_distributed(
            device,
            rank=meeting.rank,
            world_size=meeting.size,
            timeout=timedelta(seconds=timeout_s),
            store=dist.PrefixStore("group", meeting.store),
        )
        total = torch.ones(1, device=device)
        dist.all_reduce(total)
        if total.item() != meeting.size:
            problem = f"{node_name()} rank {meeting.rank}: {meeting.size} ones sum to {total.item()}"
    except Exception as error:
        problem = f"{node_name()} rank {meeting.rank}: {error}"
    problems = [text for text in meeting.gather("forming one group", problem) if text]
    if problems:
        raise RuntimeError("\n  ".join(["preflight: the processes cannot form one group", *problems]))
    try:
        yield device
        dist.barrier()
    finally:
        dist.destroy_process_group()


def unreachable_neighbour(meeting: Meeting, leaders: Mapping[str, int]) -> str | None:
    """Every node's leader listens on a free port, and the one before it connects; every process takes part.

    On a leader: why it cannot reach the next node; None when it can, and on the others. `leaders` has the
    leading rank of each node.
    """
    own = node_name()
    is_leader = leaders[own] == meeting.rank
    with socket.create_server(("", 0)) as listener:
        listener.settimeout(_CONNECT_S)
        port = listener.getsockname()[1] if is_leader else None
        places = meeting.gather("opening ports", [socket.gethostname(), port])
        problem = None
        if is_leader:
            names = sorted(leaders)
            neighbour = names[(names.index(own) + 1) % len(names)]
            host, neighbour_port = places[leaders[neighbour]]
            try:
                # The launcher's address of the first node is known to work; names are all others have.
                address = "127.0.0.1" if host == socket.gethostname() else host
                socket.create_connection((address, neighbour_port), timeout=_CONNECT_S).close()
            except OSError as error:
                problem = (
                    f"{own} cannot connect to {neighbour} ({host}:{neighbour_port}): {error}; a name that "
                    "does not resolve, a firewall, or the wrong network interface"
                )
        meeting.gather("connecting", None)  # a listener stays until its neighbour has called
    return problem


def all_reduce_rate(device: torch.device) -> float:
    """Bus bandwidth of summing one buffer over all ranks, in bytes per second.

    2 (n - 1) / n * bytes / seconds, as nccl-tests counts it; inf for one process.
    """
    size = dist.get_world_size()
    if size == 1:
        return float("inf")
    buffer = torch.ones(2**28 if device.type == "cuda" else 2**22, dtype=torch.float32, device=device)
    best = float("inf")
    for _ in range(_REPEATS):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(buffer)
        buffer.fill_(1.0)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * (size - 1) / size * buffer.nbytes / best


def clock_after_barrier() -> float:
    """This node's clock, in seconds since 1970, at a moment that all processes share."""
    dist.barrier()
    return time.time()
