"""The slowest rank of each step, in the metrics and, when it stays the same, on standard error."""

from __future__ import annotations

import socket
import sys

import torch
import torch.distributed as dist

from megatron_sftrl.engine.parallel import ParallelContext
from megatron_sftrl.engine.policy import PolicyEngine
from megatron_sftrl.observability.watch import Place, StragglerWatch


class Stragglers:
    """Compares the ranks after every step; every rank makes one and calls it.

    Args:
        policy: whose gradient clock is read.
        parallel: this rank's place.
    """

    def __init__(self, policy: PolicyEngine, parallel: ParallelContext) -> None:
        self._policy, self._parallel = policy, parallel
        places = [Place(host="", stage=0)] * parallel.world_size
        dist.all_gather_object(places, Place(host=socket.gethostname(), stage=parallel.pp_rank))
        self._watch = StragglerWatch(places)

    def numbers(self) -> dict[str, float]:
        """ranks/slowest (its number), its seconds to its own gradients, and how many times its peers'."""
        own = torch.tensor([self._policy.clock.collect()], device=self._parallel.device)
        everyone = own.new_empty(self._parallel.world_size)
        dist.all_gather_into_tensor(everyone, own)
        slowest, warning = self._watch.note(everyone.tolist())
        if warning is not None and self._parallel.rank == 0:
            print(warning, file=sys.stderr, flush=True)
        if slowest is None:
            return {}
        return {
            "ranks/slowest": slowest.rank,
            "ranks/slowest_seconds": slowest.seconds,
            "ranks/slowdown": slowest.slowdown,
        }
