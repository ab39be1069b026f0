"""Ranges of a tensor cut into regions, and regions read from the chunks of a checkpoint."""

from __future__ import annotations

import contextlib
import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_sftrl.config.schema import ParallelSection
from megatron_sftrl.engine.checkpoint.format import StoredPart, StoredTensors, write_parts
from megatron_sftrl.engine.checkpoint.tensors import regions_of_range
from megatron_sftrl.engine.parallel import parallel_context
from megatron_sftrl.models.tensors import Region


@pytest.mark.parametrize("shape", [(7,), (3, 4), (1, 3, 4), (2, 3, 2), (5, 1)])
def test_regions_cover_exactly_the_range_in_order_and_are_few(shape: tuple[int, ...]) -> None:
    numel = math.prod(shape)
    tensor = torch.arange(numel).view(shape)
    for start, stop in itertools.combinations_with_replacement(range(numel + 1), 2):
        regions = list(regions_of_range(shape, start, stop))
        assert len(regions) <= 2 * len(shape) - 1
        seen = []
        for region in regions:
            part = tensor[region.slices]
            assert part.shape == region.shape
            first = int(part.flatten()[0])
            assert part.flatten().tolist() == list(range(first, first + region.numel))
            seen += part.flatten().tolist()
        assert seen == list(range(start, stop))


def test_of_many_chunks_only_those_that_a_region_touches_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The experts of all layers are chunks of one tensor: thousands, of which each read wants one."""
    whole = torch.arange(3 * 4 * 5 * 6).view(3, 4, 5, 6)

    def part(layer: int, expert: int) -> StoredPart:
        region = Region((layer, expert, 0, 0), (layer + 1, expert + 1, 5, 6))

        def fill(target: Tensor) -> None:
            target.copy_(whole[region.slices].view_as(target))

        shape = tuple(whole.shape)
        return StoredPart(key="fc1", region=region, global_shape=shape, dtype=whole.dtype, fill=fill)

    with parallel_context(ParallelSection()):
        write_parts([part(*each) for each in itertools.product(range(3), range(4))], tmp_path)
    looked: list[Region] = []
    intersect = Region.intersect
    monkeypatch.setattr(
        Region, "intersect", lambda self, other: looked.append(other) or intersect(self, other)
    )
    with contextlib.closing(StoredTensors(tmp_path)) as stored:
        for wanted, touched in (((1, 2, 1, 0), (2, 3, 4, 6)), 1), (((0, 1, 0, 2), (3, 3, 5, 4)), 6):
            region = Region(*wanted)
            target = torch.full(region.shape, -1)
            stored.read_into(target, "fc1", region.start)
            assert torch.equal(target, whole[region.slices])
            assert len(looked) == touched
            looked.clear()
