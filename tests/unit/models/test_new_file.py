"""New weight files: their bytes, when they are on the disk, and what a full disk says."""

from __future__ import annotations

import errno
import os
import random
import resource
from pathlib import Path

import pytest

from megatron_sftrl.models.hf_tensor_file import new_file

MEGABYTE = 2**20
PIECE_BYTES = 999_983


def write_in_pieces(path: Path, data: bytes, *, piece_bytes: int = PIECE_BYTES) -> None:
    """Write `data` from one piece of memory that is used again and again, as the conversions do."""
    memory = bytearray(piece_bytes)
    with new_file(path) as file:
        for start in range(0, len(data), piece_bytes):
            assert file.tell() == start
            piece = data[start : start + piece_bytes]
            memory[: len(piece)] = piece
            assert file.write(memoryview(memory)[: len(piece)]) == len(piece)
        assert file.tell() == len(data)
        memory[:] = bytes(piece_bytes)


@pytest.mark.parametrize("size", [0, 1, 4096, PIECE_BYTES, 4 * MEGABYTE + 1])
def test_the_file_has_the_bytes_whatever_its_size(size: int, tmp_path: Path) -> None:
    data = random.Random(size).randbytes(size)
    write_in_pieces(tmp_path / "file", data)
    assert (tmp_path / "file").read_bytes() == data


def test_the_file_is_forced_to_the_disk_when_all_of_it_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real, sizes = os.fsync, []

    def fsync(descriptor: int) -> None:
        sizes.append(os.fstat(descriptor).st_size)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_in_pieces(tmp_path / "file", bytes(MEGABYTE + 5))
    assert sizes == [MEGABYTE + 5]


@pytest.mark.parametrize("num_bytes", [1000, 50 * MEGABYTE])
def test_a_full_disk_is_told_to_the_writer_as_such(
    num_bytes: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").symlink_to("/dev/full")
    real = open
    monkeypatch.setattr("builtins.open", lambda path, _: real(path, "wb"))
    written = 0

    def write() -> None:
        nonlocal written
        with new_file(tmp_path / "file") as file:
            for _ in range(50):
                written += file.write(bytes(num_bytes // 50))

    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="No space left on device") as caught:
        write()
    assert caught.value.errno == errno.ENOSPC
    assert written <= MEGABYTE, "it went on writing to a full disk"
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_kernels_own_refusal_of_a_write_arrives(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MEGABYTE, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_in_pieces(tmp_path / "file", bytes(3 * MEGABYTE))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "file").stat().st_size <= MEGABYTE


def test_an_error_of_the_writer_is_the_one_that_is_raised(tmp_path: Path) -> None:
    def fail_in_the_middle() -> None:
        with new_file(tmp_path / "file") as file:
            file.write(b"half")
            raise KeyError("mine")

    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(KeyError, match="mine"):
        fail_in_the_middle()
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_existing_file_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError):
        write_in_pieces(tmp_path / "file", b"other")
    assert (tmp_path / "file").read_text() == "mine"
