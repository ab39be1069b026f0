"""Names, shapes, dtypes and places of the tensors of one weight file, without reading any tensor."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from megatron_sftrl.errors import UserError, error_of
from megatron_sftrl.hf.stored import StoredTensor

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
    """The tensors of a safetensors file.

    Args:
        file: that exists.
    Returns:
        Every tensor by its name.
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


def read_pickle_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a file that torch.save wrote; only tensors are unpickled, no code of the file runs.

    Args:
        file: that exists.
    Returns:
        Every tensor by its name.
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
