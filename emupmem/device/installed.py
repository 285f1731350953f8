# SPDX-License-Identifier: Apache-2.0
"""The emupmem that the unit starts: where it may lie, and whether it can be started.

It can cease to: a Python that an upgrade of the system replaced leaves a virtual environment without its
packages, and who uninstalls emupmem need not think of the unit. Content that is kept is then not saved.
"""

from __future__ import annotations

import sys
from pathlib import Path

from emupmem.device import unit
from emupmem.model import EmupmemError
from emupmem.system.host import Host

PLACES = ("/usr/local/bin/emupmem", "/usr/bin/emupmem")
REPAIR = "install emupmem again in the same way, or give the mounts again: sudo emupmem apply --mount …"
SECONDS = 120
"""How long it may take to tell its version; a busy machine needs a few."""


def unit_program(machine: Host) -> str:
    """The emupmem that the unit may start as root: installed where only root can change it. Raises EmupmemError.

    The one that runs is taken first: another one that is installed as well may no longer work.
    """
    own = Path(sys.argv[0]).absolute()
    if machine.live and own.name == "emupmem" and _is_safe(machine, str(own)):
        return str(own)
    for place in PLACES:
        if machine.exists(place):
            if _is_safe(machine, place):
                return place
            raise EmupmemError(
                f"{place} leads to {machine.real(place)}, which others than root can change",
                "make install puts emupmem where it is safe to start it at boot",
            )
    if not machine.live:
        return PLACES[0]
    raise EmupmemError(
        "emupmem is not installed for the machine, and a boot could not start it",
        "install the Debian package, or: make install",
    )


def _is_safe(machine: Host, place: str) -> bool:
    return (
        machine.exists(place)
        and not machine.loose(place)
        and not machine.loose_parent(place)
        and not machine.loose_parent(machine.real(place))
    )


def present_program(machine: Host) -> str:
    """The program that the unit of this machine starts; empty where there is no unit of emupmem's."""
    text = machine.peek(unit.FILE)
    try:
        return unit.read_program(text) if text else ""
    except EmupmemError:
        return ""


def version_call(program: str) -> tuple[str, str]:
    """What is run to see whether the program starts."""
    return program, "--version"


def program_problem(machine: Host, program: str) -> str:
    """Why the unit cannot start its program, empty where it can or where that cannot be told."""
    if not machine.exists(program):
        return f"{program} is not there"
    if not machine.running:
        return ""
    done = machine.output(*version_call(program), timeout=SECONDS)
    if done is None:
        return f"{program} cannot be started" if machine.live else ""
    return f"{program} does not start: {done.last_words}" if done.status else ""
