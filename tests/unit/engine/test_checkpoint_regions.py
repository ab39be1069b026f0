"""Ranges of a tensor cut into regions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from megatron_sftrl.engine.checkpoint.tensors import regions_of_range


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
