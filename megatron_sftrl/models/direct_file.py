"""A new file written from its beginning to its end, past the page cache where the file system allows it.

A converted checkpoint is written once and read much later. Through the page cache each of its bytes would be
copied into a page that the kernel must first find and clear, and in a virtual machine the first use of a page
costs more than the copying; O_DIRECT hands our own few buffers to the disk, the same ones again and again.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

BLOCK_BYTES = 4 * 2**20
"""Written at once. Larger ones were no faster, and alignment asks for a multiple of the disk's block."""

_NUM_BLOCKS = 3
"""One that the caller fills, one at the disk, one that `on_bytes` still reads."""


@contextmanager
def new_direct_file(
    path: Path, *, on_bytes: Callable[[memoryview], object] | None = None
) -> Iterator[DirectFile]:
    """Make a file that the block writes; all of it is on the disk when the block has ended without an error.

    Args:
        path: of the file, which does not exist.
        on_bytes: given all bytes in their order, in a thread and while they are written: a hash's update.
    Yields:
        The file, empty.
    Raises:
        OSError: of any of the writes, a full disk for example, at a later one or at the end of the block.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        _set_direct(descriptor, True)
        with ThreadPoolExecutor(1, "disk") as disk, ThreadPoolExecutor(1, "hash") as reader:
            file = DirectFile(descriptor, on_bytes, disk=disk, reader=reader)
            yield file
            file.finish()
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class DirectFile:
    """Fills blocks and has threads write them; made by new_direct_file.

    Args:
        descriptor: of the empty file.
        on_bytes: as in new_direct_file.
        disk, reader: of one thread each, since blocks have an order.
    """

    def __init__(
        self,
        descriptor: int,
        on_bytes: Callable[[memoryview], object] | None,
        *,
        disk: Executor,
        reader: Executor,
    ) -> None:
        self._descriptor = descriptor
        self._on_bytes = on_bytes
        self._disk, self._reader = disk, reader
        # Anonymous maps begin at a page, as O_DIRECT wants it.
        self._free = [memoryview(mmap.mmap(-1, BLOCK_BYTES)) for _ in range(_NUM_BLOCKS)]
        self._in_use: deque[tuple[memoryview, list[Future]]] = deque()
        self._block = self._free.pop()
        self._start = self._filled = 0

    def write(self, data: bytes | memoryview) -> int:
        """Append bytes, which may change as soon as this returns; the number of them."""
        rest = memoryview(data)
        while rest:
            count = min(len(rest), BLOCK_BYTES - self._filled)
            self._block[self._filled : self._filled + count] = rest[:count]
            self._filled, rest = self._filled + count, rest[count:]
            if self._filled == BLOCK_BYTES:
                self._hand_over()
                self._block = self._free.pop() if self._free else self._oldest()
        return len(data)

    def tell(self) -> int:
        """Bytes appended so far."""
        return self._start + self._filled

    def flush(self) -> None:
        """For torch.save, which ends with it: nothing is worth a disk's answer before the end of the file."""

    def finish(self) -> None:
        """Write what is left and wait for everything."""
        if self._filled:
            self._hand_over()
        while self._in_use:
            self._oldest()

    def _hand_over(self) -> None:
        data = self._block[: self._filled]
        jobs: list[Future] = [self._disk.submit(_write_block, self._descriptor, data, self._start)]
        if self._on_bytes is not None:
            jobs.append(self._reader.submit(self._on_bytes, data))
        self._in_use.append((self._block, jobs))
        self._start, self._filled = self._start + self._filled, 0

    def _oldest(self) -> memoryview:
        """The block handed over first, when nobody needs it any more."""
        block, jobs = self._in_use.popleft()
        for job in jobs:
            job.result()
        return block


def _write_block(descriptor: int, data: memoryview, offset: int) -> None:
    if len(data) < BLOCK_BYTES:
        _set_direct(descriptor, False)  # the end of the file is no multiple of the disk's block
    done = 0
    while done < len(data):
        try:
            done += os.pwrite(descriptor, data[done:], offset + done)
        except OSError as error:
            # Some file systems promise O_DIRECT and refuse the first write, or what a short one left.
            if error.errno != errno.EINVAL or not _set_direct(descriptor, False):
                raise


def _set_direct(descriptor: int, is_direct: bool) -> bool:
    """Set or clear O_DIRECT; whether that changed anything, which setting does not where it is refused."""
    # Not at the opening: a file system that refuses the flag there may have made the file all the same.
    before = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    after = before | os.O_DIRECT if is_direct else before & ~os.O_DIRECT
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, after)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return before != after
