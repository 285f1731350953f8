# SPDX-License-Identifier: Apache-2.0
"""What new kernels take their command line from: /etc/kernel/cmdline and its like."""

from __future__ import annotations

import re
from collections.abc import Sequence

from emupmem.boot import programs
from emupmem.boot.bls import text as bls_text
from emupmem.boot.bls.files import BOOT_FOLDERS, TRIAL_ENTRY, entry_files, entry_text
from emupmem.boot.entry import BootEntry
from emupmem.boot.foreign import KERNELSTUB_CONFIG, SDBOOT_MANAGE_CONFIG, SDBOOT_MANAGE_DROPINS
from emupmem.boot.grub.environment import GRUB_DEFAULT
from emupmem.kernel.cmdline import parse_command_line
from emupmem.model import EmupmemError, FileEdit
from emupmem.system import backups
from emupmem.system.backups import BACKUPS
from emupmem.system.host import Host


def torn_files(machine: Host, names: Sequence[str]) -> tuple[str, ...]:
    """The entries, and the source of new kernels' words, that a program which was killed left half-written."""
    torn = [n for n in names if machine.text(n) != entry_text(machine, n)]
    return (*torn, *([KERNEL_CMDLINE] if source_is_torn(machine) else []))


KERNEL_CMDLINE = "/etc/kernel/cmdline"
VENDOR_CMDLINE = "/usr/lib/kernel/cmdline"
CMDLINE_D = "/etc/kernel/cmdline.d"
MKINITCPIO_D = "/etc/cmdline.d"
"""What mkinitcpio and dracut read before they look at the boot that runs."""

MKINITCPIO_PRESETS = "/etc/mkinitcpio.d"

CONFIG_FOLDERS = ("/etc", "/run", "/usr/local/lib", "/usr/lib")
"""Where kernel-install looks for its settings, the first one counts."""

FORMER_DROPIN = f"{CMDLINE_D}/zz-emupmem."
"""What an emupmem before this one wrote there: sdbootutil joins that folder and /etc/kernel/cmdline, and
kernel-install's plug-ins do not read it at all (systemd issue 23308)."""

SOURCES = (GRUB_DEFAULT, KERNEL_CMDLINE, KERNELSTUB_CONFIG, SDBOOT_MANAGE_CONFIG)

KERNEL_INSTALL_ADDS = ("systemd.machine_id=",)
"""Words that kernel-install adds by itself (90-loaderentry.install): they do not belong into its source."""


def source_items(machine: Host, default: BootEntry | None) -> tuple[tuple[str, ...], str]:
    """Our items where new kernels take them from, and its name; without such a file the default entry itself."""
    data = _source(machine)
    if data is not None:
        text = data.decode("utf-8", "surrogateescape")
        return tuple(
            i.text for i in parse_command_line(bls_text.file_line(text)).reservations
        ), KERNEL_CMDLINE
    items = tuple(i.text for i in default.command_line.reservations) if default is not None else ()
    return items, "the boot entries"


def source_files(machine: Host) -> list[str]:
    """The files that new kernels' words come from, where they are not GRUB's."""
    names = (KERNEL_CMDLINE, VENDOR_CMDLINE, *_dropins(machine), "/etc/kernel/entry-token", "/etc/machine-id")
    of_generators = (KERNELSTUB_CONFIG, SDBOOT_MANAGE_CONFIG, *sdboot_manage_dropins(machine))
    return [n for n in (*names, *of_generators) if machine.exists(n)]


def sdboot_manage_dropins(machine: Host) -> list[str]:
    """The files that sdboot-manage sources after its main one, in its order."""
    folders = SDBOOT_MANAGE_DROPINS
    return [f"{f}/{n}" for f in folders for n in machine.names(f) if n.endswith(".conf") and n[0] != "."]


def sources_or_entries(machine: Host) -> tuple[str, ...]:
    """The files whose times tell when the next start was changed.

    Not those on FAT where it can be avoided: their times have no zone.
    """
    found = [f for f in (KERNEL_CMDLINE, GRUB_DEFAULT) if machine.exists(f)]
    return tuple(found or entry_files(machine))


def written_files(machine: Host) -> tuple[str, ...]:
    """The files that a change of the entries may write."""
    trials = [f"{folder}/loader/entries/{TRIAL_ENTRY}" for folder in BOOT_FOLDERS]
    return (*entry_files(machine), *SOURCES, *trials)


def _dropins(machine: Host) -> list[str]:
    return [f"{CMDLINE_D}/{n}" for n in machine.names(CMDLINE_D) if n.endswith((".conf", ".cfg"))]


def _source(machine: Host) -> bytes | None:
    """/etc/kernel/cmdline; of one that a program tore when it was killed, what it was before."""
    torn = source_is_torn(machine)
    return backups.read_aside(machine, KERNEL_CMDLINE) if torn else machine.read(KERNEL_CMDLINE)


def source_is_torn(machine: Host) -> bool:
    """Whether it is empty, and a copy or a record says that it was not."""
    data = machine.read(KERNEL_CMDLINE)
    empty = data is not None and not data.strip(b"\0 \t\r\n")
    return empty and (backups.is_aside(machine, KERNEL_CMDLINE) or bool(made_records(machine)))


def source_edits(
    machine: Host, made: str | None, items: Sequence[str], extra: Sequence[str], drop: Sequence[str]
) -> list[FileEdit]:
    """What keeps the source of new kernels' command lines in step with the entries.

    `made` are the words to make it of where there is none, None where it is not needed.
    """
    edits = []
    for name in _dropins(machine):
        if name.startswith(FORMER_DROPIN):
            edits.append(FileEdit(name, machine.read(name), None))
        elif parse_command_line(bls_text.file_line(machine.text(name))).reservations:
            raise EmupmemError(f"{name} reserves memory already", "remove that first")
    return edits + _main_source_edits(machine, made, items, extra, drop)


def _main_source_edits(
    machine: Host, made: str | None, items: Sequence[str], extra: Sequence[str], drop: Sequence[str]
) -> list[FileEdit]:
    data = _source(machine)
    if data is None:
        return [_made_source(machine, made, items, extra, drop)] if made is not None and items else []
    # While this boot still has the reservation, kernel-install would take it from /proc/cmdline.
    booted = parse_command_line(machine.peek("/proc/cmdline")).reservations if machine.running else ()
    if not items and not booted and made_by_us(machine, data):
        return [FileEdit(KERNEL_CMDLINE, data, None)]
    return [FileEdit(KERNEL_CMDLINE, data, _reworked_file(data, items, extra, drop))]


def kept_source(machine: Host, line: str | None) -> list[FileEdit]:
    """What keeps new kernels from taking their words from the boot that runs, where they would: they get `line`."""
    return _kept(machine, line, ("kernel-install",)) if line is not None else []


def kept_line(machine: Host, line: str) -> list[FileEdit]:
    """The same where unified images are made: mkinitcpio does that as well."""
    if any(n.endswith(".conf") for n in machine.names(MKINITCPIO_D)):
        return []  # it reads those
    return _kept(machine, line, ("kernel-install", "mkinitcpio"))


def _kept(machine: Host, line: str, readers: Sequence[str]) -> list[FileEdit]:
    needed = any(programs.has_program(machine, r) for r in readers) and machine.read(VENDOR_CMDLINE) is None
    return [_made_source(machine, line, ())] if needed and not machine.exists(KERNEL_CMDLINE) else []


def taken_by_new_kernels(machine: Host) -> str:
    """Where kernel-install and 20-grub.install take the words of a new kernel from, in their order."""
    if found := next((n for n in (KERNEL_CMDLINE, VENDOR_CMDLINE) if machine.exists(n)), ""):
        return found
    if programs.has_program(machine, "kernel-install"):
        return "the command line of the boot that runs (/proc/cmdline)"
    return "the boot entries as they are: nothing here makes new ones"


def bare_source(machine: Host, line: str) -> list[FileEdit]:
    """What makes the source one without our items, where all kernels are given those by other means."""
    for name in _dropins(machine):
        if parse_command_line(bls_text.file_line(machine.text(name))).reservations:
            raise EmupmemError(f"{name} reserves memory already", "remove that first")
    data = _source(machine)
    if data is None:
        return kept_line(machine, line)
    return [FileEdit(KERNEL_CMDLINE, data, _reworked_file(data, (), (), ()))]


def kernel_install_layout(machine: Host) -> str:
    """What kernel-install makes of a new kernel: `uki`, `bls` …; empty where it decides by itself."""
    base = "kernel/install.conf"
    names = [next((n for f in CONFIG_FOLDERS if machine.exists(n := f"{f}/{base}")), "")]
    found = {n: f"{f}/{base}.d/{n}" for f in reversed(CONFIG_FOLDERS) for n in machine.names(f"{f}/{base}.d")}
    names += [found[n] for n in sorted(found) if n.endswith(".conf")]
    lines = [x.strip() for n in names if n for x in machine.peek(n).splitlines()]
    told = [x.partition("=")[2].strip().strip("\"'") for x in lines if x.startswith("layout=")]
    return told[-1] if told else ""


def mkinitcpio_makes_images(machine: Host) -> bool:
    """Whether a preset of mkinitcpio's names an image that it makes of each new kernel (Arch)."""
    if not programs.has_program(machine, "mkinitcpio"):
        return False
    presets = [n for n in machine.names(MKINITCPIO_PRESETS) if n.endswith(".preset")]
    texts = [machine.peek(f"{MKINITCPIO_PRESETS}/{n}") for n in presets]
    return any(re.search(r"^[ \t]*\w+_uki=", t, re.MULTILINE) for t in texts)


def _made_source(
    machine: Host, line: str, items: Sequence[str], extra: Sequence[str] = (), drop: Sequence[str] = ()
) -> FileEdit:
    """An /etc/kernel/cmdline where there is none: without it new kernels take the words of the running boot."""
    vendor = machine.read(VENDOR_CMDLINE)
    text = vendor.decode("utf-8", "surrogateescape") if vendor is not None else line
    kept = [w for w in bls_text.raw_words(bls_text.file_line(text)) if not w.startswith(KERNEL_INSTALL_ADDS)]
    text = bls_text.reworked(" ".join(kept), items, extra, drop) + "\n"
    return FileEdit(KERNEL_CMDLINE, None, text.encode("utf-8", "surrogateescape"))


def _reworked_file(data: bytes, items: Sequence[str], extra: Sequence[str], drop: Sequence[str]) -> bytes:
    before = data.decode("utf-8", "surrogateescape")
    after = bls_text.rework_file(before, items, extra, drop)
    bls_text.prove_words(bls_text.file_line(before), bls_text.file_line(after), items, extra, drop)
    return after.encode("utf-8", "surrogateescape")


def bare(data: bytes, drop: Sequence[str]) -> bytes:
    """What such a file is without our words."""
    return _reworked_file(data, (), (), drop)


def made_by_us(machine: Host, data: bytes) -> bool:
    """Whether /etc/kernel/cmdline is a file that an apply of ours made where there was none."""
    return any(machine.read(n) == data for n in made_records(machine))


def made_records(machine: Host) -> list[str]:
    """The records of such files."""
    names = machine.names(BACKUPS)
    return [f"{BACKUPS}/{n}" for n in names if n.startswith("cmdline.") and n.endswith(".made")]
