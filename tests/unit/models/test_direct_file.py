"""Files written past the page cache: their bytes, where O_DIRECT is refused, and what a full disk says."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import random
import resource
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_sftrl.models.direct_file import BLOCK_BYTES, new_direct_file

SIZES = (0, 1, 4096, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 5 * BLOCK_BYTES, 5 * BLOCK_BYTES + 4097)
Pwrite = Callable[[int, memoryview, int], int]


def write_in_pieces(path: Path, data: bytes, *, piece_bytes: int = 999_983) -> str:
    """Write `data` from one piece of memory that is used again and again; its hash on the way."""
    digest, memory = hashlib.sha256(), bytearray(piece_bytes)
    with new_direct_file(path, on_bytes=digest.update) as file:
        for start in range(0, len(data), piece_bytes):
            assert file.tell() == start
            piece = data[start : start + piece_bytes]
            memory[: len(piece)] = piece
            assert file.write(memoryview(memory)[: len(piece)]) == len(piece)
        assert file.tell() == len(data)
        memory[:] = bytes(piece_bytes)
    return digest.hexdigest()


def assert_written(path: Path, data: bytes, **pieces: int) -> None:
    assert write_in_pieces(path, data, **pieces) == hashlib.sha256(data).hexdigest()
    assert path.read_bytes() == data


def is_direct(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """(bytes, with O_DIRECT) of each write from now on."""
    real, found = os.pwrite, []

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        found.append((len(data), is_direct(descriptor)))
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    return found


@pytest.mark.parametrize("size", SIZES)
def test_the_file_has_the_bytes_and_the_hash_whatever_its_size(size: int, tmp_path: Path) -> None:
    assert_written(tmp_path / "file", random.Random(size).randbytes(size))


def test_one_piece_of_many_blocks_is_a_file_too(tmp_path: Path) -> None:
    data = random.Random(1).randbytes(4 * BLOCK_BYTES + 77)
    assert_written(tmp_path / "file", data, piece_bytes=len(data))


def test_whole_blocks_go_past_the_page_cache_and_the_end_does_not(
    watched: list[tuple[int, bool]], tmp_path: Path
) -> None:
    descriptor = os.open(tmp_path / "probe", os.O_WRONLY | os.O_CREAT)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_DIRECT)
    except OSError:
        pytest.skip("the file system of the temporary directory has no O_DIRECT")
    finally:
        os.close(descriptor)
    write_in_pieces(tmp_path / "file", bytes(2 * BLOCK_BYTES + 5))
    assert watched == [(BLOCK_BYTES, True), (BLOCK_BYTES, True), (5, False)]


def test_the_file_is_forced_to_the_disk_when_all_of_it_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real, sizes = os.fsync, []

    def fsync(descriptor: int) -> None:
        sizes.append(os.fstat(descriptor).st_size)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_in_pieces(tmp_path / "file", bytes(BLOCK_BYTES + 5))
    assert sizes == [BLOCK_BYTES + 5]


def test_a_file_system_that_refuses_the_flag_is_written_to_as_usual(
    watched: list[tuple[int, bool]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = fcntl.fcntl

    def refusing(descriptor: int, command: int, flags: int = 0) -> int:
        if command == fcntl.F_SETFL and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(descriptor, command, flags)

    monkeypatch.setattr(fcntl, "fcntl", refusing)
    assert_written(tmp_path / "file", random.Random(2).randbytes(2 * BLOCK_BYTES + 5))
    assert watched == [(BLOCK_BYTES, False), (BLOCK_BYTES, False), (5, False)]


def test_a_file_system_that_refuses_the_first_write_is_written_to_as_usual(
    watched: list[tuple[int, bool]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = os.pwrite

    def refusing(descriptor: int, data: memoryview, offset: int) -> int:
        if is_direct(descriptor):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", refusing)
    assert_written(tmp_path / "file", random.Random(3).randbytes(2 * BLOCK_BYTES + 5))
    assert watched == [(BLOCK_BYTES, False), (BLOCK_BYTES, False), (5, False)]


@pytest.mark.parametrize("most", [1_000_003, 2**20])
def test_what_the_kernel_did_not_take_is_written_after_it(
    most: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # An odd number is nothing that O_DIRECT takes: the kernel refuses it.
    real: Pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: real(descriptor, data[:most], offset))
    assert_written(tmp_path / "file", random.Random(4).randbytes(2 * BLOCK_BYTES + 5))


@pytest.mark.parametrize("num_blocks", [2, 50])
def test_a_full_disk_is_told_to_the_writer_as_such(
    num_blocks: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real: Pwrite = os.pwrite

    def full_after_one_block(descriptor: int, data: memoryview, offset: int) -> int:
        if offset >= BLOCK_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", full_after_one_block)
    before, written = (threading.active_count(), len(os.listdir("/proc/self/fd"))), 0

    def write() -> None:
        nonlocal written
        with new_direct_file(tmp_path / "file") as file:
            for _ in range(num_blocks):
                written += file.write(bytes(BLOCK_BYTES))

    with pytest.raises(OSError, match="No space left on device") as caught:
        write()
    assert caught.value.errno == errno.ENOSPC
    assert written <= 5 * BLOCK_BYTES, "it went on writing to a full disk"
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before


def test_the_kernels_own_refusal_of_a_write_arrives(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (BLOCK_BYTES + 4096, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_in_pieces(tmp_path / "file", bytes(3 * BLOCK_BYTES))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "file").stat().st_size <= BLOCK_BYTES + 4096


def test_an_error_of_the_writer_is_the_one_that_is_raised(tmp_path: Path) -> None:
    def fail_in_the_middle() -> None:
        with new_direct_file(tmp_path / "file") as file:
            file.write(b"half")
            raise KeyError("mine")

    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(KeyError, match="mine"):
        fail_in_the_middle()
    assert len(os.listdir("/proc/self/fd")) == before
    assert (tmp_path / "file").stat().st_size == 0


def test_an_existing_file_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError):
        write_in_pieces(tmp_path / "file", b"other")
    assert (tmp_path / "file").read_text() == "mine"
