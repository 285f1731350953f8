# SPDX-License-Identifier: Apache-2.0
"""Findings about how the machine boots."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from emupmem.boot import detect
from emupmem.boot import efi as boot_efi
from emupmem.boot import entry as boot_entry
from emupmem.boot.grub import environment, trial
from emupmem.boot.grub import menu as grub_menu
from emupmem.boot.grub.checks import readable_menu
from emupmem.boot.grub.environment import GENERATORS, GRUB_DEFAULT
from emupmem.device import installed
from emupmem.device.blocks import mount_of
from emupmem.doctor.finding import Eye, Finding
from emupmem.editor.defaults import Effective
from emupmem.kernel.cmdline import half_written, is_cut, kaslr_avoided, mangled, memmap_region_count
from emupmem.model import MAX_MEMMAP_REGIONS, MIB, CommandLine, EmupmemError, Span
from emupmem.planner import survey
from emupmem.system.backups import BACKUPS
from emupmem.system.host import Host
from emupmem.units import human, tight

MENU_COPIES = 3
"""grub-mkconfig writes a second menu beside the first, and we keep a copy of the old one."""


# Boot loader and firmware --------------------------------------------------------------------------


def look_at_loader(machine: Host) -> str:
    return detect.of(machine).seen(machine, boot_efi.loader_name(machine))


def is_uki(machine: Host) -> bool:
    return machine.exists(boot_efi.STUB_INFO)


def firmware(efi: bool, secure: bool | None, uki: bool) -> Finding:
    """BIOS or UEFI, Secure Boot, a unified kernel image."""
    if not efi:
        return Finding("firmware", "ok", "BIOS")
    state = {True: "on", False: "off", None: "not told"}[secure]
    seen = f"UEFI, Secure Boot {state}"
    if uki:
        return Finding("firmware", "ok", f"{seen}; a unified kernel image started this kernel")
    return Finding("firmware", "ok", f"{seen}: memmap= is not restricted by it" if secure else seen)


# The command line ----------------------------------------------------------------------------------


def look_at_sources(eye: Eye) -> list[Finding]:
    """Where another loader's entries take their words from."""
    if eye.by_grub:
        return []
    try:
        standing = eye.loader.standing(eye.machine)
    except EmupmemError as exc:
        return [Finding("source", "note", exc.message, exc.hint)]
    line = standing.default.text if standing.default is not None else ""
    source = eye.loader.new_kernels_take(eye.machine, standing)
    return [Finding("source", "ok", f'"{line}" boots by default; new kernels take {source}')]


def look_at_variables(eye: Eye) -> list[Finding]:
    if not eye.by_grub:
        return []
    if eye.effective is None:
        problem = eye.defaults_problem
        if problem is None or not eye.machine.exists(GRUB_DEFAULT):
            return []  # there are none, and the loader's line says so
        return [Finding("defaults", "stop", problem.message, problem.hint)]
    return [variable(name, seen) for name, seen in eye.effective.items()]


def variable(name: str, seen: Effective) -> Finding:
    """What a GRUB variable is in the end, and the assignment that decides."""
    if not seen.filename:
        return Finding(name, "ok", "assigned nowhere")
    where = f"{seen.filename}:{seen.line}" if seen.line else seen.filename
    value = f'"{seen.value or ""}", last word in {where}'
    if seen.filename != GRUB_DEFAULT:
        return Finding(name, "note", f"{value}: it comes after {GRUB_DEFAULT}")
    return Finding(name, "ok", value)


def look_at_boots(eye: Eye) -> Finding | None:
    if not eye.by_grub:
        return None  # `source` says it
    machine, name = eye.machine, environment.grub_cfg(eye.machine)
    if eye.entry is None:
        seen = f"cannot determine which entry of {name} boots next"
        return Finding(
            "boots",
            "note",
            seen,
            "sudo emupmem doctor sees more" if not machine.is_root else "GRUB_DEFAULT=0",
        )
    values = [v.value or "" for v in (eye.effective or {}).values()]
    wanted = grub_menu.split_words(grub_menu.kernel_text(" ".join(values)))
    made = environment.generator(machine)
    return boots(
        eye.entry,
        name,
        wanted,
        environment.grubenv(machine).get(trial.NEXT, ""),
        made.argv[0] if made else "",
    )


def boots(
    entry: boot_entry.BootEntry, name: str, wanted: Sequence[str], once: str, generator: str
) -> Finding:
    """What GRUB will really start, and whether the menu says what its defaults ask for (`wanted`, in order)."""
    seen = f"“{entry.title}” ({name}:{entry.line}): {entry.text}"
    if once:
        return Finding("boots", "note", f"chosen for one start: {seen}")
    left = iter(entry.words)
    lacks = next((w for w in wanted if w not in left), "")
    if lacks:
        seen += f"; the menu is older than the defaults: it lacks {lacks}"
        return Finding("boots", "warn", seen, f"sudo {generator or 'update-grub'}")
    return Finding("boots", "ok", seen)


def words(line: CommandLine) -> Finding:
    """Words of the command line that take memory, or that the kernel reads otherwise than they look."""
    name = "command-line"
    if wrong := mangled(line):
        seen = f"memmap={wrong} is read as a memory limit, not as a reservation"
        return Finding(name, "warn", seen, f"take it out of {GRUB_DEFAULT}; emupmem apply writes it right")
    if half := half_written(line):
        seen = f"memmap={half.text} is not written to its end: it takes {human(half.size)} from {half.start:#x} on"
        return Finding(name, "stop", seen, f"take it out of {GRUB_DEFAULT}; emupmem apply writes it right")
    if any(i.op == "exactmap" for i in line.items):
        seen = "memmap=exactmap replaces the firmware's map by one made by hand"
        return Finding(name, "stop", seen, "remove it first; emupmem plans on what the firmware says")
    if is_cut(line.text):
        return Finding(name, "warn", "longer than the 2047 bytes that the kernel reads", "shorten it")
    taking = [f"memmap={i.text}" for i in line.items]
    taking += [f"mem={tight(size)}" for size in line.mem_limits]
    taking += [f"crashkernel={value}" for value in line.crashkernel]
    taking += [line.hugepages_text] if line.hugepages else []
    if taking:
        return Finding(name, "note", f"{' '.join(taking)}: every plan counts these in")
    return Finding(name, "ok", "nothing on it takes memory")


def regions_finding(line: CommandLine) -> Finding:
    """How many of the kernel's four slots for avoided ranges are in use (kaslr.c)."""
    name, most = "regions", MAX_MEMMAP_REGIONS
    count = memmap_region_count(line)
    foreign = memmap_region_count(survey.without_reservations(line))
    seen = f"{count} of {most} memmap ranges that the kernel's randomisation keeps clear of are in use"
    if line.nokaslr:
        return Finding(name, "ok", f"{count} memmap ranges; with nokaslr any number will do")
    if foreign >= most:
        return Finding(
            name, "stop", f"{seen}, none of them ours: there is no room for one more", "add nokaslr"
        )
    avoided, gives_up = kaslr_avoided(line)
    spans = [Span(i.start, i.start + i.size) for i in line.items if i.op in ("!", "#", "$") and i.start]
    if count > most and not gives_up and any(s not in avoided for s in spans):
        return Finding(
            name, "warn", f"{seen}: the kernel may be put into the fifth", "one memmap= list, or nokaslr"
        )
    if count >= most:
        return Finding(name, "note", f"{seen}: one more device is refused", "nokaslr lifts that")
    return Finding(name, "ok", seen)


# GRUB's environment, room, programs ---------------------------------------------------------------


def look_at_grubenv(eye: Eye) -> Finding:
    try:
        why, fix = trial.obstacle(eye.machine)
    except EmupmemError as exc:
        return Finding("grubenv", "note", exc.message, "sudo emupmem doctor sees more")
    return grubenv_finding(
        environment.grubenv_name(eye.machine), why, fix, environment.grubenv(eye.machine).get(trial.NEXT, "")
    )


def grubenv_finding(name: str, why: str, fix: str, once: str) -> Finding:
    """Whether GRUB itself can forget a choice for one start: a trial boot falls back by that."""
    edit = "grub2-editenv" if "/grub2/" in name else "grub-editenv"
    if once:
        seen = f"the next boot takes the entry “{once}”, once"
        return Finding(
            "grubenv",
            "warn" if why else "note",
            f"{seen}; but {why}: it stays chosen" if why else seen,
            f"sudo {edit} {name} unset {trial.NEXT} takes that back",
        )
    if why:
        return Finding("grubenv", "note", f"no trial boots: {why}", fix or "apply without --trial")
    return Finding("grubenv", "ok", f"GRUB can write {name}: a trial boot ends by itself")


def look_at_room(eye: Eye) -> Finding:
    places: list[tuple[str, int, bool]] = []
    for folder in ("/boot", "/", BACKUPS.rpartition("/")[0], *_own_file_system(eye)):
        there = folder
        while there != "/" and not eye.machine.exists(there):
            there = there.rpartition("/")[0] or "/"
        place = mount_of(eye.mounts, eye.machine.real(there))
        places.append((folder, eye.machine.room(there), place is not None and "ro" in place.options))
    menu = len(readable_menu(eye.machine).encode("utf-8", "surrogateescape"))
    return room(places, MENU_COPIES * menu + MIB)


def _own_file_system(eye: Eye) -> Iterator[str]:
    """Where the boot entries lie, if that is no part of / or /boot: the EFI partition."""
    if eye.by_grub or not eye.machine.live:  # what was collected tells only of the others
        return
    try:
        menu = eye.loader.standing(eye.machine).menu
    except EmupmemError:
        return
    place = mount_of(eye.mounts, eye.machine.real(menu)) if menu.startswith("/") else None
    if place is not None and place.dir not in ("/", "/boot"):
        yield place.dir


def room(places: Sequence[tuple[str, int, bool]], needed: int) -> Finding:
    """(folder, free bytes, mounted read-only) of what apply writes to; `needed` bytes in each."""
    closed = [folder for folder, _, read_only in places if read_only]
    if closed:
        seen = f"mounted read-only: {', '.join(closed)}"
        return Finding("room", "stop", seen, f"mount -o remount,rw {closed[0]}")
    seen = ", ".join(f"{folder} {human(free)}" for folder, free, _ in places)
    if any(free < needed for _, free, _ in places):
        return Finding("room", "warn", f"{seen} free; apply writes up to {human(needed)}", "make room first")
    return Finding("room", "ok", f"{seen} free")


def look_at_unit(machine: Host) -> Finding | None:
    """Said only where there is a unit of emupmem's."""
    program = installed.present_program(machine)
    return unit_finding(program, installed.program_problem(machine, program)) if program else None


def unit_finding(program: str, problem: str) -> Finding:
    """Whether what mounts (and saves) at every boot can be started; an upgrade of the system may break that."""
    if problem:
        seen = f"{problem}: nothing is mounted at a boot, and nothing is saved at a shutdown"
        return Finding("unit", "fail", seen, installed.REPAIR)
    return Finding("unit", "ok", f"emupmem.service starts {program}")


def look_at_generator(machine: Host) -> Finding:
    found = environment.generator(machine)
    edit = next((p for p in ("grub-editenv", "grub2-editenv") if machine.find(p)), "")
    return generator_finding(" ".join(found.argv) if found is not None else "", edit)


def generator_finding(command: str, edit: str) -> Finding:
    """Without the program that makes grub.cfg apply refuses; without grub-editenv only a trial."""
    if not command:
        seen = f"none of {', '.join(GENERATORS)} is installed: grub.cfg cannot be generated"
        return Finding("generator", "stop", seen, "install grub2-common (grub2-tools on Fedora)")
    if not edit:
        return Finding(
            "generator", "note", f"{command}; no grub-editenv: no trial boots", "install grub-common"
        )
    return Finding("generator", "ok", f"{command} makes the menu, {edit} chooses trial boots")
