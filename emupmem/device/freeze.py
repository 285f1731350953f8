# SPDX-License-Identifier: Apache-2.0
"""Holding a file system still while it is copied."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from emupmem.model import EmupmemError
from emupmem.system.errors import os_failures

# include/uapi/linux/fs.h
FIFREEZE, FITHAW, BLKGETSIZE64 = 0xC0045877, 0xC0045878, 0x80081272


# Frozen ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def frozen(where: str) -> Iterator[None]:
    """Hold a mounted file system still. A guard process thaws it if we are killed meanwhile."""
    with os_failures(f"{where} cannot be frozen"):
        folder = os.open(where, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        guard = _Guard(folder)
        try:
            _freeze(folder, where)
            try:
                yield
            finally:
                with os_failures(f"{where} cannot be thawed (fsfreeze -u {where})"):
                    fcntl.ioctl(folder, FITHAW, 0)
        finally:
            guard.dismiss()
    finally:
        os.close(folder)


def _freeze(folder: int, where: str) -> None:
    try:
        fcntl.ioctl(folder, FIFREEZE, 0)
    except OSError as exc:
        busy = exc.errno == errno.EBUSY
        hint = "somebody else has frozen it" if busy else f"umount {where} and save the device"
        raise EmupmemError(f"{where} cannot be frozen: {exc.strerror}", hint) from exc


class _Guard:
    """A child that waits for our end: told to go it goes, else (we were killed) it thaws first."""

    def __init__(self, folder: int) -> None:
        ours, self.pipe = os.pipe()
        # No thread of ours is running yet, so a plain fork is safe.
        self.child = os.fork()
        if self.child == 0:
            self._watch(ours, folder)
        os.close(ours)

    def _watch(self, pipe: int, folder: int) -> None:
        try:
            os.close(self.pipe)
            os.setsid()
            with contextlib.suppress(OSError):
                Path("/proc/self/oom_score_adj").write_text("-1000")
            if os.read(pipe, 1) == b"":
                fcntl.ioctl(folder, FITHAW, 0)
        finally:
            os._exit(0)

    def dismiss(self) -> None:
        """Send the child away."""
        with contextlib.suppress(OSError):  # somebody killed it
            os.write(self.pipe, b"x")
        os.close(self.pipe)
        os.waitpid(self.child, 0)
