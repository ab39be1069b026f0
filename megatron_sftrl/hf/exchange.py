"""Copies values between parts of Megatron tensors and Hugging Face tensors, as the table of names says."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_sftrl.architectures.tensors import MegatronTensor, Rectangle, rectangles
from megatron_sftrl.hf.weights import HfWeights


def fill_part(part: Tensor, tensor: MegatronTensor, offset: tuple[int, ...], weights: HfWeights) -> None:
    """Fill `part`, which begins at `offset` of `tensor`, in place; rows of vocabulary padding become zero."""
    if tensor.has_padding and offset[0] + part.shape[0] > tensor.shape[0]:
        part.zero_()
    for rectangle in rectangles(tensor, offset, tuple(part.shape)):
        weights.read_into(part[rectangle.target], rectangle.name, rectangle.source)


def split_whole(whole: Tensor, tensor: MegatronTensor) -> dict[str, Tensor]:
    """The Hugging Face tensors that a whole Megatron tensor is made of, contiguous.

    Args:
        whole: [rows, ...] without vocabulary padding; given away where it is the result itself.
        tensor: its line of the table.
    """
    pieces: dict[str, list[Rectangle]] = {}
    for rectangle in rectangles(tensor, (0,) * whole.dim(), tuple(whole.shape)):
        pieces.setdefault(rectangle.name, []).append(rectangle)
    if len(pieces) == 1:
        return {name: whole for name in pieces}
    # The table lists the rows of each Hugging Face tensor in their order.
    return {name: torch.cat([whole[each.target] for each in parts]) for name, parts in pieces.items()}
