"""A tensor in a file, and the reading of exactly the bytes of a part of it.

Plain preads instead of a memory map: mapped pages count as this process's memory until the map is closed (the
whole file after one pass), a slice of a mapped tensor keeps all of it, and a file that is cut short while it
is mapped ends the process with SIGBUS instead of an error.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_sftrl.errors import UserError, error_of


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """Where a contiguous tensor lies: its first byte in the file, shape, () for a scalar, and dtype.

    `scales` are what the values have to be multiplied with; None for values that are themselves.
    """

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    scales: BlockScales | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockScales:
    """A factor of each block of (rows, columns) of a matrix; the last blocks may be smaller.

    Of a stack of matrices `stored` holds those of all, one matrix behind the other.
    """

    stored: StoredTensor
    block: tuple[int, int]


def read_part(
    descriptor: int, stored: StoredTensor, part: Sequence[slice] = (), *, out: Tensor | None = None
) -> Tensor:
    """Read a region of a stored tensor.

    Args:
        descriptor: of the open file; its position is neither used nor moved, so threads may share it.
        part: slices of step 1 of its leading dimensions; those without a slice are read whole.
        out: where to read to, of the part's shape and the stored dtype, contiguous, on the CPU.
    Returns:
        `out`, or without it a [*part] CPU tensor of the stored dtype, contiguous, of its own memory.
    Raises:
        UserError: the file ends before the tensor does.
    """
    whole_part = (*part, *[slice(None)] * (len(stored.shape) - len(part)))
    bounds = [range(size)[each] for size, each in zip(stored.shape, whole_part, strict=True)]
    assert all(bound.step == 1 for bound in bounds), "only slices of step 1"
    shape = tuple(len(bound) for bound in bounds)
    result = torch.empty(shape, dtype=stored.dtype) if out is None else out
    assert (tuple(result.shape), result.dtype, result.is_contiguous()) == (shape, stored.dtype, True)
    if result.numel() == 0:
        return result
    buffer = result.view(-1).view(torch.uint8).numpy().data
    done = 0
    for start, length in _runs(stored.shape, bounds):
        num_bytes = length * stored.dtype.itemsize
        _read_into(
            descriptor,
            buffer[done : done + num_bytes],
            stored.offset + start * stored.dtype.itemsize,
            file=stored.file,
        )
        done += num_bytes
    assert done == len(buffer)
    return result


def _runs(shape: tuple[int, ...], bounds: Sequence[range]) -> Iterator[tuple[int, int]]:
    """(first element, number of elements) of each contiguous run of a region, in order."""
    # Trailing dimensions that are read whole join the run of the dimension before them.
    cut = len(shape)
    while cut > 0 and len(bounds[cut - 1]) == shape[cut - 1]:
        cut -= 1
    run_dim = max(cut - 1, 0)
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    length = math.prod(len(bound) for bound in bounds[run_dim:])
    offset = bounds[run_dim].start * strides[run_dim] if shape else 0
    for index in itertools.product(*bounds[:run_dim]):
        yield offset + sum(i * stride for i, stride in zip(index, strides, strict=False)), length


def _read_into(descriptor: int, buffer: memoryview, offset: int, *, file: Path) -> None:
    """Fill `buffer` from `offset`; the kernel may give less than asked for (2 GiB at most a call)."""
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], offset + done)
        if count == 0:
            raise UserError(
                f"{file} ends at byte {os.fstat(descriptor).st_size}, inside a tensor: it was cut short "
                "while it was open; copy or download it again"
            )
        done += count


# Names, shapes, dtypes and places of the tensors of one weight file, without reading any tensor.


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_safetensors_header(file: Path) -> dict[str, StoredTensor]:
    """Every tensor of an existing safetensors file by its name.

    Raises:
        UserError: cut short, no safetensors file, or a dtype that torch has not.
    """
    try:
        # The library checks everything: the offsets lie in the file, without gaps, and agree with the shapes.
        with safe_open(file, framework="pt"):
            pass
    except OSError as error:
        raise error_of(f"cannot read {file}: {error}", error) from error
    except SafetensorError as error:
        raise error_of(_what_is_wrong(file, error), error) from error
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    if unknown := sorted({entry["dtype"] for entry in header.values()} - DTYPES.keys()):
        raise UserError(
            f"{file}: tensors of dtype {', '.join(unknown)} cannot be read; expected weights of 16 or 32 "
            "bits (a quantised model must be dequantised first)"
        )
    return {
        name: StoredTensor(
            file=file,
            offset=8 + length + entry["data_offsets"][0],
            shape=tuple(entry["shape"]),
            dtype=DTYPES[entry["dtype"]],
        )
        for name, entry in header.items()
    }


SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def tensor_names(directory: Path) -> frozenset[str] | None:
    """Names in a model's safetensors file or in the index of its shards; None where there is neither.

    Raises:
        UserError: a file that is cut short or no safetensors file.
    """
    if (directory / SINGLE_FILE).is_file():
        return frozenset(read_safetensors_header(directory / SINGLE_FILE))
    try:
        return frozenset(json.loads((directory / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # whoever reads the weights says what is wrong with an index


def read_pickle_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a file that torch.save wrote, by name; only tensors are unpickled, none of its code
    runs.

    Raises:
        UserError: cut short, not a state dict of torch.save's zip format, anything but tensors in it, or a
            tensor that is not contiguous.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    advice = "expected a dictionary of tensors, saved by torch.save of torch 1.6 or later"
    try:
        # A fake tensor knows its place in the file and occupies no memory.
        with FakeTensorMode():
            state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise error_of(
            f"{file} cannot be read with torch.load(weights_only=True): {_reason(error)}; {advice}", error
        ) from error
    if not isinstance(state, dict):
        raise UserError(f"{file}: {advice}, got a {type(state).__name__}")
    tensors: dict[str, StoredTensor] = {}
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise UserError(f"{file}: {advice}, got {name!r}: a {type(value).__name__}")
        start = getattr(value.untyped_storage(), "_checkpoint_offset", None)
        if start is None or not value.is_contiguous():
            reason = "is not contiguous" if start is not None else "lies in a file of an old format"
            raise UserError(
                f"{file}: tensor {name} {reason}; {advice}: load it and save it again as safetensors"
            )
        tensors[name] = StoredTensor(
            file=file,
            offset=start + value.storage_offset() * value.element_size(),
            shape=tuple(value.shape),
            dtype=value.dtype,
        )
    return tensors


def _reason(error: Exception) -> str:
    """torch's reason in one line, without its advice to let the file's code run."""
    found = re.search(r"(?:WeightsUnpickler error: |(?=Trying to load ))([^\n]+)", str(error))
    return found[1] if found else str(error).partition("\n")[0].partition(" In PyTorch")[0]


def _what_is_wrong(file: Path, error: Exception) -> str:
    """The library's words, with the size that the header promises when the file is shorter."""
    size = file.stat().st_size
    again = "copy or download it again"
    with open(file, "rb") as stream:
        start = stream.read(64)
        length = int.from_bytes(start[:8], "little")
        if start.startswith(b"version https://git-lfs"):
            return f"{file} is a git-lfs pointer, not the weights themselves; fetch them with: git lfs pull"
        if size < 8 or (start[8:9] == b"{" and size < 8 + length):
            return f"{file} is truncated: it ends after {size} bytes, inside its header; {again}"
        if start[8:9] == b"{":
            try:
                stream.seek(8)
                header = json.loads(stream.read(length))
                header.pop("__metadata__", None)
                ends = [entry["data_offsets"][1] for entry in header.values()]
                expected = 8 + length + max(ends, default=0)
            except (ValueError, KeyError, TypeError, AttributeError, IndexError):
                expected = size
            if size < expected:
                return f"{file} is truncated: its header promises {expected} bytes, it has {size}; {again}"
    return f"{file} is not a valid safetensors file: {error}; {again}"


# Weights of 8 bits that have to be multiplied: with a factor for each block of rows and columns, as DeepSeek
# publishes them, or with one for a whole matrix, as Mistral does, also where a tensor is a stack of matrices.


_INVERSE, _OF_INPUTS = "_scale_inv", "activation_scale"


def with_scales(
    tensors: Mapping[str, StoredTensor], block: Sequence[int] | None, *, readable: Sequence[torch.dtype]
) -> dict[str, StoredTensor]:
    """The tensors, each of 8 bits together with its scales; those of activations are left out.

    Args:
        block: (rows, columns) of a factor; None for one factor for each matrix.
        readable: dtypes that scales may have.
    Raises:
        UserError: scales of another shape or dtype.
    """
    found = {name: stored for name, stored in tensors.items() if not name.endswith(_OF_INPUTS)}
    for name in [name for name in found if name.endswith(_INVERSE)]:
        weight = name.removesuffix(_INVERSE)
        stored, scales = tensors.get(weight), tensors[name]
        # Whoever checks the names says that nobody expects the others.
        is_known = stored is not None and len(stored.shape) in ((2, 3) if block is None else (2,))
        if stored is None or not is_known or stored.dtype != torch.float8_e4m3fn:
            continue
        rows, columns = block or stored.shape[-2:]
        grid = (-(-stored.shape[-2] // rows), -(-stored.shape[-1] // columns))
        whole = (*stored.shape[:-2], *grid)
        fits = math.prod(scales.shape) == math.prod(whole) if block is None else scales.shape == whole
        if not fits or scales.dtype not in readable:
            of = "matrix" if block is None else f"block of {rows} x {columns}"
            raise UserError(
                f"{scales.file.parent}: {name}: expected a float for each {of} of {weight} "
                f"{list(stored.shape)}, {list(whole)}, got {list(scales.shape)} of {str(scales.dtype)[6:]}"
            )
        own = BlockScales(stored=replace(found.pop(name), shape=whole), block=(rows, columns))
        found[weight] = replace(stored, scales=own)
    return found


def part_of_stack(stored: StoredTensor, number: int, shape: tuple[int, int], *, parts: int) -> StoredTensor:
    """One of the matrices of this shape that lie one behind the other in a stack, `parts` for each expert."""
    scales = stored.scales
    if scales is not None:
        factors = replace(
            scales.stored,
            offset=scales.stored.offset + number // parts * scales.stored.dtype.itemsize,
            shape=(1, 1),
        )
        scales = BlockScales(stored=factors, block=shape)
    offset = stored.offset + number * math.prod(shape) * stored.dtype.itemsize
    return replace(stored, offset=offset, shape=shape, scales=scales)


# Tensors of experts that a file holds in MXFP4, as the bf16 tensors that transformers makes of them.
#
# A tensor [experts, columns, rows] lies in two of bytes, its columns cut into groups of 32:
#
#     <name>_blocks  [experts, rows, groups, 16]  two elements a byte, the first in its lower four bits
#     <name>_scales  [experts, rows, groups]      exponent of two of a group, plus 127
#
# An element is a sign and an index into 0, 0.5, 1, 1.5, 2, 3, 4, 6 (Open Compute Project, MX formats 1.0).


BLOCKS, SCALES = "_blocks", "_scales"
_GROUP, _BIAS = 32, 127
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedTensor:
    """The two tensors of bytes behind a bf16 tensor."""

    blocks: StoredTensor
    scales: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        """[experts, columns, rows]."""
        experts, rows, groups, _ = self.blocks.shape
        return experts, groups * _GROUP, rows

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16


def packed_experts(tensors: Mapping[str, StoredTensor]) -> dict[str, PackedTensor]:
    """By the name of the tensor that they stand for, all pairs of blocks and scales.

    Raises:
        UserError: blocks and scales whose shapes or dtypes are not those of MXFP4.
    """
    found = {}
    for name, blocks in tensors.items():
        whole = name.removesuffix(BLOCKS)
        if whole == name or (scales := tensors.get(whole + SCALES)) is None:
            continue
        fits = len(blocks.shape) == 4 and blocks.shape == (*scales.shape, _GROUP // 2)
        if not fits or {blocks.dtype, scales.dtype} != {torch.uint8}:
            raise UserError(
                f"{blocks.file}: {name} {list(blocks.shape)} {str(blocks.dtype)[6:]} with scales "
                f"{list(scales.shape)} {str(scales.dtype)[6:]} is no MXFP4: expected bytes, blocks of "
                "[experts, rows, groups, 16] and scales of [experts, rows, groups]"
            )
        found[whole] = PackedTensor(blocks=blocks, scales=scales)
    return found


def read_packed(
    read: Callable[[StoredTensor, tuple[slice, ...]], Tensor], packed: PackedTensor, part: Sequence[slice]
) -> Tensor:
    """A region of the tensor, bf16, as a view: rows and columns lie in the order of the blocks.

    Args:
        read: a region of one of the two.
        part: slices of step 1 of the leading dimensions, the others whole.
    """
    whole = (*part, *(slice(None) for _ in range(3 - len(part))))
    bounds = [range(size)[each] for size, each in zip(packed.shape, whole, strict=True)]
    experts, columns, rows = (slice(each.start, each.stop) for each in bounds)
    groups = slice(columns.start // _GROUP, -(-columns.stop // _GROUP))
    values = dequantised(
        read(packed.blocks, (experts, rows, groups)), read(packed.scales, (experts, rows, groups))
    )
    first = groups.start * _GROUP
    return values[:, :, columns.start - first : columns.stop - first].mT


def dequantised(blocks: Tensor, scales: Tensor) -> Tensor:
    """[..., groups, 16] and [..., groups] bytes -> [..., 32 groups] bf16."""
    entries = blocks.int().add_(scales.int()[..., None], alpha=256)
    pairs = _pairs().index_select(0, entries.flatten())
    return pairs.view(torch.bfloat16).view(*scales.shape[:-1], -1)


@functools.cache
def _pairs() -> Tensor:
    """[65536] int32: the two bf16 elements of every byte under every scale, at 256 scale + byte.

    Looked up in place of computed: a twentieth of the time, and these files hold most of a model.
    """
    table = torch.tensor([*_MAGNITUDES, *(-each for each in _MAGNITUDES)], dtype=torch.bfloat16)
    # Powers of two move no bit of an element; the smallest are subnormal, which ldexp rounds as transformers.
    elements = torch.ldexp(table, torch.arange(256)[:, None] - _BIAS).to(torch.bfloat16)
    byte = torch.arange(256)
    return torch.stack((elements[:, byte & 15], elements[:, byte >> 4]), dim=-1).view(torch.int32).flatten()


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file that did not exist; all of it is on the disk when the block has ended without an error."""
    with open(path, "xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


# A safetensors file written tensor by tensor: the library's save_file wants all tensors of a file in memory.


_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8


def write_safetensors(
    path: Path,
    kinds: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensor: Callable[[str], Tensor],
) -> None:
    """Write a new safetensors file and force it to the disk. Raises OSError.

    Args:
        kinds: dtype and shape of each tensor.
        tensor: makes the tensor of a name, on the CPU and contiguous; asked once for each, in the order of
            the file, and done with the one before, whose memory it may use again.
    """
    # Wide elements first, so that each tensor begins at a multiple of its element's size.
    names = sorted(kinds, key=lambda name: -kinds[name][0].itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        dtype, shape = kinds[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with new_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            values = tensor(name)
            assert (values.dtype, tuple(values.shape), values.is_contiguous()) == (*kinds[name], True), name
            file.write(values.detach().view(-1).view(torch.uint8).numpy().data)
