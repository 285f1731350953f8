# SPDX-License-Identifier: Apache-2.0
"""Reading without waiting for ever and without end: plain files, and what a person may give in their place."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from emupmem.model import GIB, KIB, MIB, EmupmemError

LARGEST_FILE = 64 * MIB
"""Of what is read as a whole: settings, menus, files of the kernel."""

_PIECE = 64 * KIB
"""Files of /proc/sys answer a read of several MiB with ENOMEM: the kernel makes room for all of it."""

LARGEST_LOG = GIB

_AT_ONCE = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC

_KINDS = (
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a disk"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
)


def kind_of(mode: int) -> str:
    """`a device`, `a FIFO` and so on, empty for plain files and folders."""
    return next((name for test, name in _KINDS if test(mode)), "")


def read_plain(place: str | Path) -> bytes:
    """The content of a plain file. Raises OSError, also for other kinds and for what is too large."""
    if kind := kind_of(os.stat(place).st_mode):
        raise OSError(errno.EINVAL, f"it is {kind}")
    pieces, size = [], 0
    descriptor = os.open(place, _AT_ONCE)
    try:
        while piece := os.read(descriptor, _PIECE):
            pieces.append(piece)
            size += len(piece)
            if size > LARGEST_FILE:
                raise OSError(errno.EFBIG, f"it is larger than {LARGEST_FILE // MIB} MiB")
    finally:
        os.close(descriptor)
    return b"".join(pieces)


def open_at_once(place: Path) -> BinaryIO:
    """Open to read; a FIFO that took the place of the file meanwhile is not waited for."""
    return os.fdopen(os.open(place, _AT_ONCE), "rb")


def refuse_endless(descriptor: int, name: str) -> None:
    """Raise EmupmemError for what would be read for ever, or holds no saved log: devices, the kernel's own files."""
    info = os.fstat(descriptor)
    kind = kind_of(info.st_mode)
    null = stat.S_ISCHR(info.st_mode) and info.st_rdev == os.makedev(1, 3)
    if kind and kind not in ("a FIFO", "a socket") and not null and not os.isatty(descriptor):
        raise EmupmemError(f"{name} cannot be read: it is {kind}", SAVE)
    real = os.path.realpath(f"/proc/self/fd/{descriptor}")
    if stat.S_ISREG(info.st_mode) and real.startswith(("/proc/", "/sys/")):
        raise EmupmemError(f"{name} cannot be read: it is a file of the kernel, not a saved log", SAVE)
    if stat.S_ISREG(info.st_mode) and info.st_size > LARGEST_LOG:
        raise long_log(name)


SAVE = "save the log first: sudo dmesg > FILE, or journalctl -k -b -o cat > FILE"


def long_log(name: str) -> EmupmemError:
    return EmupmemError(f"{name} is longer than {LARGEST_LOG // GIB} GiB", "give the part with the last boot")
