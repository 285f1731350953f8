# SPDX-License-Identifier: Apache-2.0
"""Copying in pieces, by several threads, past the page cache."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import mmap
import os
import stat
import struct
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from queue import SimpleQueue

from emupmem.device.freeze import BLKGETSIZE64
from emupmem.model import KIB, MIB, Busy, EmupmemError

CHUNK = 256 * KIB
"""What is copied and summed at once: it stays in the processor's cache from one to the other."""
TASK = 4 * MIB
"""What a thread does before it is given more."""
HEAD = MIB
"""Where every file system has its superblock."""
BLOCK = 4 * KIB
FLUSH = 32 * MIB
WORKERS = min(4, os.cpu_count() or 1)
_ZERO_CHUNK, _ZERO_BLOCK = bytes(CHUNK), bytes(BLOCK)

Progress = Callable[[str, int, int], None]
"""Told what is being done, bytes done and bytes in all; an exception from it stops the work safely."""

Opener = Callable[[str, int], int]
"""Opens a device for exclusive use: name, flags -> descriptor. Tests put regular files here."""


def silent(what: str, done: int, size: int) -> None:
    """The progress of nobody."""


def open_device(name: str, flags: int) -> int:
    """Open a block device past the page cache; with O_EXCL only if nobody else has claimed it.

    What programs store through DAX never passes the page cache of the block device: an old page
    there would be saved in place of the truth.
    """
    try:
        return os.open(name, flags | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as exc:
        if exc.errno == errno.EBUSY:
            raise Busy(f"{name} is in use", "mounted elsewhere, or swap, LVM or a loop device") from exc
        hint = "run it with sudo" if exc.errno in (errno.EACCES, errno.EPERM) else ""
        raise EmupmemError(f"{name} cannot be opened: {exc.strerror}", hint) from exc


@contextlib.contextmanager
def opened_file(opener: Opener, name: str, flags: int) -> Iterator[int]:
    descriptor = opener(name, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


# Chunks ---------------------------------------------------------------------------------------------


class Buffer:
    """Room for a chunk, aligned to pages as O_DIRECT wants it; compared and summed without a copy."""

    def __init__(self) -> None:
        self.room = bytearray(CHUNK + mmap.PAGESIZE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.room))
        self.start = -address % mmap.PAGESIZE
        self.view = memoryview(self.room)[self.start : self.start + CHUNK]

    def is_zero(self, length: int) -> bool:
        """Whether a whole chunk is zero; a shorter one is looked at block by block."""
        return length == CHUNK and self.room.startswith(_ZERO_CHUNK, self.start)

    def crc(self, length: int) -> int:
        """CRC-32 of the first bytes."""
        return zero_crc(length) if self.is_zero(length) else zlib.crc32(self.view[:length])

    def pieces(self, length: int) -> Iterator[tuple[int, int]]:
        """The runs of blocks that are not zero: offsets in the chunk."""
        if self.is_zero(length):
            return
        begun = -1
        for at in range(0, length, BLOCK):
            # startswith compares without a copy, and ends at the first byte that differs
            whole = length - at >= BLOCK
            if whole and self.room.startswith(_ZERO_BLOCK, self.start + at):
                if begun >= 0:
                    yield begun, at
                begun = -1
            elif begun < 0:
                begun = at
        if begun >= 0:
            yield begun, length


ZERO = Buffer()


@functools.cache
def zero_crc(length: int) -> int:
    """The CRC of that many zeros."""
    return zlib.crc32(bytes(length))


class Buffers:
    """One buffer for each worker, and one for who directs them."""

    def __init__(self) -> None:
        self.free: SimpleQueue[Buffer] = SimpleQueue()
        for _ in range(WORKERS + 1):
            self.free.put(Buffer())

    @contextlib.contextmanager
    def one(self) -> Iterator[Buffer]:
        """Borrow one."""
        buffer = self.free.get()
        try:
            yield buffer
        finally:
            self.free.put(buffer)


def in_parallel(
    size: int, work: Callable[[int], int], progress: Progress, what: str, start: int = 0
) -> Iterator[int]:
    """Do the work for each chunk in a few threads: results in order, never far ahead of `progress`."""
    pending: deque[Future[list[int]]] = deque()
    todo = iter(range(start, size, TASK))
    done = start

    def task(begin: int) -> list[int]:
        return [work(at) for at in range(begin, min(begin + TASK, size), CHUNK)]

    with ThreadPoolExecutor(WORKERS) as pool:
        try:
            while True:
                pending.extend(pool.submit(task, at) for at in islice(todo, 2 * WORKERS - len(pending)))
                if not pending:
                    return
                yield from pending.popleft().result()
                done = min(done + TASK, size)
                progress(what, done, size)
        finally:
            for future in pending:
                future.cancel()


def read_piece(descriptor: int, view: memoryview, at: int) -> None:
    """Fill `view` from an offset on, whole."""
    while view:
        got = os.preadv(descriptor, [view], at)
        if got == 0:
            raise OSError(errno.EIO, "it ends too early")
        view, at = view[got:], at + got


def write_piece(descriptor: int, view: memoryview, at: int) -> None:
    while view:
        done = os.pwrite(descriptor, view, at)
        view, at = view[done:], at + done


def size_of_open(descriptor: int) -> int:
    """Bytes of a block device (or of what stands for one)."""
    if stat.S_ISBLK(os.fstat(descriptor).st_mode):
        found: int = struct.unpack("Q", fcntl.ioctl(descriptor, BLKGETSIZE64, bytes(8)))[0]
        return found
    return os.fstat(descriptor).st_size
