# SPDX-License-Identifier: Apache-2.0
"""What emupmem.service and a package's scripts run. No logic of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from emupmem.cli.output import Exit, say
from emupmem.cli.session import root_machine
from emupmem.cli.stdio import changing
from emupmem.device import at_boot as device_at_boot
from emupmem.device import keep as device_keep
from emupmem.device import unit as device_unit
from emupmem.doctor.left import look_at_left


def boot_mount(words: Annotated[list[str], typer.Argument()]) -> None:
    """What emupmem.service runs: RANGE DIR FS OWNER MODE KEEP for each mount, RANGE KIND for each device."""
    machine = root_machine("this is for emupmem.service")
    changing()
    raise typer.Exit(
        device_at_boot.boot(machine, device_unit.from_words(words), lambda line: print(line, flush=True))
    )


def boot_save(words: Annotated[list[str], typer.Argument()]) -> None:
    """What emupmem.service runs when it is stopped: the same words."""
    machine = root_machine("this is for emupmem.service")
    changing()
    kept = [m for m in device_unit.from_words(words) if isinstance(m, device_unit.BootMount)]
    well = device_keep.save_all(machine, kept, lambda line: print(line, flush=True))
    raise typer.Exit(Exit.OK if well else Exit.ERROR)


def boot_left() -> None:
    """What a package asks before it is removed: say what stays; status 3 where content would be lost."""
    left = look_at_left(root_machine("this is for the package"))
    if left.unsaved:
        _refuse(left.unsaved)
    if left.lines:
        say("emupmem: it is removed, and this stays:")
        for line in left.lines:
            say(f"         - {line}")
        say(
            "         To take that back: install emupmem again, sudo emupmem remove, then remove the package."
        )
        say(
            "         By hand: delete the memmap=…!… word, and let the boot loader's tool make its menu anew."
        )


def _refuse(folders: Sequence[str]) -> NoReturn:
    """Say that removing the program now would lose content."""
    say(f"emupmem: not removed: without it the content of {', '.join(folders)} is not saved at a shutdown")
    say(
        "         sudo systemctl stop emupmem.service saves it now and unmounts it; sudo emupmem remove ends it"
    )
    raise typer.Exit(Exit.NOT_AS_PLANNED)
