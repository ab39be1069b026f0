"""Copies values between parts of Megatron tensors and Hugging Face tensors, as the table of names says."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from megatron_sftrl.architectures.tensors import MegatronTensor, rectangles
from megatron_sftrl.hf.weights import HfWeights


def fill_part(part: Tensor, tensor: MegatronTensor, offset: tuple[int, ...], weights: HfWeights) -> None:
    """Fill `part`, which begins at `offset` of `tensor`, in place; rows of vocabulary padding become zero."""
    if tensor.has_padding and offset[0] + part.shape[0] > tensor.shape[0]:
        part.zero_()
    for rectangle in rectangles(tensor, offset, tuple(part.shape)):
        weights.read_into(part[rectangle.target], rectangle.name, rectangle.source)


def fill_whole(
    whole: Tensor, name: str, tensor: MegatronTensor, read_into: Callable[[Tensor, tuple[int, ...]], None]
) -> None:
    """Fill the Hugging Face tensor `name` in place from the Megatron tensor that holds it.

    Args:
        whole: of the tensor's shape.
        name: one of those that `tensor` is made of.
        tensor: its line of the table.
        read_into: fills its first argument with the box of the Megatron tensor that begins at the second.
    """
    for rectangle in rectangles(tensor, (0,) * len(tensor.shape), tensor.shape):
        if rectangle.name == name:
            read_into(whole[rectangle.source], tuple(piece.start for piece in rectangle.target))
