# SPDX-License-Identifier: Apache-2.0
"""What of emupmem's work stays on a machine when its package is removed, and what would be lost by that."""

from __future__ import annotations

from emupmem.boot import detect, trial
from emupmem.device import installed, keep, ramdax, unit
from emupmem.model import EmupmemError
from emupmem.record import record
from emupmem.system.backups import BACKUPS
from emupmem.system.host import Host

PACKAGED = "/usr/bin/emupmem"
"""Where a package has the program."""


@record
class Left:
    """`lines`, each something that stays; `unsaved`, folders whose content only the program can save."""

    lines: tuple[str, ...]
    unsaved: tuple[str, ...] = ()


def look_at_left(machine: Host) -> Left:
    """What stays of the boot configuration without the program. Nothing here raises for what cannot be read."""
    lines = []
    try:
        seen = detect.of(machine).next_start(machine, [])
        if seen.configured:
            lines.append(f"memmap={','.join(seen.configured)} in {seen.where}: the memory stays reserved")
        tried = trial.state(machine)
        if tried is not None:
            lines.append(f"the boot entry of the trial of {' '.join(tried.words)}")
    except EmupmemError as exc:
        lines.append(f"what reserves memory ({exc.message})")
    mounts = _mounts(machine)
    if machine.exists(unit.FILE):
        what = f", which no longer mounts {', '.join(m.dir for m in mounts)}" if mounts else ""
        lines.append(f"{unit.FILE}{what}")
    if machine.exists(ramdax.RULE):
        lines.append(f"{ramdax.RULE}, which divides the reserved memory into namespaces")
    kept = [m for m in mounts if m.keep]
    active = machine.output("systemctl", "show", "-P", "ActiveState", unit.NAME) if kept else None
    runs = active is not None and active.stdout.strip() == b"active"
    unsaved = tuple(m.dir for m in kept if runs and keep.belongs(machine, m))
    if lines and machine.exists(BACKUPS):
        lines.append(f"{BACKUPS}, the former text of every file that was changed")
    return Left(tuple(lines), unsaved)


def _mounts(machine: Host) -> tuple[unit.BootMount, ...]:
    """Those of a unit that starts the packaged program; another one may go on."""
    if installed.present_program(machine) != PACKAGED:
        return ()
    try:
        return unit.read_unit(machine.peek(unit.FILE))
    except EmupmemError:
        return ()
