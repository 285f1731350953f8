# SPDX-License-Identifier: Apache-2.0
"""Pipes, FIFOs and terminals that a person gives in the place of a file: never waited for in silence."""

from __future__ import annotations

import io
import os
import select
import stat
import time
from collections.abc import Callable
from typing import Any, BinaryIO

from emupmem.model import EmupmemError
from emupmem.system import plain

WRITER_SECONDS = 2.0
"""How long a FIFO may have nobody who writes to it."""

QUIET_SECONDS = 2.0
"""After which a person is told, once, what is waited for."""

SILENT_SECONDS = 60.0
"""How long who writes to a FIFO with a name may be silent. A pipe of the shell ends with the programs beside it."""

Tell = Callable[[str], None]


class Pipe(io.RawIOBase):
    """The rest of a stream that cannot go back, behind `head`, what is already read of it.

    `shown` is its name for people, `tell` says a line to them. Reading raises EmupmemError for what has no end.
    """

    def __init__(self, descriptor: int, shown: str, tell: Tell, head: bytes = b"") -> None:
        self.descriptor, self.shown, self.head, self.inform = descriptor, shown, head, tell
        self.left = plain.LARGEST_LOG - len(head)
        self.told = False
        self.poll = select.poll()
        self.poll.register(descriptor, select.POLLIN)
        if os.isatty(descriptor):
            self._say(f"{shown} is a terminal: paste the log, then press Enter and Ctrl-D")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data, self.head = self.head, b""
        if not data:
            self._wait()
            data = os.read(self.descriptor, len(buffer))
            self.left -= len(data)
        if self.left < 0:
            raise plain.long_log(self.shown)
        buffer[: len(data)] = data
        return len(data)

    def _wait(self) -> None:
        """Return when there is something, the end included."""
        if self.poll.poll(QUIET_SECONDS * 1000):
            return
        self._say(f"still waiting for {self.shown}: who writes to it has not ended; Ctrl-C stops this")
        if not has_a_name(self.descriptor):
            self.poll.poll()
        elif not self.poll.poll(SILENT_SECONDS * 1000):
            raise EmupmemError(
                f"{self.shown} cannot be read: it is a FIFO, and who has it open wrote nothing for "
                f"{SILENT_SECONDS:g} seconds",
                plain.SAVE,
            )

    def _say(self, words: str) -> None:
        if not self.told:
            self.inform(f"emupmem: {words}")
            self.told = True


def has_a_name(descriptor: int) -> bool:
    """Whether it is a FIFO in a folder: what a shell makes, `|` and `<( )`, has no name, nor what ssh gives."""
    if not stat.S_ISFIFO(os.fstat(descriptor).st_mode):
        return False
    return "/pipe:[" not in os.path.realpath(f"/proc/self/fd/{descriptor}")


def wait_for_writer(descriptor: int, name: str) -> bytes:
    """Wait until somebody has a FIFO open to write; from then on reading it waits. Gives what was read meanwhile.

    A FIFO that nobody has opened reads as empty. Raises EmupmemError where nobody comes.
    """
    until = time.monotonic() + WRITER_SECONDS
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    head = b""
    while not poll.poll(0):
        try:
            head = os.read(descriptor, 1)
        except BlockingIOError:
            break  # somebody who has not written yet
        if head:
            break
        if time.monotonic() > until:
            raise EmupmemError(f"{name} cannot be read: it is a FIFO, and nobody writes to it", plain.SAVE)
        time.sleep(0.02)
    os.set_blocking(descriptor, True)
    return head


def with_a_head(descriptor: int, name: str, tell: Tell, least: int, head: bytes = b"") -> BinaryIO:
    """A pipe of which the first `least` bytes are there to peek at: its writer may begin with a single one."""
    source = Pipe(descriptor, name, tell, head)
    head = b""
    while len(head) < least and (more := source.read(least - len(head))):
        head += more
    source.head = head
    return io.BufferedReader(source, 1 << 16)
