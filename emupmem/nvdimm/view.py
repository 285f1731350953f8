# SPDX-License-Identifier: Apache-2.0
"""Regions and namespaces of NVDIMMs: what is there, and what makes and unmakes it.

ndctl knows regions and namespaces, ipmctl the goal of Intel's Optane modules. ndctl is not trusted to
refuse: `ndctl destroy-namespace -f` turns off a namespace without labels, destroys nothing and ends
with status 0, and `create-namespace -e` deletes the old one before it finds that the new one cannot be
(76.1). So each change is judged here first, and what came of it is looked at afterwards.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from emupmem.device.blocks import mounts, reserved_regions
from emupmem.device.nature import nature
from emupmem.model import KIB, MIB, Command, EmupmemError, NamespaceMode
from emupmem.nvdimm import cxl, ipmctl
from emupmem.record import record
from emupmem.system.distribution import install_hint
from emupmem.system.machine import Machine

MODES = tuple(NamespaceMode)

ALIGNMENTS = (4 * KIB, 2 * MIB)
"""What every kernel can, where ndctl does not tell."""

BUS = "/sys/bus/nd/devices"
LABEL_LESS = "4"
"""`nstype` of a region whose one namespace the kernel made up: nothing is written on its DIMMs."""

SECONDS = 300


@record
class Mount:
    """Where a device is mounted."""

    dir: str
    fs: str
    dax: bool


@record
class Namespace:
    """A namespace: bytes usable, its device (`/dev/pmem0`, empty where it has none), its mounts.

    `map` is where the page map lies (`mem`, `dev`), `align` 0 where the mode has none; `size` is 0 where the
    kernel does not tell it (a namespace that is disabled). `alt_name` is a name that was given to it, `raw_size`
    the bytes that it takes of its region.
    """

    name: str
    region: str
    mode: str
    map: str
    size: int
    align: int
    dev: str
    enabled: bool
    system_ram: bool = False
    mounts: tuple[Mount, ...] = ()
    bad_blocks: int = 0
    alt_name: str = ""
    raw_size: int = 0


@record
class NvdimmRegion:
    """A region: bytes; `free` is the largest namespace that can be made in one piece.

    `start` is None where the kernel hides it, `iset` the number of the interleave set in hexadecimal,
    `dimms` are the names of its modules, `alignments` what its fsdax and devdax can have. `emulated`:
    it is RAM, and volatile; `nature` says it in words. `bad_blocks` are pieces of 512 bytes.
    """

    name: str
    provider: str
    start: int | None
    size: int
    free: int
    align: int
    numa_node: int | None
    persistence_domain: str
    enabled: bool
    labelled: bool
    emulated: bool
    volatile: bool
    iset: str
    dimms: tuple[str, ...]
    alignments: tuple[int, ...]
    namespaces: tuple[Namespace, ...]
    nature: str = ""
    bad_blocks: int = 0

    def step(self, align: int = 0) -> int:
        """Namespaces start and end at multiples of this: bytes over all interleaved modules."""
        ways = max(1, len(self.dimms))
        return math.lcm(self.align or 1, max(align, 4 * KIB) * ways)

    def largest(self, align: int = 0) -> int:
        """The largest size that fits, in whole steps."""
        return self.free // self.step(align) * self.step(align)


@record
class Dimm:
    """A module as the kernel names it (`nmem0`); `optane` what ipmctl knows of it, None where it is no such.

    `security` as the kernel tells it (`locked`, empty where there is none), `faults` what it reports as failed.
    """

    name: str
    id: str
    handle: int | None
    enabled: bool
    label_area: bool
    optane: ipmctl.PmemModule | None = None
    security: str = ""
    faults: tuple[str, ...] = ()


@record
class View:
    """All that is there. `goal` waits for a reboot; `warnings` tell what could not be asked."""

    dimms: tuple[Dimm, ...]
    regions: tuple[NvdimmRegion, ...]
    goal: tuple[ipmctl.Goal, ...] = ()
    warnings: tuple[str, ...] = ()


# What is there -----------------------------------------------------------------------------------


def require_ndctl(machine: Machine) -> None:
    """Raises EmupmemError where ndctl is missing."""
    if machine.find("ndctl") is None:
        raise EmupmemError("ndctl is not installed", install_hint(machine, "ndctl"))


def look_at_nvdimms(machine: Machine, socket: int | None = None) -> View:
    """The whole tree, or what belongs to one socket. Raises EmupmemError where ndctl cannot tell."""
    require_ndctl(machine)
    dimms, regions = _listed(machine)
    warnings: tuple[str, ...] = ()
    optane: tuple[ipmctl.PmemModule, ...] = ()
    goal: tuple[ipmctl.Goal, ...] = ()
    if machine.find("ipmctl") is not None:
        try:
            optane = ask_ipmctl(machine, ipmctl.show_dimms, ipmctl.dimms)
            goal = ask_ipmctl(machine, ipmctl.show_goal, ipmctl.goals) if optane else ()
        except EmupmemError as exc:
            warnings = (exc.message,)  # no Optane, or a broken ipmctl: what ndctl tells is right all the same
    command = cxl.region_command(machine)
    if command:
        warnings = (*warnings, f"a CXL device has persistent capacity in no region: {command}")
    known = {m.handle: m for m in optane}
    view = View(tuple(replace(d, optane=known.get(d.handle)) for d in dimms), regions, goal, warnings)
    return view if socket is None else _of_socket(view, optane, socket)


def _of_socket(view: View, optane: Sequence[ipmctl.PmemModule], socket: int) -> View:
    """What belongs to a socket: by its modules where ipmctl knows them, else by the region's NUMA node."""
    mine = {m.handle for m in optane if m.socket == socket}
    dimms = tuple(d for d in view.dimms if d.optane is not None and d.handle in mine)
    names = {d.name for d in dimms}
    regions = tuple(
        r
        for r in view.regions
        if (bool(names & set(r.dimms)) if _all_optane(view, r) else r.numa_node == socket)
    )
    others = {n for r in regions for n in r.dimms}
    dimms = tuple(d for d in view.dimms if d in dimms or d.name in others)
    if not dimms and not regions:
        nodes = sorted({n for r in view.regions if (n := r.numa_node) is not None})
        nodes = sorted({*nodes, *(m.socket for m in optane if m.socket is not None)})
        listed = f"there is something on {', '.join(map(str, nodes))}" if nodes else ""
        raise EmupmemError(f"there is no persistent memory on socket {socket}", listed)
    return replace(
        view, dimms=dimms, regions=regions, goal=tuple(g for g in view.goal if g.socket in (None, socket))
    )


def _all_optane(view: View, region: NvdimmRegion) -> bool:
    known = {d.name for d in view.dimms if d.optane is not None}
    return bool(region.dimms) and set(region.dimms) <= known


def _listed(machine: Machine) -> tuple[tuple[Dimm, ...], tuple[NvdimmRegion, ...]]:
    """What ndctl tells of all buses, idle ones too. Raises EmupmemError."""
    # -C (what a region can) came with ndctl 65; older ones end with a usage error.
    done = machine.run(Command(("ndctl", "list", "-BDRNCivX")), timeout=SECONDS)
    if done.status:
        done = machine.run(Command(("ndctl", "list", "-BDRNivX")), timeout=SECONDS)
    if done.status:
        raise EmupmemError(f"ndctl list failed: {done.errors}", "sudo dmesg may show more")
    text = done.stdout.decode("utf-8", "replace").strip()
    try:
        buses = json.loads(text or "[]")
        buses = buses if isinstance(buses, list) else [buses]
        all_mounts = _mounts(machine)
        dimms = [_dimm(machine, d) for b in buses for d in b.get("dimms", ())]
        regions = [
            _region(machine, b.get("provider", ""), r, all_mounts)
            for b in buses
            for r in b.get("regions", ())
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise EmupmemError("ndctl list answered in a form that emupmem does not know") from exc
    return tuple(sorted(dimms, key=order_of)), tuple(sorted(regions, key=order_of))


def real_first(regions: Iterable[NvdimmRegion]) -> list[NvdimmRegion]:
    """Regions in the order in which one of them is chosen: real ones before emulated ones."""
    return sorted(regions, key=lambda r: (r.emulated, order_of(r)))


def order_of(one: Dimm | NvdimmRegion | Namespace) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", one.name))


def _mounts(machine: Machine) -> dict[str, tuple[Mount, ...]]:
    """The mounts of each pmem block device, by its name."""
    numbers = {
        machine.peek(f"/sys/class/block/{n}/dev"): n
        for n in machine.names("/sys/class/block")
        if n.startswith("pmem")
    }
    found: dict[str, tuple[Mount, ...]] = {}
    for m in mounts(machine):
        if name := numbers.get(m.number, ""):
            found[name] = (*found.get(name, ()), Mount(m.dir, m.fs, m.dax))
    return found


def _dimm(machine: Machine, d: dict[str, Any]) -> Dimm:
    commands = machine.peek(f"{BUS}/{d['dev']}/commands").split()
    told = [w.removeprefix("flag_") for w, on in d.items() if w.startswith("flag_") and on]
    return Dimm(
        d["dev"],
        d.get("id", ""),
        d.get("handle"),
        d.get("state") != "disabled",
        "set_data" in commands,
        security=d.get("security", ""),
        faults=tuple(w.replace("_", " ") for w in sorted(told)),
    )


def _bad_blocks(machine: Machine, name: str) -> int:
    """How many pieces of 512 bytes the kernel knows as bad, from a `badblocks` of sysfs: lines of start and count."""
    lines = (line.split() for line in machine.peek(name).splitlines())
    return sum(int(words[1]) for words in lines if len(words) == 2 and words[1].isdigit())


def _region(
    machine: Machine, provider: str, r: dict[str, Any], all_mounts: dict[str, tuple[Mount, ...]]
) -> NvdimmRegion:
    here = f"{BUS}/{r['dev']}"
    reserved = r["dev"] in reserved_regions(machine)
    emulated = reserved or provider == "ramdax"
    kind = machine.peek(f"{here}/nstype")
    labelled = kind != LABEL_LESS if kind else provider != "e820"
    start = machine.peek(f"{here}/resource")
    align = machine.peek(f"{here}/align")
    alignments = {a for c in r.get("capabilities", ()) for a in c.get("alignments", ())}
    # The seed for the next one has the size 0; one that is disabled may have none at all.
    there = [n for n in r.get("namespaces", ()) if n.get("size") != 0]
    spaces = [_namespace(machine, n, r["dev"], all_mounts) for n in there]
    domain = r.get("persistence_domain", "unknown")
    iset = r.get("iset_id")
    return NvdimmRegion(
        r["dev"],
        provider,
        int(start, 0) if re.fullmatch(r"0x[0-9a-f]+|\d+", start) else None,
        r["size"],
        # A region without labels is all one namespace, whatever sysfs says of room.
        r.get("max_available_extent", r.get("available_size", 0)) if labelled else 0,
        r.get("align") or (int(align, 0) if align else 0),
        r.get("numa_node"),
        domain,
        r.get("state") != "disabled",
        labelled,
        emulated,
        emulated,
        interleave_set_of(iset & (1 << 64) - 1) if isinstance(iset, int) else "",
        tuple(dict.fromkeys(m["dimm"] for m in r.get("mappings", ()))),
        tuple(sorted(alignments)) or ALIGNMENTS,
        tuple(sorted(spaces, key=order_of)),
        nature(machine, provider, reserved, domain),
        _bad_blocks(machine, f"{here}/badblocks"),
    )


def interleave_set_of(number: int) -> str:
    return f"0x{number:016x}"


def _namespace(
    machine: Machine, n: dict[str, Any], region: str, all_mounts: dict[str, tuple[Mount, ...]]
) -> Namespace:
    block = n.get("blockdev", "")
    chars = [d for g in (n.get("daxregion", {}),) for d in g.get("devices", ())]
    char = n.get("chardev") or next((d["chardev"] for d in chars), "")
    enabled = n.get("state") != "disabled"
    dev = (block or char) if enabled else ""
    return Namespace(
        n["dev"],
        region,
        {"memory": "fsdax", "dax": "devdax", "safe": "sector"}.get(n.get("mode", ""), n.get("mode", "")),
        n.get("map", ""),
        n.get("size", 0),
        n.get("align") or n.get("daxregion", {}).get("align", 0),
        f"/dev/{dev}" if dev else "",
        enabled,
        any(d.get("mode") == "system-ram" for d in chars),
        all_mounts.get(block, ()),
        _bad_blocks(machine, f"/sys/class/block/{block}/badblocks") if block else 0,
        n.get("name", ""),
        int(raw) if (raw := machine.peek(f"{BUS}/{n['dev']}/size")).isdigit() else n.get("size", 0),
    )


def namespaces_named(view: View, name: str) -> list[tuple[NvdimmRegion, Namespace]]:
    """The namespace that the kernel calls so, or whose device is; else those that were given this name."""
    all_ = [(r, n) for r in view.regions for n in r.namespaces]
    for region, one in all_:
        if name == one.name or (one.dev and name in (one.dev, one.dev.rpartition("/")[2])):
            return [(region, one)]
    return [(r, n) for r, n in all_ if name and n.alt_name == name]


def find_namespace(view: View, name: str) -> tuple[NvdimmRegion, Namespace]:
    """The one namespace of `namespaces_named`. Raises EmupmemError; other tools give a name twice."""
    found = namespaces_named(view, name)
    if len(found) == 1:
        return found[0]
    if found:
        which = ", ".join(n.name for _, n in found)
        raise EmupmemError(f"{len(found)} namespaces have the name {name}", f"say which: {which}")
    listed = ", ".join(n.name for r in view.regions for n in r.namespaces)
    raise EmupmemError(
        f"there is no namespace {name}", f"there is {listed}" if listed else "there is none at all"
    )


# The goal of Optane modules ---------------------------------------------------------------------------


T = TypeVar("T")


def ask_ipmctl(
    machine: Machine,
    build: Callable[[int | None, bool], Command],
    parse: Callable[[str], tuple[T, ...]],
    socket: int | None = None,
) -> tuple[T, ...]:
    """What ipmctl shows, asked in full or, where a version does not know that, in its plain form.

    Raises EmupmemError where it fails, and where it says something that cannot be read: that is not nothing.
    """
    command = build(socket, True)
    try:
        text = ipmctl_error(machine, command)
    except EmupmemError:
        command = build(socket, False)
        text = ipmctl_error(machine, command)
    found = parse(text)
    if not found and not ipmctl.empty(text):
        raise EmupmemError(f"{shlex.join(command.argv)} answered in a form that emupmem does not know")
    return found


def ipmctl_error(machine: Machine, command: Command) -> str:
    """What ipmctl printed; nothing to show is no failure. Raises EmupmemError with its own words."""
    done = machine.run(command, timeout=SECONDS)
    text = (done.stdout + b"\n" + done.stderr).decode("utf-8", "replace").strip()
    if ipmctl.nothing(text):
        return ""
    wrong = ipmctl.complaint(text)
    if wrong or done.status:
        what = " ".join(a for a in command.argv[:2])
        raise EmupmemError(f"{what} failed: {wrong or done.last_words or f'status {done.status}'}")
    return text
