"""The weights of a Hugging Face model directory: shapes at once, tensors or parts of them when asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from megatron_sftrl.errors import UserError
from megatron_sftrl.hf.mismatch import mismatch_lines
from megatron_sftrl.hf.stored import StoredTensor, read_part
from megatron_sftrl.hf.weight_files import find_weights, is_old_rope_buffer

_READABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_EMBEDDING, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
_COMPARED_BYTES = 32 * 2**20
"""Of each of two tensors that are compared, in memory at a time."""


class HfWeights:
    """Open weight files; close them, or use this as a context manager.

    Reading moves no state, so threads may share it.

    Args:
        directory: for messages.
        tensors: where each tensor lies.
        notes: what a user should know about the choice of the files.
    """

    def __init__(
        self, directory: Path, tensors: Mapping[str, StoredTensor], *, notes: tuple[str, ...] = ()
    ) -> None:
        self.directory = directory
        self.notes = notes
        self.shapes: Mapping[str, tuple[int, ...]] = {name: entry.shape for name, entry in tensors.items()}
        self.dtypes: Mapping[str, torch.dtype] = {name: entry.dtype for name, entry in tensors.items()}
        self._tensors = tensors
        self._descriptors = {file: os.open(file, os.O_RDONLY) for file in self.files}

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the tensors, sorted."""
        return tuple(sorted({entry.file for entry in self._tensors.values()}))

    def read(self, name: str, part: tuple[slice, ...] | None = None) -> Tensor:
        """Read a tensor or a rectangle of it; only the bytes of the part are read.

        Args:
            name: one of `shapes`.
            part: slices of step 1 of the leading dimensions, the others whole; None for the whole tensor.
        Returns:
            CPU tensor of the stored dtype, contiguous, of its own memory.
        Raises:
            UserError: the file was cut short after it was opened.
        """
        stored = self._tensors[name]
        return read_part(self._descriptors[stored.file], stored, part or ())

    def read_into(self, target: Tensor, name: str, part: tuple[slice, ...]) -> None:
        """Read a rectangle into a tensor of its shape, any dtype and device; directly where both agree.

        Args:
            target: filled.
            name, part: as in read().
        Raises:
            UserError: the file was cut short after it was opened.
        """
        stored = self._tensors[name]
        is_direct = target.dtype == stored.dtype and target.device.type == "cpu" and target.is_contiguous()
        found = read_part(
            self._descriptors[stored.file], stored, part, out=target.detach() if is_direct else None
        )
        if not is_direct:
            target.copy_(found)

    def check(self, expected: Mapping[str, tuple[int, ...]], *, tied: bool) -> None:
        """Refuse weights that are not exactly those of a model.

        Two extras are harmless: rotary frequencies of early Llama files, and in a model with tied embeddings
        an output layer that equals the embedding bit by bit.

        Args:
            expected: shape of each tensor of the model.
            tied: the output layer is the embedding.
        Raises:
            UserError: tensors that are missing, not expected, of another shape or of another kind of dtype:
                up to four one by one; of more, the number of each kind, its first ones and what they share.
        """
        other = []
        for name in expected:
            if name not in self.shapes:
                continue
            shape, dtype = self.shapes[name], self.dtypes[name]
            if shape != tuple(expected[name]):
                other.append(f"wrong shape: {name}: expected {list(expected[name])}, got {list(shape)}")
            if dtype not in _READABLE:
                other.append(
                    f"wrong dtype: {name}: expected a float of 16, 32 or 64 bits, got {str(dtype)[6:]}: "
                    "a quantised model must be dequantised first"
                )
        missing, unexpected = list(self._missing(expected)), list(self._unexpected(expected, tied=tied))
        if count := len(missing) + len(unexpected) + len(other):
            raise UserError(
                "\n  ".join(
                    [
                        f"{self.directory}: the weights are not those of its config.json ({count} "
                        "problem(s)); give a directory whose config.json and weights belong together:",
                        *mismatch_lines(missing=missing, unexpected=unexpected, other=other),
                    ]
                )
            )

    def close(self) -> None:
        """Close the files; nothing can be read afterwards."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _missing(self, expected: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
        for name, shape in expected.items():
            if name not in self.shapes:
                hint = (
                    " (a model that ties its embeddings says tie_word_embeddings: true)"
                    if name == _OUTPUT
                    else ""
                )
                yield f"{name} {list(shape)}{hint}"

    def _unexpected(self, expected: Mapping[str, tuple[int, ...]], *, tied: bool) -> Iterator[str]:
        for name, shape in self.shapes.items():
            if name in expected or is_old_rope_buffer(name):
                continue
            if tied and name == _OUTPUT and _EMBEDDING in self.shapes:
                if not self._are_equal(_OUTPUT, _EMBEDDING):
                    yield (
                        f"{name} {list(shape)}: config.json ties it to {_EMBEDDING}, but they "
                        "differ; set tie_word_embeddings to false if the two are meant to differ"
                    )
                continue
            yield f"{name} {list(shape)}"

    def _are_equal(self, one: str, other: str) -> bool:
        """Two matrices are the same bits."""
        if self.shapes[one] != self.shapes[other] or self.dtypes[one] != self.dtypes[other]:
            return False
        if len(self.shapes[one]) != 2:
            return False
        row = self.read(one, (slice(0, 1),))
        rows = max(1, _COMPARED_BYTES // max(1, row.nbytes))
        for start in range(0, self.shapes[one][0], rows):
            part = (slice(start, start + rows),)
            pair = [self.read(name, part).view(-1).view(torch.uint8) for name in (one, other)]
            if not torch.equal(*pair):
                return False
        return True


def open_weights(directory: Path, *, allow_pickle: bool = False) -> HfWeights:
    """Open the weights of a Hugging Face model directory: one file or shards with an index.

    Args:
        directory: of the model.
        allow_pickle: also read pytorch_model.bin and its shards, tensors only.
    Returns:
        The open weights.
    Raises:
        UserError: nothing there that can be read, files that are broken or do not agree; the message says
            which, and what to do.
    """
    found = find_weights(Path(directory), allow_pickle=allow_pickle)
    return HfWeights(Path(directory), found.tensors, notes=found.notes)
