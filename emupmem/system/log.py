# SPDX-License-Identifier: Apache-2.0
"""What was run and written, for whoever wants a log of it: INFO lines of the logger `emupmem`.

Importing `logging` takes longer than some commands run, so it is left to who wants the log: while nobody in the
process has imported it, nobody can have asked for a line, and none is made. A log never makes an error.
"""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

NAME = "emupmem"


class Logged(Protocol):
    """What a line needs of a machine: where it is, and whether it is this one."""

    root: Path

    @property
    def live(self) -> bool: ...


def ran(machine: Logged, argv: Sequence[str], status: int, seconds: float) -> None:
    """A program ended with `status` (negative: the signal that killed it)."""
    _note(machine, lambda: f"ran: {shlex.join(argv)} · status {status} · {seconds:.1f} s")


def failed(machine: Logged, argv: Sequence[str], why: str) -> None:
    """A program could not be run to its end."""
    _note(machine, lambda: f"not run to its end: {shlex.join(argv)} · {why}")


def becomes(machine: Logged, argv: Sequence[str]) -> None:
    """This process is about to become a program: nobody is left to see its end."""
    _note(machine, lambda: f"becomes: {shlex.join(argv)}")


def file(machine: Logged, verb: str, name: str) -> None:
    """Something was done to the file `name`, as the machine itself sees it; `verb` as in "wrote"."""
    _note(machine, lambda: f"{verb}: {name if machine.live else f'{machine.root}{name}'}")


def place(verb: str, path: Path) -> None:
    """Something was done to a file where it really is."""
    _note(None, lambda: f"{verb}: {path}")


def _note(machine: Logged | None, text: Callable[[], str]) -> None:
    logging = sys.modules.get("logging")
    if logging is None:
        return
    with contextlib.suppress(Exception):
        logger = logging.getLogger(NAME)
        if logger.isEnabledFor(logging.INFO):
            # The text as an argument: a % in it is no format.
            logger.info("%s", text(), extra={"machine": machine})
