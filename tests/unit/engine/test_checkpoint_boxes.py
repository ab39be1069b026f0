"""Ranges of a tensor cut into boxes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from megatron_sftrl.engine.checkpoint.tensors import boxes_of_range


@pytest.mark.parametrize("shape", [(7,), (3, 4), (1, 3, 4), (2, 3, 2), (5, 1)])
def test_boxes_cover_exactly_the_range_in_order_and_are_few(shape: tuple[int, ...]) -> None:
    numel = math.prod(shape)
    tensor = torch.arange(numel).view(shape)
    for start, stop in itertools.combinations_with_replacement(range(numel + 1), 2):
        boxes = list(boxes_of_range(shape, start, stop))
        assert len(boxes) <= 2 * len(shape) - 1
        seen = []
        for box in boxes:
            place = tuple(slice(a, a + n) for a, n in zip(box.offset, box.shape, strict=True))
            part = tensor[place]
            assert part.shape == box.shape
            assert part.flatten().tolist() == list(range(box.start, box.start + part.numel()))
            seen += part.flatten().tolist()
        assert seen == list(range(start, stop))
