"""How many ranks stand along each axis."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sftrl.config.schema import ParallelSection


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Sizes of the axes; tp * cp * dp * pp ranks in all, dealt anew for experts as etp * ep * edp * pp.

    Args:
        tp, pp, vp, cp, dp: as in the parallel section.
        ep, etp, edp: of the experts; edp is what is left over for copies of an expert.
        sequence_parallel: the residual stream is split over tp.
    """

    tp: int
    pp: int
    vp: int
    cp: int
    dp: int
    ep: int
    etp: int
    edp: int
    sequence_parallel: bool

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return self.tp * self.cp * self.dp * self.pp

    @property
    def num_chunks(self) -> int:
        """Pieces that the layers are cut into, over all pipeline stages."""
        return self.pp * self.vp


def grid_of(parallel: ParallelSection, world_size: int) -> Grid:
    """The axes of a job that config.checks has accepted."""
    etp = parallel.etp or parallel.tp
    return Grid(
        tp=parallel.tp,
        pp=parallel.pp,
        vp=parallel.vp,
        cp=parallel.cp,
        dp=world_size // (parallel.tp * parallel.pp * parallel.cp),
        ep=parallel.ep,
        etp=etp,
        edp=world_size // (etp * parallel.ep * parallel.pp),
        sequence_parallel=parallel.sequence_parallel,
    )
