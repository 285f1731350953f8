# SPDX-License-Identifier: Apache-2.0
"""Looks at a machine through `Host` and makes the values that the pure stages work on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from emupmem.kernel.cmdline import U64, parse_command_line
from emupmem.model import (
    BootLog,
    CommandLine,
    EmupmemError,
    FirmwareMap,
    IomemLine,
    KernelRelease,
    Kind,
    Loss,
    MapEntry,
    Span,
)
from emupmem.parser.bootlog import Source, kernel_release, parse_boot_log
from emupmem.parser.sources import parse_iomem, parse_sysfs_memmap
from emupmem.planner.kernels import BEFORE_3_5, KERNEL_NEEDED, kernel_problem
from emupmem.planner.places import disagreements, high_losses, memory_limits, subtract, union_of
from emupmem.planner.situation import Situation
from emupmem.record import record
from emupmem.system.host import Host
from emupmem.system.sysfs import read_block_size, read_node_distances
from emupmem.units import span_text

# editor (augeas, sh) and verifier are imported where they are needed: suggest --from needs neither.

SYSFS = "/sys/firmware/memmap"
_MOST_NOTES = 8

WSL = re.compile(r"microsoft.*wsl|wsl2", re.IGNORECASE)
"""What the version of a kernel that Windows starts looks like."""
ELSEWHERE = "to try persistent memory there, give a virtual machine a vNVDIMM instead"


@record
class Survey:
    """A situation to plan in, where its map came from, and what a person should know of that.

    `plan_refused` is why a plan for this system would be worth nothing, as far as its log shows; `apply_refused`
    is why apply does not change that machine, as far as that was asked, and `loader` what starts it; `reserved` are
    the reservations that the next boot has anyway: a plan takes their place. `whole_machine` is False where there was
    only a log.
    """

    situation: Situation
    source: str
    notes: tuple[str, ...] = ()
    plan_refused: EmupmemError | None = None
    apply_refused: EmupmemError | None = None
    loader: str = ""
    reserved: tuple[str, ...] = ()
    whole_machine: bool = True


class NoMap(EmupmemError):
    """No source gives a firmware map that can be trusted."""


def of_log(source: Source, name: str) -> Survey:
    """What a log alone tells, nothing of the machine that we run on. Raises NoMap."""
    log = parse_boot_log(source, name)
    if log.firmware is None:
        problem = log.problem or EmupmemError(f"{name}: no firmware map in it")
        raise NoMap(problem.message, problem.hint)
    _refuse_unplaced(log)
    line = without_reservations(log.command_line) if log.command_line else None
    release = kernel_release(log.linux_version) if log.linux_version else None
    if release is None and log.old_words:
        release = BEFORE_3_5
    vetoes = (("the kernel's modified map", _ram(log.modified)),) if log.modified else ()
    situation = Situation(
        log.firmware,
        vetoes,
        log.nodes,
        line,
        log.efi,
        release,
        losses=_losses(log, log.command_line if log.line_known else None),
    )
    notes = (*log.warnings, *_veto_notes(situation))
    return Survey(
        situation, name, notes, refusal(log), reserved=_reserved(log.command_line), whole_machine=False
    )


def of_machine(machine: Host, source: str = "auto", boots: CommandLine | None = None) -> Survey:
    """What the running machine tells, from the first source that can be trusted.

    Every other readable source has a veto: a place must be RAM for all of them. `boots` are the
    words that the next boot will have beside ours; without it those of this boot.
    Raises NoMap where no source can be trusted, EmupmemError where the named one cannot be read.
    """
    logs = _logs(machine, source)
    broken: list[str] = []
    unseen: list[tuple[str, str]] = []
    maps: list[tuple[str, FirmwareMap]] = [(n, log.firmware) for n, log in logs if log.firmware is not None]
    if source in ("auto", "sysfs"):
        entries = machine.firmware_entries()
        try:
            if entries:
                maps.append((SYSFS, parse_sysfs_memmap(entries)))
        except EmupmemError as exc:
            broken.append(exc.message)
    if not maps:
        raise _no_map(source, logs)
    for _, log in logs:
        _refuse_unplaced(log)
    name, firmware = maps[0]
    vetoes = [(other, found.ram) for other, found in maps[1:]]
    vetoes += [(f"the kernel's modified map ({n})", _ram(log.modified)) for n, log in logs if log.modified]
    iomem = read_iomem(machine, unseen)
    booted = parse_command_line(machine.peek("/proc/cmdline"))
    if iomem:
        usable = [
            Span(x.start, x.end) for x in iomem if x.name in ("System RAM", "Persistent Memory (legacy)")
        ]
        # Since Linux 7 nothing in it tells that the range of a dax device is RAM.
        usable += [i.span for i in booted.soft]
        vetoes.append(("/proc/iomem", tuple(usable)))
    nodes = next((log.nodes for _, log in logs if log.nodes), ()) or machine.nodes()
    next_line = boots or booted
    line = without_reservations(next_line)
    banner = machine.peek("/proc/version")
    release = kernel_release(banner, machine.peek("/proc/version_signature")) if banner else None
    situation = Situation(
        firmware,
        tuple(vetoes),
        nodes,
        line,
        machine.exists("/sys/firmware/efi"),
        release,
        machine.huge_page_bytes(),
        tuple(loss for _, log in logs for loss in _losses(log, booted)),
        read_block_size(machine),
        read_node_distances(machine),
        _asked(booted),
    )
    notes = [*broken, *(why for _, why in unseen if machine.is_root)]
    notes += [
        f"{n}: {log.problem.message}" for n, log in logs if log.problem is not None and source == "auto"
    ]
    notes += [f"{n}: {warning}" for n, log in logs if log.firmware is not None for warning in log.warnings]
    notes += [BY_KEXEC] if started_by_kexec(machine) else []
    agreeing = [other for other, found in maps[1:] if found.ram == firmware.ram]
    shown = name + (f", agrees with {' and '.join(agreeing)}" if agreeing else "")
    refused = next((why for _, log in logs if (why := refusal(log)) is not None), None)
    refused = refused or _refusal_here(machine, booted)
    all_notes = (*notes, *_veto_notes(situation))
    return Survey(situation, shown, all_notes, refused, reserved=_reserved(next_line))


def _asked(booted: CommandLine) -> tuple[Span, ...]:
    """What words of this boot took out of the RAM."""
    limits = [Span(limit, 1 << 64) for limit in memory_limits(booted)[:1]]
    items = [Span(i.start, i.start + i.size) for i in booted.items if i.op in "$#" and i.size]
    return (*limits, *items, *booted.fake_mem)


def _logs(machine: Host, source: str) -> list[tuple[str, BootLog]]:
    """The boot logs that can be read and were asked for; the journal only where dmesg does not serve."""
    found: list[tuple[str, BootLog]] = []
    for name, argv in (
        ("dmesg", ("dmesg",)),
        ("journal", ("journalctl", "-k", "-b", "0", "-o", "cat", "--no-pager")),
    ):
        if source not in ("auto", name) or any(log.firmware is not None for _, log in found):
            continue
        done = machine.output(*argv)
        if done is not None and done.status == 0 and done.stdout:
            found.append((name, parse_boot_log(done.stdout, name)))
        elif source == name:
            why = done.last_words if done is not None else f"{argv[0]} is not installed"
            raise EmupmemError(f"{name} cannot be read: {why}", "run it with sudo, or leave --source away")
    return found


def _no_map(source: str, logs: Sequence[tuple[str, BootLog]]) -> NoMap:
    for name, log in logs:
        if log.problem is not None:
            return NoMap(f"{name}: {log.problem.message}", log.problem.hint)
    what = SYSFS if source == "sysfs" else "the firmware's memory map"
    return NoMap(f"{what} cannot be read here", "run it with sudo, or give a saved log: --from FILE")


def _ram(entries: Sequence[MapEntry] | None) -> tuple[Span, ...]:
    """RAM of a map, what is reserved already counted as RAM."""
    return tuple(e.span for e in entries or () if e.kind in (Kind.RAM, Kind.PRAM, Kind.SOFT_RESERVED))


def _reserved(line: CommandLine | None) -> tuple[str, ...]:
    return tuple(i.text for i in line.reservations) if line is not None else ()


def refusal(log: BootLog) -> EmupmemError | None:
    """Why a plan for the system of a log would be worth nothing, None where nothing in the log says so."""
    if WSL.search(log.linux_version):
        return EmupmemError("the log is of WSL: Windows starts its kernel, not GRUB", ELSEWHERE)
    if log.xen:
        return EmupmemError("the log is of a Xen dom0 or PV guest: its memory map is Xen's", ELSEWHERE)
    if log.confidential:
        return confidential_guest(f"the log is of a confidential guest ({log.confidential})")
    if log.command_line is not None and is_kdump(log.command_line):
        return EmupmemError(
            "the log is of a kdump kernel, which was given a small part of the memory to save the rest from",
            "give the log of an ordinary boot",
        )
    if log.i386:
        return EmupmemError("the log is of a 32-bit kernel, which has no /dev/pmem", KERNEL_NEEDED)
    return None


def confidential_guest(what: str) -> EmupmemError:
    """Why a guest whose host cannot read its memory is not planned for: `what` names it."""
    return EmupmemError(
        f"{what}: only memory that its kernel takes as RAM is accepted from the host, a device has none",
        ELSEWHERE,
    )


BY_KEXEC = (
    "this kernel was started by kexec: the map is the one that the kernel before it handed on, which may differ from "
    "what the firmware tells at the next start"
)


def started_by_kexec(machine: Host) -> bool:
    """Whether another kernel started this one: kexec's boot loader type is 0xD (Documentation/arch/x86/boot.rst).

    A log does not tell it.
    """
    kind = machine.peek("/proc/sys/kernel/bootloader_type")
    return kind.isascii() and kind.isdecimal() and int(kind[:9]) >> 4 == 0xD


def is_kdump(line: CommandLine) -> bool:
    """Whether this started a kernel that saves another one's memory (kernel/crash_dump.c)."""
    return any(w.startswith("elfcorehdr=") for w in line.words)


def _refusal_here(machine: Host, line: CommandLine) -> EmupmemError | None:
    """As `refusal`, of the running machine, where its log does not tell."""
    if re.search(r"^flags\s*:.*\btdx_guest\b", machine.peek("/proc/cpuinfo"), re.MULTILINE):
        return confidential_guest("this is a confidential guest (Intel TDX)")
    if machine.exists("/dev/sev-guest"):
        return confidential_guest("this is a confidential guest (AMD SEV-SNP)")
    if is_kdump(line):
        return EmupmemError("this is a kdump kernel", "start the machine as usual first")
    return None


def for_kernel(found: Survey, kernel: KernelRelease | None) -> Survey:
    """The survey for the kernel that will boot, that of the survey itself where it is None.

    Raises EmupmemError where a reservation would be worth nothing or do harm: see refusal and kernel_problem.
    """
    if kernel is not None:
        found = replace(found, situation=replace(found.situation, kernel=kernel))
    problem = found.plan_refused or kernel_problem(found.situation.kernel)
    if problem is not None:
        raise problem
    if found.situation.kernel is None:
        return replace(
            found, notes=(*found.notes, "the version of the kernel is not known here: " + KERNEL_NEEDED)
        )
    return found


def _losses(log: BootLog, line: CommandLine | None) -> tuple[Loss, ...]:
    """What the kernel of a log took of the RAM by itself.

    What its command line asked for, a limit or a `%` item, is the planner's to know, by the word. Where the line
    is not known as a whole (None), all that was taken counts, and what the map after it (`user:`) does not have.
    """
    if line is not None:
        asked = {(i.start, i.start + i.size) for i in line.items if i.op == "%"}
        limits = {*line.mem_limits, *(i.size for i in line.items if i.op == "limit")}
        asked |= {(limit, U64) for limit in limits}
        return tuple(x for x in log.losses if (x.start, x.end) not in asked)
    if log.user is None or log.firmware is None:
        return log.losses
    kept = union_of([*((s.start, s.end) for s in _ram(log.user)), *((x.start, x.end) for x in log.losses)])
    ram = ((s.start, s.end, 0, None) for s in log.firmware.ram)
    why = "the map after the command line (user:) does not have it as RAM"
    return (*log.losses, *(Loss(start, end, why) for start, end, _, _ in subtract(ram, kept)))


def _refuse_unplaced(log: BootLog) -> None:
    """Raise NoMap where RAM was lost and nothing says which: any place may be in it."""
    if log.unplaced:
        raise NoMap(
            f'the kernel lost RAM, and the log does not say which: "{log.unplaced}"',
            "give the whole log, not through grep or head: sudo dmesg > FILE, or journalctl -k -b -o cat > FILE",
        )


def _veto_notes(situation: Situation) -> list[str]:
    """Say what the kernel took of the RAM of the map, and what another source does not call RAM.

    Only at or above 4 GiB, and of other sources from 2 MiB on.
    """
    lost = [
        f"the kernel took {span_text(x.start, x.end)} away: {x.why}"
        for x in high_losses(situation)[:_MOST_NOTES]
    ]
    return lost + [
        f"{name} does not call {span_text(s.start, s.end)} RAM: nothing is planned there"
        for name, spans in disagreements(situation)
        for s in spans[:3]
    ]


def without_reservations(line: CommandLine, keep: Sequence[str] = ()) -> CommandLine:
    """The command line without its reservations, but for those in `keep`."""
    return replace(line, items=tuple(i for i in line.items if not i.reserves or i.text in keep))


# GRUB defaults ----------------------------------------------------------------------------------


GRUB_MKCONFIGS = tuple(
    f"{folder}/{name}"
    for folder in ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
    for name in ("grub-mkconfig", "grub2-mkconfig")
)


def read_iomem(machine: Host, unseen: list[tuple[str, str]]) -> tuple[IomemLine, ...] | None:
    try:
        lines = parse_iomem(machine.peek("/proc/iomem"))
    except EmupmemError as exc:
        unseen.append(("iomem", exc.message))
        return None
    if lines is None:
        unseen.append(("iomem", "/proc/iomem shows its addresses to root only"))
    return lines
