# SPDX-License-Identifier: Apache-2.0
"""What a loader's programs keep and no file tells, as the kernel arguments of an ostree deployment: put back."""

from __future__ import annotations

from collections.abc import Callable

from emupmem.boot.loader import Loader
from emupmem.model import Command, EmupmemError
from emupmem.system.host import Host


def put_state_back(machine: Host, by: Loader, state: tuple[str, ...], run: Callable[[Command], None]) -> None:
    """Make it that state again, by `run`, and look. Raises EmupmemError where that fails, or cannot be told."""
    failed = ""
    for step in by.undo_to(machine, state) if state else ():
        try:
            run(step)
        except EmupmemError as exc:  # the others are tried all the same
            failed = failed or exc.message
    if state and (left := by.undo_to(machine, state)):
        raise EmupmemError(failed or f"{' '.join(left[0].argv)} is still to be done")
