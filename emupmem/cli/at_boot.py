# SPDX-License-Identifier: Apache-2.0
"""What emupmem.service runs. No logic of its own."""

from __future__ import annotations

from typing import Annotated

import typer

from emupmem.cli.output import Exit
from emupmem.cli.session import root_machine
from emupmem.cli.stdio import changing
from emupmem.device import at_boot as device_at_boot
from emupmem.device import keep as device_keep
from emupmem.device import unit as device_unit


def boot_mount(words: Annotated[list[str], typer.Argument()]) -> None:
    """What emupmem.service runs: RANGE DIR FS OWNER MODE KEEP for each mount."""
    machine = root_machine("this is for emupmem.service")
    changing()
    raise typer.Exit(
        device_at_boot.boot(machine, device_unit.from_words(words), lambda line: print(line, flush=True))
    )


def boot_save(words: Annotated[list[str], typer.Argument()]) -> None:
    """What emupmem.service runs when it is stopped: the same words."""
    machine = root_machine("this is for emupmem.service")
    changing()
    well = device_keep.save_all(machine, device_unit.from_words(words), lambda line: print(line, flush=True))
    raise typer.Exit(Exit.OK if well else Exit.ERROR)
