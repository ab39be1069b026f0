"""Moves the live policy's weights out of the trainer's shards into a rollout engine's, without a checkpoint.

Who holds what is told once, when the Resharder is made; an update then costs the messages for the parts that
a rank's engine needs and the rank does not hold. Where trainer and engine cut alike, there are none.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_sftrl.engine.live_weights import live_weights
from megatron_sftrl.engine.model import LanguageModel
from megatron_sftrl.engine.parallel import ParallelContext
from megatron_sftrl.engine.reshard_plan import Holdings, plan_rounds
from megatron_sftrl.engine.weight_stream import ReshardReport, StreamPlan, WeightStream
from megatron_sftrl.errors import UserError
from megatron_sftrl.models.architecture import Architecture
from megatron_sftrl.models.engine_shards import EngineLayout, engine_boxes
from megatron_sftrl.models.tensors import hf_shapes


class Resharder:
    """Streams of the policy's weights for the engine ranks of this job; construction is collective.

    Args:
        chunks: the policy's chunks on this rank, without DDP.
        architecture: of the policy.
        parallel: this rank's place.
        layout: how the ranks form engines; `EngineLayout(tp=1, world_size=...)` for whole tensors everywhere.
        bucket_bytes: an update takes at most the memory of two buckets and the largest tensor. (A row of a
            tensor travels whole, however large.)
        is_checked: fill what the engine does not read with NaN, so that a wrong share shows.
        has_checksums: compare the bits of every part at its holder and at its receiver.
    Raises:
        UserError: on every rank: an engine that cannot cut the model like this, a part of the model that no
            rank holds or that two hold differently, weights of several dtypes.
    """

    def __init__(
        self,
        chunks: Sequence[LanguageModel],
        architecture: Architecture,
        parallel: ParallelContext,
        layout: EngineLayout,
        *,
        bucket_bytes: int,
        is_checked: bool = False,
        has_checksums: bool = False,
    ) -> None:
        if bucket_bytes < 1:
            raise UserError(f"bucket_bytes = {bucket_bytes}: at least 1, commonly 256 MiB or more")
        assert layout.world_size == parallel.world_size
        self.layout = layout
        self.last_report: ReshardReport | None = None
        self._chunks, self._architecture = chunks, architecture
        shares = [engine_boxes(architecture, tp=layout.tp, tp_rank=rank) for rank in range(layout.tp)]
        wanted = [shares[layout.tp_rank(rank)] for rank in range(parallel.world_size)]
        weights = live_weights(chunks, architecture)
        self._boxes = weights.boxes()
        holdings: list[tuple[Holdings, set[torch.dtype]]] = [None] * parallel.world_size  # type: ignore[list-item]
        mine = Holdings(host=socket.gethostname(), boxes=self._boxes)
        dist.all_gather_object(holdings, (mine, weights.dtypes()))
        dtypes = set[torch.dtype]().union(*(kinds for _, kinds in holdings))
        if len(dtypes) != 1:
            raise UserError(
                f"weights of one dtype are expected, got {sorted(map(str, dtypes))}: set model.dtype"
            )
        (dtype,) = dtypes
        shapes = hf_shapes(architecture)
        self._plan = StreamPlan(
            shapes=shapes,
            share=wanted[parallel.rank],
            rounds=plan_rounds(
                shapes,
                wanted,
                [each for each, _ in holdings],
                rank=parallel.rank,
                element_bytes=dtype.itemsize,
                # Three messages share two buckets: the received one that is unpacked, and both directions of
                # the exchange that is under way meanwhile.
                bucket_bytes=max(1, 2 * bucket_bytes // 3),
            ),
            dtype=dtype,
            device=parallel.device,
            is_checked=is_checked,
            has_checksums=has_checksums,
        )

    def stream(self) -> WeightStream:
        """The weights as they are now; every rank opens its stream, and ends it, at the same time.

        Call it after PolicyEngine.gather_parameters(). Nothing may change the weights before the end.

        Returns:
            An iterator of (Hugging Face name, tensor), to be used as a context manager.
        """
        weights = live_weights(self._chunks, self._architecture)
        assert weights.boxes() == self._boxes, "the policy was cut anew after the Resharder was made"
        return WeightStream(self._plan, weights, on_finish=self._keep)

    def _keep(self, report: ReshardReport) -> None:
        self.last_report = report
