"""Reading a checkpoint's index: what every Python writes, and no more."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

from megatron_sftrl.engine.checkpoint.format import read_index


class AsOlderPythonsPickle:
    """A member of an enumeration as Python 3.11.0 to 3.11.3 pickle it."""

    def __init__(self, kind: object, name: str) -> None:
        self.place = (kind, name)

    def __reduce__(self) -> tuple:
        return getattr, self.place


def write_index(directory: Path, value: object) -> None:
    index = Metadata(state_dict_metadata={}, planner_data=value)
    (directory / ".metadata").write_bytes(pickle.dumps(index))


def test_a_memory_format_is_read_as_every_python_writes_it(tmp_path: Path) -> None:
    member = _MEM_FORMAT_ENCODING.TORCH_PRESERVE_FORMAT
    for value in (member, AsOlderPythonsPickle(_MEM_FORMAT_ENCODING, member.name)):
        write_index(tmp_path, value)
        assert read_index(tmp_path).planner_data is member


@pytest.mark.parametrize("name", ["__class__", "load"])
def test_nothing_else_is_taken_out_of_a_class(tmp_path: Path, name: str) -> None:
    write_index(tmp_path, AsOlderPythonsPickle(torch.Size, name))
    with pytest.raises(ValueError, match=f"asks for {name} of <class 'torch.Size'>"):
        read_index(tmp_path)
