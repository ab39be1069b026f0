"""Tensors of experts in MXFP4 against transformers' own dequantisation, bit by bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_sftrl.errors import UserError
from megatron_sftrl.models.hf_weights import open_weights

NAME = "model.layers.0.mlp.experts.gate_up_proj"


def packed(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Every pair of elements, and every exponent that is a number in bf16."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, rows, columns // 32)
    blocks = torch.randint(256, (*shape, 16), generator=generator).to(torch.uint8)
    return blocks, torch.randint(252, shape, generator=generator).to(torch.uint8)


def write(directory: Path, blocks: Tensor, scales: Tensor) -> Path:
    tensors = {f"{NAME}_blocks": blocks, f"{NAME}_scales": scales, "model.norm.weight": torch.ones(3)}
    save_file(tensors, directory / "model.safetensors")
    return directory


@pytest.mark.parametrize(("rows", "columns"), [(64, 96), (6, 32)])
def test_every_part_has_the_bits_that_transformers_makes(tmp_path: Path, rows: int, columns: int) -> None:
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    blocks, scales = packed(rows, columns)
    expected = mxfp4.convert_moe_packed_tensors(blocks, scales)
    assert expected.shape == (2, columns, rows)
    with open_weights(write(tmp_path, blocks, scales)) as weights:
        assert weights.shapes == {NAME: (2, columns, rows), "model.norm.weight": (3,)}
        assert weights.dtypes[NAME] == torch.bfloat16
        for part in (
            (),
            (slice(1, 2),),
            (slice(0, 2), slice(5, columns - 7), slice(2, 5)),
            (slice(0, 1), slice(31, 32), slice(0, 1)),
        ):
            found = weights.read(NAME, part)
            assert torch.equal(found.view(torch.int16), expected[part].contiguous().view(torch.int16)), part
        # Rows that take turns, seen as the last of four dimensions.
        wide, part = expected.unflatten(-1, (-1, 2)), (slice(1, 2), slice(3, 9), slice(1, 3), slice(1, 2))
        assert torch.equal(weights.read(NAME, part), wide[part])


def test_bytes_of_another_shape_are_refused(tmp_path: Path) -> None:
    blocks, scales = packed(6, 64)
    with pytest.raises(UserError, match=r"gate_up_proj_blocks .* is no MXFP4: expected bytes, blocks of"):
        open_weights(write(tmp_path, blocks[..., :8].contiguous(), scales))
