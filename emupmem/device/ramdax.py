# SPDX-License-Identifier: Apache-2.0
"""Namespaces that can be made, resized and deleted on the reserved range: the ramdax driver.

Linux 6.19 has a second driver for the platform device `e820_pmem` (drivers/nvdimm/ramdax.c). It
keeps labels in the last 128 KiB of each range, so that ndctl can divide the range at run time. It
binds only where `driver_override` says so. All of it lies in RAM: a power cycle takes the labels too.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from typing import Any

from emupmem.model import KIB, MIB, UNCHANGED, Command, EmupmemError, NamespaceMode
from emupmem.record import record
from emupmem.system import files, lock, processes
from emupmem.system.lock import wait_for
from emupmem.system.machine import Machine
from emupmem.units import human, tight

SINCE = (6, 19)
DRIVER, LEGACY = "ramdax", "e820_pmem"
DEVICE = "e820_pmem"
HERE = f"/sys/bus/platform/devices/{DEVICE}"
LABELS = 128 * KIB
STEP = 16 * MIB
"""What a region is divided in where the kernel does not say otherwise (MEMREMAP_COMPAT_ALIGN_MAX)."""
SAID = "sudo dmesg may show more"
MODES = tuple(NamespaceMode)
RULE = "/etc/udev/rules.d/70-emupmem-ramdax.rules"
RULE_TEXT = f"""\
# Written by `emupmem namespaces bind --at-boot`, removed by `emupmem namespaces unbind --at-boot`.
# Gives the reserved range to {DRIVER} before another driver has it. Where the kernel has no {DRIVER},
# or a driver has the range already, nothing happens.
ACTION=="add", SUBSYSTEM=="platform", KERNEL=="{DEVICE}", DRIVER=="", PROGRAM=="/sbin/modprobe -q {DRIVER}", \
ATTR{{driver_override}}="{DRIVER}", ATTR{{[drivers/platform:{DRIVER}]bind}}="{DEVICE}"
"""


@record
class Write:
    """A text for a file of sysfs, as data until it is done."""

    name: str
    text: str

    def __str__(self) -> str:
        return f"echo {shlex.quote(self.text)} > {self.name}" if self.text else f"echo > {self.name}"


Step = Write | Command


@record
class RamNamespace:
    """A namespace with a size: bytes usable, bytes of the range it takes, its device under /dev."""

    name: str
    mode: str
    size: int
    raw_size: int
    start: int
    dev: str
    region: str


@record
class RamdaxRegion:
    """A range that ramdax has: bytes; `free` is the largest namespace that could be made."""

    name: str
    start: int
    size: int
    free: int
    namespaces: tuple[RamNamespace, ...]


# What is there -----------------------------------------------------------------------------------


def driver(machine: Machine) -> str:
    """The driver that has the reserved ranges, empty where none has them."""
    if not machine.exists(f"{HERE}/driver"):
        return ""
    return machine.path(f"{HERE}/driver").name


def require(machine: Machine) -> None:
    """Raises EmupmemError where there is nothing to bind or the kernel has no ramdax."""
    release = machine.peek("/proc/sys/kernel/osrelease")
    found = re.match(r"(\d+)\.(\d+)", release)
    if found and (int(found[1]), int(found[2])) < SINCE:
        raise EmupmemError(
            f"ramdax exists since Linux {SINCE[0]}.{SINCE[1]}; this is {release}",
            "without it each memmap= range is one device: emupmem apply --count makes several",
        )
    if not machine.exists(f"/sys/bus/platform/drivers/{DRIVER}") and not _has_module(machine, release):
        raise EmupmemError(f"this kernel ({release}) is built without ramdax (CONFIG_RAMDAX)")
    if not machine.exists(HERE):
        raise EmupmemError("no memory is reserved in this boot", "sudo emupmem apply --size …, then reboot")


def _has_module(machine: Machine, release: str) -> bool:
    for base in ("/lib/modules", "/usr/lib/modules"):
        listed = machine.peek(f"{base}/{release}/modules.dep") + machine.peek(
            f"{base}/{release}/modules.builtin"
        )
        if f"/{DRIVER}.ko" in listed:
            return True
    return False


def ramdax_regions(machine: Machine) -> tuple[RamdaxRegion, ...]:
    """What ndctl tells of the ranges that ramdax has. Raises EmupmemError."""
    if driver(machine) != DRIVER:
        return ()
    out = _ndctl(machine, "list", "-B", "-R", "-N")
    buses = json.loads(out or "[]")
    found = []
    for bus in buses if isinstance(buses, list) else [buses]:
        if bus.get("provider") == DRIVER:
            found += [_region(machine, r) for r in bus.get("regions", ())]
    return tuple(sorted(found, key=lambda r: r.start))


def _region(machine: Machine, r: dict[str, Any]) -> RamdaxRegion:
    name = r["dev"]
    spaces = tuple(_namespace(machine, n, name) for n in r.get("namespaces", ()) if n.get("size"))
    here = f"/sys/bus/nd/devices/{name}"
    start = int(machine.peek(f"{here}/resource") or "0", 0)
    free = r.get("max_available_extent", r.get("available_size", 0))
    return RamdaxRegion(name, start, r["size"], free, tuple(sorted(spaces, key=lambda n: n.start)))


def _namespace(machine: Machine, n: dict[str, Any], region: str) -> RamNamespace:
    here = f"/sys/bus/nd/devices/{n['dev']}"
    dev = n.get("blockdev") or n.get("chardev") or ""
    raw = int(machine.peek(f"{here}/size") or n["size"])
    start = int(machine.peek(f"{here}/resource") or "0", 0)
    return RamNamespace(n["dev"], n.get("mode", ""), n["size"], raw, start, dev, region)


def find_ram_namespace(machine: Machine, name: str) -> tuple[RamdaxRegion, RamNamespace]:
    """The namespace of that name (or of that device). Raises EmupmemError."""
    _require_bound(machine)
    known = []
    for region in ramdax_regions(machine):
        for one in region.namespaces:
            if name in (one.name, one.dev, f"/dev/{one.dev}"):
                return region, one
            known.append(one.name)
    listed = f"there is {', '.join(known)}" if known else "there is none"
    raise EmupmemError(f"there is no namespace {name} on the emulated memory", listed)


def _require_bound(machine: Machine) -> None:
    require(machine)
    if driver(machine) != DRIVER:
        raise EmupmemError(
            f"the reserved range belongs to {driver(machine) or 'no driver'}, not to {DRIVER}",
            "sudo emupmem namespaces bind",
        )


def _ndctl(machine: Machine, *argv: str) -> str:
    done = machine.run(Command(("ndctl", *argv)), timeout=300)
    if done.status:
        raise EmupmemError(f"ndctl {argv[0]} failed: {done.errors}", SAID)
    return done.stdout.decode("utf-8", "replace")


# Who uses it --------------------------------------------------------------------------------------


def blocks(machine: Machine) -> tuple[str, ...]:
    """Block and character devices on the reserved ranges, whichever driver has them."""
    found = []
    for kind in ("block", "dax"):
        folder = "/sys/class/block" if kind == "block" else "/sys/bus/dax/devices"
        for name in machine.names(folder):
            if DEVICE in machine.path(f"{folder}/{name}").parts:
                found.append(name)
    return tuple(found)


def refuse_used(machine: Machine, devices: Sequence[str]) -> None:
    """Raises EmupmemError naming the first of these devices that is mounted, claimed, open, mapped or RAM."""
    mounted = dict(
        line.split(" ")[2:5:2] for line in machine.peek("/proc/self/mountinfo").splitlines() if line
    )
    for name in devices:
        number = machine.peek(f"/sys/class/block/{name}/dev")
        if number in mounted:
            raise EmupmemError(f"/dev/{name} is mounted on {mounted[number]}", f"umount {mounted[number]}")
        if number and machine.exists(f"/dev/{name}"):
            with lock.hold_device(machine, f"/dev/{name}"):
                pass
        if machine.real(f"/sys/bus/dax/devices/{name}/driver").endswith("/kmem"):
            raise EmupmemError(
                f"/dev/{name} is in use as RAM", f"daxctl reconfigure-device --mode=devdax {name} first"
            )
        if not number and (who := processes.opened_by(machine, f"/dev/{name}")):
            raise EmupmemError(f"/dev/{name} is in use by {who}", "end that program first")


# Binding ------------------------------------------------------------------------------------------


def bind_steps(machine: Machine, wanted: str = DRIVER) -> tuple[Step, ...]:
    """What gives the reserved ranges to a driver; empty where it has them. All on it is lost."""
    if wanted == DRIVER:
        require(machine)
    has = driver(machine)
    if has == wanted:
        return ()
    refuse_used(machine, blocks(machine))
    load = "nd_e820" if wanted == LEGACY else wanted
    steps: list[Step] = [Command(("modprobe", load))]
    steps.append(Write(f"{HERE}/driver_override", wanted if wanted == DRIVER else ""))
    if has:
        steps.append(Write(f"/sys/bus/platform/drivers/{has}/unbind", DEVICE))
    steps.append(Write("/sys/bus/platform/drivers_probe", DEVICE))
    return tuple(steps)


def rebind(machine: Machine, steps: Sequence[Step], wanted: str = DRIVER) -> None:
    """Do the steps; where the driver does not take the range, the former one gets it back."""
    former = driver(machine)
    try:
        run_steps(machine, steps)
        if not wait_for(lambda: driver(machine) == wanted, 10, "the driver"):
            raise EmupmemError(f"{wanted} did not take the range", "sudo dmesg may show why")
    except EmupmemError:
        if former and driver(machine) != former:
            run_steps(machine, (Write(f"{HERE}/driver_override", former if former == DRIVER else ""),))
            run_steps(machine, (Write("/sys/bus/platform/drivers_probe", DEVICE),))
        raise
    machine.settle()


def run_steps(machine: Machine, steps: Sequence[Step]) -> None:
    """Carry out what was planned. Raises EmupmemError at the first that fails."""
    for step in steps:
        if isinstance(step, Write):
            files.write_sysfs(machine, step.name, step.text)
        elif (done := machine.run(step, timeout=300)).status:
            raise EmupmemError(f"{shlex.join(step.argv)} failed: {done.errors}", SAID)


def require_at_boot(machine: Machine) -> None:
    """Raises EmupmemError where the other driver has the range before a rule can act."""
    release = machine.peek("/proc/sys/kernel/osrelease")
    if "/nd_e820.ko" in machine.peek(f"/lib/modules/{release}/modules.builtin"):
        raise EmupmemError(
            "in this kernel nd_e820 is built in and has the range before ramdax can",
            "bind it after each boot: sudo emupmem namespaces bind",
        )


def boot_step(machine: Machine, binds: bool) -> str:
    """What is done to bind, or no longer to bind, at every boot, in a line for people; empty where nothing is."""
    if binds:
        return "" if machine.peek(RULE) == RULE_TEXT.strip() else f"write {RULE}"
    return f"rm {RULE}" if machine.exists(RULE) else ""


def bind_at_boot(machine: Machine) -> None:
    """Bind at every boot: one rule for udev, which does nothing where it cannot be done."""
    files.install_file(machine, RULE, RULE_TEXT)
    machine.output("udevadm", "control", "--reload")


def remove_at_boot(machine: Machine) -> None:
    """Take the rule away."""
    files.delete_file(machine, RULE)
    machine.output("udevadm", "control", "--reload")


# Namespaces ---------------------------------------------------------------------------------------


def create_steps(machine: Machine, size: int, mode: str) -> tuple[Step, ...]:
    """What makes a namespace on the first range with room. Raises EmupmemError where none has."""
    _require_bound(machine)
    there = ramdax_regions(machine)
    for region in there:
        if region.free >= size:
            step = _step(machine, region)
            refuse_size_between(region.name, size, step, region.free // step * step)
            return (_create(region.name, size, mode),)
    most = max((r.free for r in there), default=0)
    raise EmupmemError(
        f"no range has room for {human(size)} in one piece", f"the most is {human(most)}" if most else ""
    )


def _step(machine: Machine, region: RamdaxRegion) -> int:
    """What the sizes of a region's namespaces are multiples of, in bytes; ndctl refuses all others."""
    align = machine.peek(f"/sys/bus/nd/devices/{region.name}/align")
    try:
        return max(int(align, 0), 4 * KIB)
    except ValueError:
        return STEP


def refuse_size_between(region: str, size: int, step: int, most: int) -> None:
    """Raises EmupmemError for a size that is no multiple of `step`, or none: ndctl takes 0 for all that is free."""
    if size <= 0 or size % step:
        up = min(-(-size // step) * step or step, most)
        raise EmupmemError(
            f"{tight(size)} is not a multiple of {human(step)}, in which {region} is divided",
            f"--size {tight(up)} is the next"
            if up
            else f"the least is {tight(step)}, for which there is no room",
        )


def _create(region: str, size: int, mode: str) -> Command:
    return Command(("ndctl", "create-namespace", "-r", region, "-m", mode, "-s", str(size)))


def delete_steps(machine: Machine, name: str) -> tuple[Step, ...]:
    """What deletes a namespace and all on it."""
    _, one = find_ram_namespace(machine, name)
    refuse_used(machine, (one.dev,))
    return (Command(("ndctl", "destroy-namespace", "-f", one.name)),)


def resize_steps(machine: Machine, name: str, size: int) -> tuple[Step, ...]:
    """What makes a namespace of another size in place of one: its content is lost.

    `ndctl create-namespace -e … -s …` would delete the old one before it finds that the new one has
    no room (7.2 warns of an allocation underrun then), or that it refuses its size: both are proven here first.
    """
    region, one = find_ram_namespace(machine, name)
    refuse_used(machine, (one.dev,))
    step = _step(machine, region)
    most = largest_gap(region, without=one, align=step)
    if size > most:
        raise EmupmemError(f"{one.name} can have at most {human(most)} in one piece", state=UNCHANGED)
    refuse_size_between(region.name, size, step, most)
    return (
        Command(("ndctl", "destroy-namespace", "-f", one.name)),
        _create(region.name, size, one.mode),
    )


def largest_gap(region: RamdaxRegion, without: RamNamespace, align: int = STEP) -> int:
    """The largest piece that would be free without that namespace, in the steps ndctl allocates in."""
    taken = [(n.start, n.start + n.raw_size) for n in region.namespaces if n != without]
    most, at = 0, region.start
    for start, end in [*sorted(taken), (region.start + region.size - LABELS,) * 2]:
        most, at = max(most, start - at), max(at, end)
    return most // align * align
