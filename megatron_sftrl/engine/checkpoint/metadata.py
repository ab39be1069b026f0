"""The index of a checkpoint's tensors (.metadata), read without trusting it.

torch.distributed.checkpoint writes the index as a pickle, and reading a pickle can run any code. A
checkpoint may come from someone else (model.init_checkpoint): only the few classes that an index is
made of are let through. The tensors themselves are read with torch.load(weights_only=True).
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata, StorageMeta

from megatron_sftrl.errors import UserError, error_of

_ALLOWED = {
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "torch": {"Size", "float32", "bfloat16", "float16", "float64", "uint8", "int64", "int32", "bool"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
}


class IndexReader(FileSystemReader):
    """torch's reader of checkpoint directories, with a guarded index."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = read_index(Path(self.path))
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def read_index(directory: Path) -> Metadata:
    """The index of the checkpoint in `directory`.

    Raises:
        UserError: it cannot be read, or holds something that no index needs.
    """
    file = directory / ".metadata"
    try:
        metadata = _IndexUnpickler(io.BytesIO(file.read_bytes())).load()
    except UserError:
        raise
    except Exception as error:
        raise error_of(
            f"checkpoint {directory} is damaged: .metadata cannot be read ({type(error).__name__}: {error})",
            error,
        ) from error
    if not isinstance(metadata, Metadata):
        raise UserError(f"checkpoint {directory} is damaged: .metadata is no index of tensors")
    return metadata


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _memory_format
        if name not in _ALLOWED.get(module, ()):
            raise UserError(
                f"the checkpoint's .metadata names {module}.{name}, which no index of tensors needs: it "
                "may be malicious, nothing was loaded"
            )
        return super().find_class(module, name)


def _memory_format(kind: object, name: str) -> object:
    """Python 3.11.0 to 3.11.3 pickle a member of an enumeration as getattr(its class, its name)."""
    if kind is not _MEM_FORMAT_ENCODING:
        raise UserError(
            f"the checkpoint's .metadata asks for {name} of {kind!r}, which no index of tensors needs: it "
            "may be malicious, nothing was loaded"
        )
    return _MEM_FORMAT_ENCODING[name]
