# SPDX-License-Identifier: Apache-2.0
"""Unified kernel images: EFI programs that hold a kernel, its initrd and its command line. Which are here, and whose.

Source: the Boot Loader Specification (type 2: EFI/Linux/*.efi), systemd-stub(7).
"""

from __future__ import annotations

import re

from emupmem.boot import efi
from emupmem.boot.addon import FOLDER as ADDONS
from emupmem.boot.addon import SINCE, Addon, addons_for
from emupmem.boot.bls import entries as bls_entries
from emupmem.boot.bls import menu as bls_menu
from emupmem.boot.bls.files import BOOT_FOLDERS
from emupmem.boot.entry import BootEntry
from emupmem.kernel.cmdline import parse_command_line
from emupmem.model import CommandLine
from emupmem.record import record
from emupmem.system.host import Host
from emupmem.system.pe import PeFile

FOLDER = "EFI/Linux"
"""Where systemd-boot looks for them."""

FALLBACK = "EFI/BOOT/BOOTX64.EFI"
"""What a firmware starts that knows of nothing else; there it may be an image as well."""


@record
class UnifiedImage:
    """An image: its file, where its partition is mounted, what is in it, the addons that its stub reads."""

    name: str
    partition: str
    file: PeFile
    addons: tuple[Addon, ...]

    @property
    def ident(self) -> str:
        """What systemd-boot calls it."""
        return bls_menu.id_of(self.name)

    @property
    def stub(self) -> int:
        """The version of systemd-stub that it was made with, 0 where it is another stub."""
        found = re.match(r"systemd-stub (\d+)", self.file.maker)
        return int(found[1]) if found else 0

    @property
    def reads_addons(self) -> bool:
        return self.stub >= SINCE

    @property
    def line(self) -> str:
        """The words that its kernel gets: its own, then those of its addons."""
        return " ".join(x for x in (self.file.line, *(a.line for a in self._read())) if x)

    def _read(self) -> list[Addon]:
        """The addons that are for this kernel."""
        ours = [a for a in self.addons if not a.release or a.release == self.file.release]
        return ours if self.reads_addons else []

    def fixed(self, ours: str) -> list[tuple[str, tuple[str, ...]]]:
        """(file, items) where memory is reserved without the addon `ours`: in the image, in addons of others."""
        places = [(self.name, self.file.line), *((a.name, a.line) for a in self._read() if a.name != ours)]
        found = [(n, tuple(i.text for i in parse_command_line(x).reservations)) for n, x in places]
        return [(name, items) for name, items in found if items]

    @property
    def entry(self) -> BootEntry:
        """The image as an entry of a menu."""
        words = parse_command_line(self.line).words
        path = self.name.removeprefix(self.partition)
        return BootEntry((self.ident,), (self.ident,), (0,), path, words, 1, False, True, self.file.release)


def all_images(machine: Host) -> list[UnifiedImage]:
    """The images that are here, one for each file. Raises EmupmemError where one may not be read."""
    names = [
        (f"{folder}/{FOLDER}/{n}", folder)
        for folder in BOOT_FOLDERS
        for n in machine.names(f"{folder}/{FOLDER}")
        if n.lower().endswith(".efi") and n[0] != "."
    ]
    names += _started(machine)
    found: dict[str, UnifiedImage] = {}
    for name, folder in names:
        file = machine.pe_file(name) if machine.real(name) not in found else None
        if file is not None and file.kernel:
            addons = tuple(addons_for(machine, folder, name))
            found[machine.real(name)] = UnifiedImage(name, folder, file, addons)
    return list(found.values())


def program_files(machine: Host) -> list[str]:
    """The files that all this is read from: images and addons."""
    found = [f"{f}/{FOLDER}/{n}" for f in BOOT_FOLDERS for n in machine.names(f"{f}/{FOLDER}")]
    names = [n for n in found if n.lower().endswith(".efi")]
    names += [name for name, _ in _started(machine)]
    folders = [f"{f}/{ADDONS}" for f in BOOT_FOLDERS] + [f"{n}.extra.d" for n in names]
    return [*names, *(f"{f}/{n}" for f in folders for n in machine.names(f) if n.lower().endswith(".efi"))]


def _started(machine: Host) -> list[tuple[str, str]]:
    """The image that started this boot, (file, folder of its partition); in a tree, what the firmware falls back to."""
    told = efi.efi_text(machine, efi.STUB_IMAGE) if machine.running else FALLBACK
    if not told and not efi.loader_name(machine):
        told = efi.efi_text(machine, efi.LOADER_IMAGE)  # a stub before version 257, started by the firmware
    path = told.replace("\\", "/").strip("/")
    return [(f"{f}/{path}", f) for f in BOOT_FOLDERS if path and machine.exists(f"{f}/{path}")]


def started_image(machine: Host) -> str:
    """The file of the image that started this boot, empty where that is not told."""
    return next((name for name, _ in _started(machine)), "") if machine.running else ""


def sorted_images(machine: Host) -> tuple[list[UnifiedImage], list[UnifiedImage]]:
    """The images of this system, and those of others. Raises EmupmemError."""
    images = all_images(machine)
    line, started = _line_here(machine, images), started_image(machine)
    ours = [i for i in images if i.name == started or _is_ours(machine, i, line)]
    return ours, [i for i in images if i not in ours]


def _is_ours(machine: Host, image: UnifiedImage, line: CommandLine) -> bool:
    return bls_entries.is_named_or_roots_here(machine, image.ident, image.file.line, line)


def _line_here(machine: Host, images: list[UnifiedImage]) -> CommandLine:
    """A command line that starts this system; in a tree that has none elsewhere, that of its first image."""
    line = bls_entries.own_line(machine)
    if machine.running or "root=" in line.text or not images:
        return line
    lines = [parse_command_line(i.file.line) for i in images]
    root = f"root={bls_entries.root_of_fstab(machine)}"
    return next((x for x in lines if root in x.words), lines[0])
