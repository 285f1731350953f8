# SPDX-License-Identifier: Apache-2.0
"""What takes longer than two seconds is shown: on a terminal in a line that goes again, never in a pipe or a file."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TextIO

from emupmem.cli.stdio import is_quiet
from emupmem.cli.terminal import moves, width_of
from emupmem.system.waiting import watched_by
from emupmem.units import plain

AFTER = 2.0
"""Seconds of silence that nobody wonders about."""


class WaitingLine:
    """The line `… update-grub2, 12 s`. With TERM=dumb, as with a screen reader, one line that stays and no numbers."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.moves = moves(stream)
        self.shown = ""

    def __call__(self, what: str, seconds: float | None) -> None:
        if seconds is None:
            if self.shown and self.moves:
                self._write("\r\x1b[K")
            self.shown = ""
        elif seconds >= AFTER:
            counted = f", {int(seconds)} s" if self.moves else " …"
            line = plain(f"{'… ' if self.moves else 'waiting for '}{what}")
            line = line[: width_of(self.stream) - len(counted) - 1] + counted
            if line != self.shown:
                self.shown = line
                self._write(f"\r{line}\x1b[K" if self.moves else f"{line}\n")

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()


@contextlib.contextmanager
def shown_waiting() -> Iterator[None]:
    """Show people what is waited for."""
    if is_quiet() or not sys.stderr.isatty():
        yield
        return
    with watched_by(WaitingLine(sys.stderr)):
        yield
