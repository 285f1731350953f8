# SPDX-License-Identifier: Apache-2.0
"""Devdax at every boot: a range of persistent memory as /dev/dax0.0, which a program maps as a whole.

The mode lies in an info block at the beginning of the range: a warm restart keeps it, with the content, after a cold
one the device is made again. ndctl writes it; what has another content is never overwritten.
"""

from __future__ import annotations

import re
import shlex

from emupmem.device import dax, unit
from emupmem.device.blocks import signature
from emupmem.model import Command, EmupmemError
from emupmem.system.distribution import install_hint
from emupmem.system.host import Host
from emupmem.system.lock import wait_for
from emupmem.system.machine import Machine
from emupmem.system.sysfs import Region
from emupmem.units import human

PROGRAM = "ndctl"
_SECONDS = 300


def require_program(machine: Host) -> None:
    """Raise EmupmemError where the program that makes the device is missing."""
    if machine.find(PROGRAM) is None:
        raise EmupmemError(f"{PROGRAM} is not installed", install_hint(machine, "ndctl"))


def make_devdax(machine: Machine, wanted: unit.BootDevice) -> str:
    """Have the range as a devdax device, made anew where it is gone; what was done. Raises EmupmemError."""
    wait_for(lambda: _is_ready(_region(machine, wanted.start)), unit.SECONDS)
    machine.settle()  # udev has the device open while it looks at it
    region = _region(machine, wanted.start)
    if region is None or not _is_ready(region):
        raise EmupmemError(
            f"no device for memmap={wanted.range} appeared within {unit.SECONDS} seconds",
            "sudo emupmem verify shows why",
        )
    proven = ""
    if not region.char:
        region = _make(machine, region)
        dax.prove_device(str(machine.path(f"/dev/{region.char}")))
        proven = " · mapped, stored and read back"
    node = f", node {region.numa_node}" if region.numa_node is not None and region.numa_node >= 0 else ""
    return f"/dev/{region.char} is ready · {human(region.block_size)}{node} · emulated, volatile{proven}"


def _region(machine: Host, start: int) -> Region | None:
    return next((r for r in machine.regions() if r.start == start), None)


def _is_ready(region: Region | None) -> bool:
    return region is not None and bool(region.block or region.char)


def _make(machine: Machine, region: Region) -> Region:
    """Give the one namespace of a region the mode; the region as it is then. Raises EmupmemError."""
    require_program(machine)
    holds = signature(machine, f"/dev/{region.block}")
    if holds:
        raise EmupmemError(
            f"/dev/{region.block} holds {holds}, which devdax would destroy",
            f"sudo wipefs -a /dev/{region.block} if nothing of it is needed, then sudo systemctl restart {unit.NAME}",
        )
    names = machine.names(f"/sys/bus/nd/devices/{region.name}")
    name = next((n for n in names if re.fullmatch(r"namespace\d+\.\d+", n)), "")
    argv = (PROGRAM, "create-namespace", "-f", "-e", name, "-m", "devdax", "-M", "mem", "-a", str(dax.HUGE))
    done = machine.run(Command(argv, "make it a devdax namespace"), timeout=_SECONDS)
    if done.status:
        raise EmupmemError(f"{shlex.join(argv)} failed: {done.last_words}", "sudo dmesg may show more")
    machine.settle()
    made = _region(machine, region.start or 0)
    if made is None or not made.char:
        raise EmupmemError(f"{PROGRAM} made no DAX device of {name}", "sudo dmesg may show why")
    return made
