"""A checksum that tells any single change and any exchange."""

from __future__ import annotations

import pytest
import torch

from megatron_sftrl.rollout.reshard import checksum

SIZE = 2**18 + 5  # more than one chunk


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_one_flipped_bit_anywhere_changes_the_checksum(dtype: torch.dtype) -> None:
    values = torch.randn(SIZE, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = checksum(values)
    words = values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize])
    for place in (0, 1, 2**18 - 1, 2**18, SIZE - 1):
        for bit in (0, 7, dtype.itemsize * 8 - 2):
            words[place] ^= 1 << bit
            assert checksum(values) != expected
            words[place] ^= 1 << bit
    assert checksum(values) == expected


def test_two_exchanged_elements_change_the_checksum() -> None:
    values = torch.arange(SIZE, dtype=torch.float32)
    expected = checksum(values)
    for one, other in ((0, 1), (3, 2**18 + 2), (0, SIZE - 1)):
        changed = values.clone()
        changed[one], changed[other] = values[other], values[one]
        assert checksum(changed) != expected


def test_the_checksum_is_of_the_values_not_of_how_they_lie_in_memory() -> None:
    matrix = torch.randn(7, 9, generator=torch.Generator().manual_seed(0))
    assert checksum(matrix[:, 2:5]) == checksum(matrix[:, 2:5].contiguous())
    assert checksum(matrix.T) != checksum(matrix)
    assert checksum(torch.tensor([0.0])) != checksum(torch.tensor([-0.0]))
    assert checksum(torch.tensor([torch.nan])) == checksum(torch.tensor([torch.nan]))
