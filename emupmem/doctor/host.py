# SPDX-License-Identifier: Apache-2.0
"""Findings about the machine itself: rights, memory, real modules."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from emupmem.boot.grub.environment import GENERATORS
from emupmem.doctor.finding import Eye, Finding
from emupmem.model import LOW_LIMIT, EmupmemError, Kind
from emupmem.planner import survey
from emupmem.planner.nodes import nodes_with_ram
from emupmem.planner.places import crashkernel_bytes
from emupmem.planner.situation import page_structs
from emupmem.system.host import Host
from emupmem.units import human

LOCKDOWN = "/sys/kernel/security/lockdown"

NEEDED = {"mkfs.ext4": "e2fsprogs", "blkid": "util-linux", "wipefs": "util-linux", "systemctl": "systemd"}
"""Programs that `mount` and `apply --mount` run, and the package that holds each."""

WANTED = {
    "mkfs.xfs": "xfsprogs",
    "kexec": "kexec-tools",
    "ndctl": "ndctl",
    "qemu-system-x86_64": "qemu-system-x86",
    "ipmctl": "ipmctl",
}
"""Programs that some commands or people use."""

TOOLS = (*GENERATORS, "grub-editenv", "grub2-editenv", *NEEDED, *WANTED)


def rights(is_root: bool) -> Finding | None:
    """Said only where something may stay unseen."""
    if is_root:
        return None
    return Finding("rights", "note", "not root: some things cannot be seen", "sudo emupmem doctor sees all")


def look_at_host(machine: Host) -> Finding:
    done = machine.output("systemd-detect-virt", "--vm")
    kind = done.stdout.decode("utf-8", "replace").strip() if done is not None else ""
    return host(kind or machine.peek("/sys/hypervisor/type"), done is not None)


def host(hypervisor: str, told: bool) -> Finding:
    """A virtual machine is as good as metal; only its memory ends with it."""
    if hypervisor and hypervisor != "none":
        return Finding(
            "host",
            "note",
            f"a virtual machine ({hypervisor}): the content of its memory ends with it, not with a reboot of it",
            "for memory that outlives it: a vNVDIMM (emupmem qemu)",
        )
    if not told:
        return Finding(
            "host", "ok", "no container, WSL or Xen; cannot determine whether it is a virtual machine"
        )
    return Finding("host", "ok", "metal: no container, no hypervisor")


def look_at_memory_map(eye: Eye) -> Finding:
    if eye.found is None:
        problem = eye.map_problem or EmupmemError("no memory map")
        return Finding("memory-map", "stop", problem.message, problem.hint)
    return memory_map(eye.found)


def memory_map(found: survey.Survey) -> Finding:
    """The firmware's map, where it was read, what contradicts it."""
    ram = found.situation.firmware.ram
    high = sum(max(0, s.end - max(s.start, LOW_LIMIT)) for s in ram)
    seen = f"{human(sum(s.size for s in ram))} of RAM, {human(high)} at or above 4 GiB, from {found.source}"
    if found.notes:
        return Finding("memory-map", "note", f"{seen}; {'; '.join(found.notes)}")
    return Finding("memory-map", "ok", seen)


def look_at_numa(eye: Eye) -> Finding | None:
    return numa(nodes_with_ram(eye.found.situation)) if eye.found is not None else None


def numa(nodes: Sequence[int]) -> Finding | None:
    """Said only where several have memory: a device lies on one of them."""
    if len(nodes) < 2:
        return None
    listed = ", ".join(map(str, nodes))
    return Finding(
        "numa", "note", f"memory on nodes {listed}: a device is on one of them", "apply --numa-node N"
    )


def has_type_7(eye: Eye) -> bool:
    return eye.found is not None and any(e.kind is Kind.PMEM for e in eye.found.situation.firmware.entries)


def look_at_real_pmem(eye: Eye) -> Finding | None:
    return real_pmem(has_type_7(eye))


def real_pmem(there: bool) -> Finding | None:
    """Real persistent memory takes the first device numbers."""
    if not there:
        return None
    return Finding(
        "real-pmem",
        "note",
        "there is real persistent memory (type 7): the emulated devices need not begin at /dev/pmem0",
        "emupmem verify shows which is which",
    )


def lockdown(text: str) -> Finding | None:
    """`none [integrity] confidentiality`; the chosen one is in brackets. No reason for it covers memmap=."""
    chosen = re.search(r"\[(\w+)\]", text)
    if chosen is None or chosen[1] == "none":
        return None
    return Finding("lockdown", "ok", f"{chosen[1]}: memmap= is not restricted by it, hibernation is")


def tools(found: Mapping[str, bool], real_pmem: bool) -> Finding:
    """Programs of other commands: needed by mount, or good to have."""
    lacks = [t for t in NEEDED if not found.get(t)]
    could = [t for t in WANTED if not found.get(t) and (t != "ipmctl" or real_pmem)]
    has = [t for t, there in found.items() if there]
    seen = f"has {', '.join(has)}" if has else "has none"
    packages = {**NEEDED, **WANTED}
    missing = ", ".join(f"{t} ({packages[t]})" for t in (*lacks, *could))
    if lacks:
        return Finding(
            "tools", "warn", f"{seen}; missing: {missing}", f"emupmem mount needs {', '.join(lacks)}"
        )
    if could:
        return Finding("tools", "note", f"{seen}; missing, optional: {missing}")
    return Finding("tools", "ok", seen)


def look_at_hibernation(eye: Eye) -> Finding | None:
    state = eye.machine.peek("/sys/power/state").split()
    if not state:
        return None
    disk = eye.machine.peek("/sys/power/disk")
    rows = [line.split() for line in eye.machine.peek("/proc/swaps").splitlines()[1:]]
    swap = sum(int(r[2]) for r in rows if len(r) > 2 and r[2].isdecimal() and "zram" not in r[0]) * 1024
    total = re.search(r"^MemTotal:\s+(\d+) kB", eye.machine.peek("/proc/meminfo"), re.MULTILINE)
    ram = int(total[1]) * 1024 if total is not None else 0
    resume = next((w for w in eye.line.words if w.startswith("resume=")), "")
    can = "disk" in state and "[disabled]" not in disk
    return hibernation(can, resume, swap, ram, bool(eye.booted.reservations or eye.line.reservations))


def hibernation(can: bool, resume: str, swap: int, ram: int, reserved: bool) -> Finding:
    """memmap= does not hinder it, but what a device holds is not in the image.

    The kernel's image has 2/5 of the RAM at most unless told otherwise (kernel/power/snapshot.c).
    """
    if not can:
        return Finding("hibernation", "ok", "this kernel does not hibernate")
    if not resume and (not ram or swap < ram * 2 // 5):
        return Finding("hibernation", "ok", f"not set up: no resume=, {human(swap)} of swap")
    seen = f"{resume or 'no resume='}, {human(swap)} of swap: the content of a device is not in the image"
    return Finding(
        "hibernation", "warn" if reserved else "note", seen, "umount the device before you hibernate"
    )


KDUMP_SETTINGS = "/etc/sysconfig/kdump"
KDUMP_TOOLS = "/etc/default/kdump-tools"
KDUMP_TOOLS_APPENDS = "reset_devices systemd.unit=kdump-tools-dump.service nr_cpus=1 irqpoll usbcore.nousb"
"""What kdump-config (kdump-tools 1.8 to 1.10) puts after the words where KDUMP_CMDLINE_APPEND is empty or not set."""
_BLOCKED = "module_blacklist="
_DRIVER = "nd_e820"


def look_at_kdump(eye: Eye) -> Finding | None:
    """Fedora's, RHEL's and Debian's kdump: its kernel gets the words of the running one, but for some, and its map.

    Said only where memory is set aside for that kernel.
    """
    booted = eye.booted
    kernels = eye.line.crashkernel or booted.crashkernel
    tools, settings = eye.machine.peek(KDUMP_TOOLS), eye.machine.peek(KDUMP_SETTINGS)
    if not kernels or not (tools or settings):
        return None
    reserved = eye.line.reservations or booted.reservations
    if reserved and all(i.soft for i in reserved):
        return Finding(
            "kdump", "ok", "soft reserved memory is nothing to a crash kernel: it has no RAM there"
        )
    ram = eye.found.situation.firmware.ram_bytes if eye.found is not None else 0
    room = sum(crashkernel_bytes(value, ram)[0] for value in kernels)
    need = page_structs(sum(i.size for i in reserved if not i.soft))
    return kdump_tools(tools, booted.words, need, room) if tools else kdump(settings, need, room)


def _inherited(need: int, room: int, why: str, fix: str) -> Finding:
    """A crash kernel that makes the devices too: of its memory, `room` bytes, `need` go to their page structs."""
    seen = f"the crash kernel makes a device of the reserved memory as well: {why}"
    if need and room:
        seen += f"; that takes {human(need)} of the {human(room)} that are set aside for it"
    return Finding("kdump", "warn" if room and need * 4 >= room else "note", seen, fix)


def kdump(settings: str, need: int, room: int) -> Finding | None:
    """What KDUMP_COMMANDLINE_REMOVE names is taken off the words; KDUMP_COMMANDLINE is all of them.

    kdumpctl loads by kexec_file_load, where the kernel hands on a map without the reserved ranges.
    """
    found = dict(re.findall(r'^(KDUMP_COMMANDLINE\w*)=["\']?([^"\'\n]*)', settings, re.MULTILINE))
    if found.get("KDUMP_COMMANDLINE"):
        return None
    removed = found.get("KDUMP_COMMANDLINE_REMOVE", "").split()
    if "memmap" in removed:
        return Finding("kdump", "ok", "the crash kernel does not get memmap=")
    wanted = " ".join([*removed, "memmap"])
    return _inherited(
        need,
        room,
        f"{KDUMP_SETTINGS} does not take memmap= off its words",
        f'there KDUMP_COMMANDLINE_REMOVE="{wanted}", then sudo kdumpctl restart',
    )


def kdump_tools(settings: str, booted: Sequence[str], need: int, room: int) -> Finding:
    """Debian's: without memmap= as well, kexec (until 2.0.25 at least) hands on the range by kexec_load's map.

    What helps against both is that its driver is not loaded there.
    """
    line = kdump_tools_line(settings, booted)
    if not line:
        return Finding("kdump", "ok", f"the crash kernel does not load {_DRIVER}, and makes no device")
    return _inherited(
        need,
        room,
        f"{KDUMP_TOOLS} does not keep {_DRIVER} from it",
        f"there {line}, then sudo kdump-config reload",
    )


def kdump_tools_line(settings: str, booted: Sequence[str] = ()) -> str:
    """The line for the end of Debian's settings that keeps the driver from the crash kernel; "" if one does already.

    `booted` are the words of the running kernel.
    """
    found = dict(re.findall(r"^[ \t]*(KDUMP_CMDLINE\w*)=(.*)", settings, re.MULTILINE))
    words = found.get("KDUMP_CMDLINE_APPEND", "").strip("\"' \t").split() or KDUMP_TOOLS_APPENDS.split()
    if _DRIVER in _blocked(words):
        return ""
    blocked = ",".join([*(_blocked(words) or _blocked(booted)), _DRIVER])
    words = [w for w in words if not w.startswith(_BLOCKED)]
    return f'KDUMP_CMDLINE_APPEND="{" ".join(words)} {_BLOCKED}{blocked}"'


def _blocked(words: Sequence[str]) -> list[str]:
    """The modules that the kernel does not load: it takes the last word of them."""
    values = [w.removeprefix(_BLOCKED) for w in words if w.startswith(_BLOCKED)]
    return values[-1].split(",") if values else []
