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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from emupmem import ipmctl, namespaces
from emupmem.blocks import mounts, signature
from emupmem.model import KIB, MIB, Command, EmupmemError
from emupmem.system import processes
from emupmem.system.lock import wait_for
from emupmem.system.machine import Machine
from emupmem.system.programs import Completed
from emupmem.units import human, parse_size, tight

MODES = ("raw", "sector", "fsdax", "devdax")
MAPPED = ("fsdax", "devdax")
"""The modes that have a page map, and so --map and --align."""

EMULATED = ("e820", "ramdax")
"""Providers of regions that are RAM: what memmap= made, and its division by ramdax."""

ALIGNMENTS = (4 * KIB, 2 * MIB)
"""What every kernel can, where ndctl does not tell."""

START = 16 * MIB
"""ndctl makes fsdax and devdax only where a namespace starts at a multiple of this."""

LEAST = 16 * MIB
"""Neither a page map nor a sector table fits into less."""

BUS = "/sys/bus/nd/devices"
LABEL_LESS = "4"
"""`nstype` of a region whose one namespace the kernel made up: nothing is written on its DIMMs."""

SECONDS = 300


@dataclass(frozen=True, slots=True)
class Mount:
    """Where a device is mounted."""

    dir: str
    fs: str
    dax: bool


@dataclass(frozen=True, slots=True)
class Namespace:
    """A namespace: bytes usable, its device (`/dev/pmem0`, empty where it has none), its mounts.

    `map` is where the page map lies (`mem`, `dev`), `align` 0 where the mode has none.
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


@dataclass(frozen=True, slots=True)
class Region:
    """A region: bytes; `free` is the largest namespace that can be made in one piece.

    `start` is None where the kernel hides it, `iset` the number of the interleave set in hexadecimal,
    `dimms` are the names of its modules, `alignments` what its fsdax and devdax can have. `emulated`:
    it is RAM, and volatile.
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

    def step(self, align: int = 0) -> int:
        """Namespaces start and end at multiples of this: bytes over all interleaved modules."""
        ways = max(1, len(self.dimms))
        return math.lcm(self.align or 1, max(align, 4 * KIB) * ways)

    def largest(self, align: int = 0) -> int:
        """The largest size that fits, in whole steps."""
        return self.free // self.step(align) * self.step(align)


@dataclass(frozen=True, slots=True)
class Dimm:
    """A module as the kernel names it (`nmem0`); `optane` what ipmctl knows of it, None where it is no such."""

    name: str
    id: str
    handle: int | None
    enabled: bool
    label_area: bool
    optane: ipmctl.Dimm | None = None


@dataclass(frozen=True, slots=True)
class View:
    """All that is there. `goal` waits for a reboot; `warnings` tell what could not be asked."""

    dimms: tuple[Dimm, ...]
    regions: tuple[Region, ...]
    goal: tuple[ipmctl.Goal, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """Commands in order; `question` is empty where nothing is lost. `takes` is what goes, None if nothing."""

    commands: tuple[Command, ...]
    region: str
    question: str = ""
    takes: Namespace | None = None


@dataclass(frozen=True, slots=True)
class GoalPlan:
    """What the modules need: `state` is `needed`, `pending` (a reboot is due), `regions` or `done`.

    `regions`: the firmware has made them, and those in `makes` have no namespace yet.
    """

    state: str
    wanted: ipmctl.Wanted
    command: Command
    dimms: tuple[ipmctl.Dimm, ...]
    regions: tuple[Region, ...]
    goal: tuple[ipmctl.Goal, ...] = ()
    warnings: tuple[str, ...] = ()
    makes: tuple[Plan, ...] = ()

    @property
    def commands(self) -> tuple[Command, ...]:
        """What comes next, in order."""
        makes = tuple(c for p in self.makes for c in p.commands)
        return {"needed": (self.command,), "regions": makes}.get(self.state, ())

    @property
    def loss(self) -> str:
        """What setting the goal deletes."""
        names = ", ".join(f"{r.name} ({human(r.size)})" for r in self.regions)
        return f"This deletes {names} and all content on it." if names else "No region is there to lose."

    @property
    def question(self) -> str:
        """What the user has to confirm."""
        if self.state == "regions":
            names = ", ".join(f"{r.name} ({human(r.size)})" for r in self.regions if r.name in self._empty)
            return f"Nothing is lost. Make an fsdax namespace of all the room in {names}?"
        modules = f"{len(self.dimms)} module{'s' if len(self.dimms) != 1 else ''}"
        return f"{self.loss} At the next boot the firmware lays out {modules} anew. Set the goal?"

    @property
    def _empty(self) -> set[str]:
        return {p.region for p in self.makes}


# What is there -----------------------------------------------------------------------------------


def require_ndctl(machine: Machine) -> None:
    """Raises EmupmemError where ndctl is missing."""
    if machine.find("ndctl") is None:
        raise EmupmemError("ndctl is not installed", "apt-get install ndctl, or dnf install ndctl")


def look(machine: Machine, socket: int | None = None) -> View:
    """The whole tree, or what belongs to one socket. Raises EmupmemError where ndctl cannot tell."""
    require_ndctl(machine)
    dimms, regions = _listed(machine)
    warnings: tuple[str, ...] = ()
    optane: tuple[ipmctl.Dimm, ...] = ()
    goal: tuple[ipmctl.Goal, ...] = ()
    if machine.find("ipmctl") is not None:
        try:
            optane = _ask_ipmctl(machine, ipmctl.show_dimms, ipmctl.dimms)
            goal = _ask_ipmctl(machine, ipmctl.show_goal, ipmctl.goals) if optane else ()
        except EmupmemError as exc:
            warnings = (exc.message,)  # no Optane, or a broken ipmctl: what ndctl tells is right all the same
    known = {m.handle: m for m in optane}
    view = View(tuple(replace(d, optane=known.get(d.handle)) for d in dimms), regions, goal, warnings)
    return view if socket is None else _of_socket(view, optane, socket)


def _of_socket(view: View, optane: Sequence[ipmctl.Dimm], socket: int) -> View:
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


def _all_optane(view: View, region: Region) -> bool:
    known = {d.name for d in view.dimms if d.optane is not None}
    return bool(region.dimms) and set(region.dimms) <= known


def _listed(machine: Machine) -> tuple[tuple[Dimm, ...], tuple[Region, ...]]:
    """What ndctl tells of all buses, idle ones too. Raises EmupmemError."""
    # -C (what a region can) came with ndctl 65; older ones end with a usage error.
    done = machine.run(Command(("ndctl", "list", "-BDRNCivX")), timeout=SECONDS)
    if done.status:
        done = machine.run(Command(("ndctl", "list", "-BDRNivX")), timeout=SECONDS)
    if done.status:
        raise EmupmemError(f"ndctl list failed: {_words(done)}", "sudo dmesg may tell more")
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
    return tuple(sorted(dimms, key=_order)), tuple(sorted(regions, key=_order))


def _order(one: Dimm | Region | Namespace) -> tuple[int, ...]:
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
    return Dimm(
        d["dev"], d.get("id", ""), d.get("handle"), d.get("state") != "disabled", "set_data" in commands
    )


def _region(
    machine: Machine, provider: str, r: dict[str, Any], all_mounts: dict[str, tuple[Mount, ...]]
) -> Region:
    here = f"{BUS}/{r['dev']}"
    emulated = provider in EMULATED
    kind = machine.peek(f"{here}/nstype")
    labelled = kind != LABEL_LESS if kind else provider != "e820"
    start = machine.peek(f"{here}/resource")
    align = machine.peek(f"{here}/align")
    alignments = {a for c in r.get("capabilities", ()) for a in c.get("alignments", ())}
    spaces = [_namespace(n, r["dev"], all_mounts) for n in r.get("namespaces", ()) if n.get("size")]
    iset = r.get("iset_id")
    return Region(
        r["dev"],
        provider,
        int(start, 0) if re.fullmatch(r"0x[0-9a-f]+|\d+", start) else None,
        r["size"],
        # A region without labels is all one namespace, whatever sysfs says of room.
        r.get("max_available_extent", r.get("available_size", 0)) if labelled else 0,
        r.get("align") or (int(align, 0) if align else 0),
        r.get("numa_node"),
        r.get("persistence_domain", "unknown"),
        r.get("state") != "disabled",
        labelled,
        emulated,
        emulated,
        _iset(iset & (1 << 64) - 1) if isinstance(iset, int) else "",
        tuple(dict.fromkeys(m["dimm"] for m in r.get("mappings", ()))),
        tuple(sorted(alignments)) or ALIGNMENTS,
        tuple(sorted(spaces, key=_order)),
    )


def _iset(number: int) -> str:
    return f"0x{number:016x}"


def _namespace(n: dict[str, Any], region: str, all_mounts: dict[str, tuple[Mount, ...]]) -> Namespace:
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
        n["size"],
        n.get("align") or n.get("daxregion", {}).get("align", 0),
        f"/dev/{dev}" if dev else "",
        enabled,
        any(d.get("mode") == "system-ram" for d in chars),
        all_mounts.get(block, ()),
    )


def _words(done: Completed) -> str:
    """What ndctl said: the lines that begin with `Error:`, which come before its last words."""
    text = (done.stderr + b"\n" + done.stdout).decode("utf-8", "replace")
    found = re.findall(r"^\s*Error: (.+)$", text, re.MULTILINE)
    return "; ".join(dict.fromkeys(f.strip() for f in found)) or done.last_words or f"status {done.status}"


def tree(view: View) -> list[str]:
    """The lines that show it to a person."""
    known = {d.name: d for d in view.dimms}
    lines = []
    for r in view.regions:
        lines.append(f"{r.name}  {' · '.join(_region_words(r))}")
        below = [[f"{n}  {_dimm_words(known[n])}"] if n in known else [n] for n in r.dimms]
        below += [_namespace_lines(n) for n in r.namespaces]
        for number, group in enumerate(below, 1):
            last = number == len(below)
            lines.append(("└─ " if last else "├─ ") + group[0])
            lines += [("   " if last else "│  ") + line for line in group[1:]]
    used = {n for r in view.regions for n in r.dimms}
    lines += [f"{d.name}  {_dimm_words(d)} · in no region" for d in view.dimms if d.name not in used]
    for g in view.goal:
        words = f"{human(g.memory)} RAM, {human(g.app_direct)} App Direct"
        lines.append(f"goal for {g.dimm}  {words} · {g.status or 'a reboot is required'}")
    return lines or ["There is no persistent memory."]


def _region_words(r: Region) -> list[str]:
    words = [human(r.size)]
    words.append(f"room for {human(r.largest())}" if r.labelled else "no labels: one namespace of all of it")
    words.append(r.provider)
    if r.numa_node is not None:
        words.append(f"node {r.numa_node}")
    if r.emulated:
        words.append("emulated, volatile")
    else:
        words.append(f"persistence domain {r.persistence_domain}")
    return words if r.enabled else [*words, "disabled"]


def _dimm_words(d: Dimm) -> str:
    words = [d.id] if d.id else []
    if d.optane is not None:
        o = d.optane
        words.append(f"Optane {o.id}, socket {o.socket}" if o.socket is not None else f"Optane {o.id}")
        words.append(human(o.capacity) if o.capacity is not None else "size unknown")
        words.append(o.health)
    return " · ".join(words if d.enabled else [*words, "disabled"])


def _namespace_lines(n: Namespace) -> list[str]:
    lines = [f"{n.name}  {n.mode}{f' (map {n.map})' if n.map else ''}, {human(n.size)}"]
    if n.system_ram:
        lines[0] += " · in use as RAM"
    if not n.enabled:
        lines[0] += " · disabled"
    if n.dev:
        lines.append(f"└─ {n.dev}")
    for m in n.mounts:
        lines.append(f"   └─ {m.dir}  {m.fs}{', DAX' if m.dax else ''}")
    return lines


def find(view: View, name: str) -> tuple[Region, Namespace]:
    """The namespace of that name, or of that device. Raises EmupmemError."""
    all_ = [(r, n) for r in view.regions for n in r.namespaces]
    for region, one in all_:
        if name == one.name or (one.dev and name in (one.dev, one.dev.rpartition("/")[2])):
            return region, one
    listed = ", ".join(n.name for _, n in all_)
    raise EmupmemError(
        f"there is no namespace {name}", f"there is {listed}" if listed else "there is none at all"
    )


# Who uses it --------------------------------------------------------------------------------------


def refuse_if_used(machine: Machine, one: Namespace) -> None:
    """Raises EmupmemError where its device is mounted, claimed, swapped to, open as a dax device or used as RAM."""
    dev, name = one.dev, one.dev.rpartition("/")[2]
    if one.system_ram:
        raise EmupmemError(
            f"{one.name} is in use as RAM ({dev})", f"daxctl reconfigure-device --mode=devdax {name} first"
        )
    if not dev:
        return
    number = machine.peek(f"/sys/class/block/{name}/dev")
    if one.mounts:
        who = processes.processes_using(machine, number)
        used = f", in use by {', '.join(who[:5])}" if who else ""
        raise EmupmemError(
            f"{dev} is mounted on {one.mounts[0].dir}{used}", f"sudo emupmem umount {one.mounts[0].dir} first"
        )
    held = machine.names(f"/sys/class/block/{name}/holders")
    if held:
        raise EmupmemError(f"{dev} is a part of {', '.join(held)}", "take it out of there first")
    if re.search(rf"^{re.escape(dev)}\s", machine.peek("/proc/swaps"), re.MULTILINE):
        raise EmupmemError(f"{dev} is swap space", f"sudo swapoff {dev} first")
    if one.mode == "devdax":
        for pid in machine.names("/proc"):
            here = f"/proc/{pid}/fd"
            if pid.isdigit() and any(machine.real(f"{here}/{n}") == dev for n in machine.names(here)):
                who_ = machine.peek(f"/proc/{pid}/comm")
                raise EmupmemError(f"{dev} is in use by {who_} (process {pid})", "end that program first")
    namespaces.refuse_if_used(machine, (name,))


# Create -------------------------------------------------------------------------------------------


def check_options(mode: str, map_: str, align: str) -> int:
    """The alignment in bytes (0 where none is asked). Raises EmupmemError for options that exclude each other."""
    if mode not in MODES:
        raise EmupmemError(f"there is no mode {mode}", f"there are {', '.join(MODES)}")
    for option, value in (("--map", map_), ("--align", align)):
        if value and mode not in MAPPED:
            raise EmupmemError(f"{option} belongs to fsdax and devdax", f"{mode} has no page map")
    if map_ not in ("", "mem", "dev"):
        raise EmupmemError(
            f"--map {map_} is not known", "the page map lies in RAM (mem) or on the device (dev)"
        )
    if align and not parse_size(align, "alignment"):
        raise EmupmemError("an alignment of 0 is none", "leave --align out")
    return parse_size(align, "alignment") if align else 0


def plan_create(
    machine: Machine,
    view: View,
    region: str = "",
    size: int | None = None,
    mode: str = "fsdax",
    map_: str = "",
    align: int = 0,
) -> Plan:
    """What makes a namespace, in the named region or the first with room. Raises EmupmemError for each refusal."""
    there = _choose(view, region, size, mode, align)
    if (why := _obstacle(there, mode, align)) is not None:
        raise why
    options = (*(("-M", map_) if map_ else ()), *(("-a", str(align)) if align else ()))
    if not there.labelled:
        return _plan_whole(machine, view, there, size, mode, options)
    size = _fitting(there, size, mode, align)
    argv = ("ndctl", "create-namespace", "-r", there.name, "-m", mode, "-s", str(size), *options)
    return Plan((Command(argv, f"make a {mode} namespace of {human(size)}"),), there.name)


def _choose(view: View, name: str, size: int | None, mode: str, align: int) -> Region:
    """The named region; else the first with labels and room, real ones before emulated ones."""
    if name:
        for one in view.regions:
            if one.name == name:
                return one
        listed = ", ".join(r.name for r in view.regions)
        raise EmupmemError(f"there is no region {name}", f"there is {listed}" if listed else _NO_REGION)
    if not view.regions:
        raise EmupmemError("there is no region", _NO_REGION)
    usable = [r for r in view.regions if r.enabled and r.labelled]
    usable.sort(key=lambda r: (r.emulated, _order(r)))
    able = [r for r in usable if _obstacle(r, mode, align) is None]
    if usable and not able:
        return usable[0]
    for one in able:
        if one.largest(align) >= (size or LEAST):
            return one
    if usable:
        most = max(able, key=lambda r: r.largest(align))
        wanted = human(size) if size else "a namespace"
        raise EmupmemError(
            f"no region has room for {wanted} in one piece",
            f"the most is {human(most.largest(align))} in {most.name}"
            if most.largest(align)
            else "all are full",
        )
    first = view.regions[0]
    raise EmupmemError(
        "no region has labels: each is one namespace of all of it",
        f"--region {first.name} gives that namespace another mode; sudo emupmem nvdimm show tells what is there",
    )


_NO_REGION = "on Optane modules: sudo emupmem nvdimm goal --mode appdirect; else there is no NVDIMM"


def _obstacle(there: Region, mode: str, align: int) -> EmupmemError | None:
    """Why a region cannot have such a namespace, whatever its size."""
    if not there.enabled:
        return EmupmemError(f"{there.name} is disabled", f"sudo ndctl enable-region {there.name}")
    if align and align not in there.alignments:
        can = ", ".join(tight(a) for a in there.alignments)
        return EmupmemError(f"{there.name} cannot align to {human(align)}", f"it can {can}")
    if mode in MAPPED and there.start is not None and there.start % START:
        return EmupmemError(
            f"{there.name} starts at {there.start:#x}, which is no multiple of {human(START)}: no {mode} there",
            "it can be raw or sector",
        )
    return None


def _fitting(there: Region, size: int | None, mode: str, align: int) -> int:
    """The size in bytes, all that is free where none is asked. Raises EmupmemError where it does not fit."""
    step, most = there.step(align), there.largest(align)
    least = max(LEAST, align * 2 if align > START else 0)
    if size is None:
        size = most
        if not size:
            full = (
                f"{there.name} is full"
                if not there.free
                else f"{there.name} has only {human(there.free)} left"
            )
            raise EmupmemError(full, "sudo emupmem nvdimm show tells what is on it")
    elif size > there.free or size > most:
        raise EmupmemError(
            f"{there.name} has no room for {human(size)} in one piece",
            f"the largest that fits is {tight(most)}",
        )
    elif size <= 0 or size % step:
        up = min(-(-size // step) * step or step, most)
        raise EmupmemError(
            f"{tight(size)} is no multiple of {human(step)}, in which {there.name} is divided",
            f"--size {tight(up)} is the next",
        )
    if mode != "raw" and size < least:
        raise EmupmemError(f"{mode} needs at least {human(least)}", f"--size {tight(least)}")
    return size


def _plan_whole(
    machine: Machine, view: View, there: Region, size: int | None, mode: str, options: tuple[str, ...]
) -> Plan:
    """Give the one namespace of a region without labels another mode: its content is lost."""
    if not there.namespaces:
        raise EmupmemError(f"{there.name} has no labels and no namespace", "sudo dmesg may tell why")
    if size is not None:
        raise EmupmemError(
            f"{there.name} has no labels: its one namespace always has its whole size", _divide(view, there)
        )
    one = there.namespaces[0]
    if not one.enabled:
        raise EmupmemError(
            f"{one.name} is disabled, so that nobody can see what it holds",
            f"sudo ndctl enable-namespace {one.name}",
        )
    if there.align and there.size % there.align:
        raise EmupmemError(
            f"{there.name} has {there.size} bytes, no multiple of {human(there.align)}: ndctl cannot change its mode",
            _divide(view, there),
        )
    refuse_if_used(machine, one)
    if one.dev and one.mode != "devdax":
        holds = signature(machine, one.dev)
        if holds:
            raise EmupmemError(
                f"{one.dev} holds {holds}, which another mode would destroy",
                f"sudo wipefs -a {one.dev} if nothing of it is needed",
            )
    argv = ("ndctl", "create-namespace", "-f", "-e", one.name, "-m", mode, *options)
    question = f"All content of {one.name} ({one.mode}, {human(one.size)}) is lost. Make it {mode}?"
    return Plan((Command(argv, f"make it a {mode} namespace"),), there.name, question, one)


def _divide(view: View, there: Region) -> str:
    """How a region without labels, which has its one namespace, can be divided, for a hint."""
    if there.emulated:
        return "leave --size out; sudo emupmem namespaces divides the reserved range on Linux 6.19 and later"
    if not _can_label(view, there):
        return "leave --size out; its modules have no room for labels"
    return f"sudo emupmem nvdimm destroy {there.namespaces[0].name} writes labels: then --size works"


def _can_label(view: View, there: Region) -> bool:
    """Whether labels can be written for a region without touching another one."""
    known = {d.name: d for d in view.dimms}
    alone = all(not set(r.dimms) & set(there.dimms) for r in view.regions if r.name != there.name)
    return bool(there.dimms) and alone and all(n in known and known[n].label_area for n in there.dimms)


def create(machine: Machine, plan: Plan) -> Namespace:
    """Carry it out; the namespace that came of it, its device there. Raises EmupmemError."""
    before = {n.name for r in look(machine).regions for n in r.namespaces}
    out = _run(machine, plan.commands)
    try:
        made = json.loads(out)["dev"]
    except (ValueError, KeyError, TypeError):
        made = ""
    machine.settle()
    there = [n for r in look(machine).regions if r.name == plan.region for n in r.namespaces]
    new = next((n for n in there if n.name == made or (not made and n.name not in before)), None)
    if new is None:
        raise EmupmemError("ndctl made no namespace", "sudo dmesg may tell why")
    if not new.dev or not wait_for(lambda: machine.exists(new.dev), 10):
        raise EmupmemError(f"{new.name} was made, but has no device", "sudo dmesg may tell why")
    return new


def remains(machine: Machine, one: Namespace) -> str:
    """What a new device still holds of one that was there before (`ext4`); empty where it is blank."""
    if not one.dev or one.mode == "devdax":
        return ""
    try:
        return signature(machine, one.dev)
    except EmupmemError:
        return ""


def made_lines(one: Namespace, holds: str) -> list[str]:
    """What to tell of a namespace that was made, and of what it still holds."""
    lines = [f"✓ {one.name} · {one.mode}, {human(one.size)}, {one.dev}"]
    if holds:
        lines.append(f"It still holds {holds} of before: sudo wipefs -a {one.dev} if nothing of it is needed")
    if one.mode == "fsdax":
        lines.append(f"Next:  sudo emupmem mount {one.dev}")
    return lines


def _run(machine: Machine, commands: Sequence[Command]) -> str:
    """Run them in order; what the last one printed. Raises EmupmemError at the first that fails."""
    out = ""
    for command in commands:
        done = machine.run(command, timeout=SECONDS)
        if done.status:
            raise EmupmemError(
                f"{shlex.join(command.argv)} failed: {_words(done)}", "sudo dmesg may tell more"
            )
        out = done.stdout.decode("utf-8", "replace")
    return out


# Destroy ------------------------------------------------------------------------------------------


def plan_destroy(machine: Machine, view: View, name: str) -> Plan:
    """What destroys a namespace and all on it. Raises EmupmemError where it must or can not be."""
    region, one = find(view, name)
    refuse_if_used(machine, one)
    device = f" ({one.dev})" if one.dev else ""
    question = f"All content of {one.name}{device}, {human(one.size)}, is lost. Destroy it?"
    if region.labelled:
        argv = ("ndctl", "destroy-namespace", "-f", one.name)
        return Plan((Command(argv, "destroy it"),), region.name, question, one)
    if region.emulated:
        raise EmupmemError(
            f"{one.name} is all of {region.name}, which memmap= made and which has no labels: it cannot be destroyed",
            "sudo emupmem remove gives the RAM back; sudo emupmem namespaces divides it (Linux 6.19 and later)",
        )
    if not _can_label(view, region):
        raise EmupmemError(
            f"{one.name} is all of {region.name}, which has no labels and no room for them: it cannot be destroyed",
            f"sudo emupmem nvdimm create --region {region.name} --mode … gives it another mode",
        )
    # ndctl destroy-namespace would only turn it off. Labels make the region one that can be divided.
    commands = (
        Command(("ndctl", "disable-region", region.name), "stop using the region"),
        Command(("ndctl", "init-labels", *region.dimms), "write empty labels on its modules"),
        Command(("ndctl", "enable-region", region.name), "use it again, with labels"),
    )
    return Plan(commands, region.name, question, one)


def destroy(machine: Machine, plan: Plan) -> Namespace:
    """Carry it out; the namespace that is gone. Raises EmupmemError where it is still there."""
    assert plan.takes is not None
    try:
        _run(machine, plan.commands)
    except EmupmemError:
        if plan.commands[-1].argv[1] == "enable-region":
            machine.output(*plan.commands[-1].argv, timeout=SECONDS)
        raise
    machine.settle()
    if any(n.name == plan.takes.name for r in look(machine).regions for n in r.namespaces):
        raise EmupmemError(f"ndctl did not destroy {plan.takes.name}", "sudo dmesg may tell why")
    return plan.takes


# The goal of Optane modules ---------------------------------------------------------------------------


T = TypeVar("T")


def _ask_ipmctl(
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
        text = _ipmctl(machine, command)
    except EmupmemError:
        command = build(socket, False)
        text = _ipmctl(machine, command)
    found = parse(text)
    if not found and not ipmctl.empty(text):
        raise EmupmemError(f"{shlex.join(command.argv)} answered in a form that emupmem does not know")
    return found


def _ipmctl(machine: Machine, command: Command) -> str:
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


def plan_goal(machine: Machine, wanted: ipmctl.Wanted) -> GoalPlan:
    """Where the modules are on the way to what is wanted. Raises EmupmemError for each refusal."""
    if machine.find("ipmctl") is None:
        raise EmupmemError(
            "ipmctl is not installed: it sets the goal of Optane modules",
            "install it from your distribution; other NVDIMMs need no goal: sudo emupmem nvdimm create",
        )
    require_ndctl(machine)
    said = machine.output("ipmctl", "version")
    if said and ipmctl.is_broken(said.stdout.decode("utf-8", "replace")):
        number = ".".join(map(str, ipmctl.version(said.stdout.decode("utf-8", "replace"))))
        raise EmupmemError(f"ipmctl {number} writes goals that no firmware takes", "install a later one")
    dimms = _ask_ipmctl(machine, ipmctl.show_dimms, ipmctl.dimms, wanted.socket)
    where = "" if wanted.socket is None else f" on socket {wanted.socket}"
    if not dimms:
        raise EmupmemError(
            f"ipmctl finds no Optane modules{where}",
            "other NVDIMMs and virtual ones need no goal: sudo emupmem nvdimm create",
        )
    if not any(d.works for d in dimms):
        states = ", ".join(f"{d.id} is {d.health}" for d in dimms)
        raise EmupmemError(f"no module{where} is in order: {states}", "sudo ipmctl show -a -dimm tells more")
    sets = _ask_ipmctl(machine, ipmctl.show_regions, ipmctl.sets, wanted.socket)
    goal = _ask_ipmctl(machine, ipmctl.show_goal, ipmctl.goals, wanted.socket)
    view = look(machine)
    regions = _destroyed(view, dimms, sets)
    command = ipmctl.create_goal(wanted)
    warnings = tuple(
        f"{d.id} is {d.lock}: the firmware applies no goal to a secured module"
        for d in dimms
        if d.lock.lower() in ("locked", "unlocked", "unlocked, frozen", "exceeded")
    )
    if goal:
        return GoalPlan("pending", wanted, command, dimms, (), _judged(goal, wanted), warnings)
    if ipmctl.is_as_asked(dimms, sets, wanted):
        makes = _first_namespaces(machine, view, regions, dimms)
        return GoalPlan("regions" if makes else "done", wanted, command, dimms, regions, (), warnings, makes)
    _refuse_namespaces(regions)
    return GoalPlan("needed", wanted, command, dimms, regions, (), warnings)


def _first_namespaces(
    machine: Machine, view: View, regions: Sequence[Region], dimms: Sequence[ipmctl.Dimm]
) -> tuple[Plan, ...]:
    """One fsdax namespace of all the room for each region of these modules alone that has none yet."""
    handles = {d.handle for d in dimms if d.handle is not None}
    mine = {d.name for d in view.dimms if d.handle in handles}
    empty = [r for r in regions if r.dimms and set(r.dimms) <= mine and not r.namespaces]
    able = [r for r in empty if r.labelled and r.largest() >= LEAST and _obstacle(r, "fsdax", 0) is None]
    return tuple(plan_create(machine, view, r.name) for r in able)


def _judged(goal: tuple[ipmctl.Goal, ...], wanted: ipmctl.Wanted) -> tuple[ipmctl.Goal, ...]:
    """The goal that waits. Raises EmupmemError where it failed or is another than the wanted one."""
    drop = "sudo ipmctl delete -goal drops it"
    failed = next((g for g in goal if g.failed), None)
    if failed is not None:
        raise EmupmemError(f"the firmware did not take the goal of {failed.dimm}: {failed.status}", drop)
    if not ipmctl.goal_matches(goal, wanted):
        memory, direct = sum(g.memory for g in goal), sum(g.app_direct for g in goal)
        raise EmupmemError(
            f"another goal waits for a reboot: {human(memory)} RAM, {human(direct)} App Direct", drop
        )
    return goal


def _destroyed(
    view: View,
    dimms: Sequence[ipmctl.Dimm],
    sets: Sequence[ipmctl.InterleaveSet],
) -> tuple[Region, ...]:
    """The regions that a goal for these modules would lay out anew. In doubt a region is one of them."""
    handles = {d.handle for d in dimms if d.handle is not None}
    mine = {d.name for d in view.dimms if d.handle in handles}
    others = {d.name for d in view.dimms if d.handle is not None} - mine
    isets = {_iset(s.iset) for s in sets if s.iset is not None}
    return tuple(
        r
        for r in view.regions
        if not r.emulated
        and (bool(mine & set(r.dimms)) or r.iset in isets or not r.dimms or not set(r.dimms) <= others)
    )


def _refuse_namespaces(regions: Sequence[Region]) -> None:
    there = [n for r in regions for n in r.namespaces]
    if there:
        names = ", ".join(f"{n.name}{f' ({n.dev})' if n.dev else ''}" for n in there)
        commands = "; ".join(f"sudo emupmem nvdimm destroy {n.name}" for n in there)
        raise EmupmemError(
            f"the goal would destroy {names}, and emupmem deletes only what is named", commands
        )


def set_goal(machine: Machine, plan: GoalPlan) -> GoalPlan:
    """Tell the firmware and look whether the goal is there: the plan is pending then. Raises EmupmemError."""
    if plan.state != "needed":  # another hand was faster
        return plan
    text = _ipmctl(machine, plan.command)
    waiting = _ask_ipmctl(machine, ipmctl.show_goal, ipmctl.goals, plan.wanted.socket)
    if not waiting:
        raise EmupmemError("ipmctl reports no goal after setting one", "sudo ipmctl show -goal")
    return replace(plan, state="pending", goal=waiting, warnings=(*plan.warnings, *ipmctl.warnings(text)))


def make_namespaces(machine: Machine, plan: GoalPlan) -> tuple[Namespace, ...]:
    """Make what the regions lack. Where it fails half way, the same command makes the rest. Raises EmupmemError."""
    return tuple(create(machine, one) for one in plan.makes)


def goal_lines(plan: GoalPlan) -> list[str]:
    """What to tell of where the modules are on their way."""
    if plan.state == "needed":
        return ["Nothing was changed."]
    if plan.state == "pending":
        lines = [
            f"  {g.dimm}: {human(g.memory)} RAM, {human(g.app_direct)} App Direct · {g.status or 'New'}"
            for g in plan.goal
        ]
        return ["✓ the goal is set; a reboot is required", *lines, "Next:  reboot, then this command again"]
    if plan.wanted.memory_percent == 100:
        return ["✓ the modules are RAM, as asked"]
    names = ", ".join(f"{r.name} ({human(r.size)})" for r in plan.regions)
    asked = f"✓ the modules are as asked: {names or 'regions are there'}"
    there = [
        f"  {n.name}{f' ({n.dev})' if n.dev else ''}, {n.mode}" for r in plan.regions for n in r.namespaces
    ]
    return [asked, *there] if plan.state == "done" and there else [asked, "Next:  sudo emupmem nvdimm create"]
