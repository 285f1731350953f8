# SPDX-License-Identifier: Apache-2.0
"""What the kernel shows of pmem block devices and of mounts, and what a device holds."""

from __future__ import annotations

import re
from collections.abc import Sequence

from emupmem.device.nature import EMULATED
from emupmem.kernel.cmdline import parse_command_line
from emupmem.model import KIB, MIB, UNCHANGED, Command, EmupmemError, MemmapItem
from emupmem.record import record
from emupmem.system.host import Host
from emupmem.system.machine import Machine
from emupmem.system.programs import Completed
from emupmem.system.sysfs import Region

FILE_SYSTEMS = ("ext4", "xfs")
"""Those that mount makes, the first where none is asked for."""

UNSIGNED = "data without a signature"


@record
class Mounted:
    """A line of /proc/self/mountinfo: `number` is MAJOR:MINOR, `root` the part of the file system."""

    number: str
    root: str
    dir: str
    fs: str
    source: str
    options: tuple[str, ...]

    @property
    def dax(self) -> bool:
        """Whether it is mounted for DAX throughout: `dax=always`, or `dax` as kernels before 5.8 say."""
        return "dax=always" in self.options or "dax" in self.options


@record
class Pmem:
    """A pmem block device (bytes). `item` is the reservation that it came from, None where it is not ours.

    `start` is where its region begins, None where the kernel hides that from us.
    """

    dev: str
    number: str
    size: int
    start: int | None
    dax: bool | None
    read_only: bool = False
    partitions: tuple[str, ...] = ()
    holders: tuple[str, ...] = ()
    item: MemmapItem | None = None
    provider: str = ""
    domain: str = ""

    @property
    def whole(self) -> bool:
        """Whether it is all of its reservation, not a namespace among others."""
        return self.item is not None and self.size == self.item.size


def parse_mountinfo(text: str) -> tuple[Mounted, ...]:
    """The mounts of /proc/self/mountinfo, octal escapes decoded (proc(5)). Lines of other shapes are left out."""
    found = []
    for line in text.splitlines():
        left, dash, right = line.partition(" - ")
        words, more = left.split(" "), right.split(" ")
        if not dash or len(words) < 6 or len(more) < 3:
            continue
        options = dict.fromkeys((*words[5].split(","), *more[2].split(",")))
        root, folder, source = (_plain(w) for w in (words[3], words[4], more[1]))
        found.append(Mounted(words[2], root, folder, more[0], source, tuple(options)))
    return tuple(found)


def _plain(word: str) -> str:
    octal = re.compile(rb"\\([0-7]{3})")
    data = octal.sub(lambda m: bytes([int(m[1], 8) & 255]), word.encode("utf-8", "surrogateescape"))
    return data.decode("utf-8", "replace")


def mounts(machine: Host) -> tuple[Mounted, ...]:
    """Everything that is mounted, in the kernel's order."""
    return parse_mountinfo(machine.peek("/proc/self/mountinfo"))


def mount_of(all_mounts: Sequence[Mounted], folder: str) -> Mounted | None:
    """The mount that a folder lies on: the longest way that leads there, the last of those."""
    above = [m for m in all_mounts if m.dir in ("/", folder) or folder.startswith(f"{m.dir}/")]
    return max(reversed(above), key=lambda m: len(m.dir), default=None)


def stack(machine: Host, number: str, depth: int = 8) -> tuple[str, ...]:
    """What a block device (MAJ:MIN) is made of, from the top: `LVM`, `encrypted`, `RAID`, `multipath`, `mapped`."""
    here = f"/sys/dev/block/{number}"
    kinds = {"LVM": "LVM", "CRYPT": "encrypted", "mpath": "multipath"}
    # A partition (of a RAID) has these in the folder above its own.
    mapped = next((p for p in (f"{here}/dm", f"{here}/../dm") if machine.exists(p)), "")
    found = [kinds.get(machine.peek(f"{mapped}/uuid").partition("-")[0], "mapped")] if mapped else []
    found += ["RAID"] if machine.peek(f"{here}/md/level") or machine.peek(f"{here}/../md/level") else []
    for below in machine.names(f"{here}/slaves") if depth else ():
        found += stack(machine, machine.peek(f"{here}/slaves/{below}/dev"), depth - 1)
    return tuple(dict.fromkeys(found))


def mounted_at(machine: Host, device: Pmem) -> str:
    """Where a device is mounted, empty where it is not."""
    return next((m.dir for m in mounts(machine) if m.number == device.number), "")


def devices(machine: Host) -> tuple[Pmem, ...]:
    """All pmem block devices, namespaces of one region too; ours are those on a range that this boot reserves."""
    regions = {r.name: r for r in machine.regions()}
    items = _reservations(machine, tuple(regions.values()))
    found = []
    for name in machine.names("/sys/class/block"):
        if not re.fullmatch(r"pmem\d+(\.\d+)?s?", name):
            continue
        parts = machine.real(f"/sys/class/block/{name}").split("/")
        region = next((regions[p] for p in parts if p in regions), None)
        if region is not None:
            found.append(_device(machine, name, region, items.get(region.name)))
    return tuple(sorted(found, key=lambda d: (d.start is None, d.start, d.dev)))


def reserved_regions(machine: Host) -> frozenset[str]:
    """The names of the regions that lie in what this boot reserves."""
    return frozenset(_reservations(machine, machine.regions()))


def _reservations(machine: Host, regions: Sequence[Region]) -> dict[str, MemmapItem]:
    """The reservation of each region: by its start, or without root (addresses are hidden) by size and order."""
    items = parse_command_line(machine.peek("/proc/cmdline")).pmem
    found = {r.name: i for r in regions for i in items if r.start == i.start}
    for size in {i.size for i in items}:
        hidden = [r for r in regions if r.start is None and r.size == size and r.provider in ("", *EMULATED)]
        same = [i for i in items if i.size == size]
        found |= {r.name: i for r, i in zip(hidden, same, strict=False)}
    return found


def _device(machine: Host, name: str, region: Region, item: MemmapItem | None) -> Pmem:
    base = f"/sys/class/block/{name}"
    parts = [n for n in machine.names(base) if re.fullmatch(rf"{re.escape(name)}p\d+", n)]
    return Pmem(
        f"/dev/{name}",
        machine.peek(f"{base}/dev"),
        int(machine.peek(f"{base}/size") or 0) * 512,
        region.start,
        {"1": True, "0": False}.get(machine.peek(f"{base}/queue/dax")),
        machine.peek(f"{base}/ro") == "1",
        tuple(machine.peek(f"{base}/{n}/dev") for n in parts),
        tuple(machine.names(f"{base}/holders")),
        item,
        region.provider,
        machine.peek(f"/sys/bus/nd/devices/{region.name}/persistence_domain"),
    )


def parse_blkid(done: Completed) -> str:
    """What `blkid -p -o export` found on a device: `ext4`, `dos partition table`, empty where it is blank.

    Raises EmupmemError where the answer cannot be trusted.
    """
    if done.status == 2:
        return ""
    if done.status == 8:
        return "several signatures at once"
    if done.status:
        raise EmupmemError(f"blkid failed with status {done.status}: {done.last_words}", state=UNCHANGED)
    pairs = dict(line.partition("=")[::2] for line in done.stdout.decode("utf-8", "replace").splitlines())
    if pairs.get("TYPE"):
        return pairs["TYPE"]
    return f"{pairs['PTTYPE']} partition table" if pairs.get("PTTYPE") else "something that blkid knows"


def signature(machine: Machine, dev: str) -> str:
    """What two programs see on a device; empty only where both call it blank. Raises EmupmemError."""
    found = parse_blkid(machine.run(Command(("blkid", "-p", "-o", "export", dev), "look what it holds")))
    if found:
        return found
    done = machine.run(Command(("wipefs", "-n", dev), "look for signatures"))
    if done.status:
        raise EmupmemError(f"wipefs failed with status {done.status}: {done.last_words}", state=UNCHANGED)
    return "a signature that wipefs knows" if done.stdout.strip() else ""


def data_of(machine: Machine, device: Pmem) -> str:
    """The same of a device that is not emulated, where data without any signature may be somebody's database.

    Emulated ones begin with whatever was in that RAM. Looked at are the beginning, the end and a thousand places
    between: of terabytes that is a second.
    """
    found = signature(machine, device.dev)
    if found or device.item is not None:
        return found
    size, step = device.size, max(MIB, device.size // 1000)
    with machine.open(device.dev) as file:
        for at in (*range(0, size, step), max(0, size - MIB)):
            file.seek(at)
            piece = file.read(MIB if at in (0, size - MIB) else 4 * KIB)
            if piece.count(0) != len(piece):
                return UNSIGNED
    return ""
