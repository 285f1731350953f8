# SPDX-License-Identifier: Apache-2.0
"""What started this machine, or would start the machine of a tree, where that is not for emupmem to change.

On a running machine the marks that loaders leave decide: GRUB puts BOOT_IMAGE= first on the command line
(grub-core/loader/i386/linux.c), the others set the UEFI variable LoaderInfo. A tree has only its files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from emupmem.boot import efi, foreign
from emupmem.boot.bls import entries as bls_entries
from emupmem.boot.bls import files, text
from emupmem.boot.bls.files import unified_images
from emupmem.boot.bls.menu import menu_names
from emupmem.boot.bls.sources import KERNEL_CMDLINE
from emupmem.boot.foreign import TRANSACTIONAL, Owner
from emupmem.boot.grub import environment
from emupmem.boot.grub.environment import GRUB_DEFAULT
from emupmem.boot.images import all_images
from emupmem.boot.limine_text import settings
from emupmem.boot.programs import has_program
from emupmem.device.blocks import mount_of, mounts
from emupmem.kernel.cmdline import parse_command_line
from emupmem.model import EmupmemError
from emupmem.planner.survey import started_by_kexec
from emupmem.system.host import Host

LOADER_MAGIC = b"#### LoaderInfo: systemd-boot "
"""What systemd-boot has in its binary to be known by (src/boot/boot.c, SD_MAGIC)."""

_EFIVARS = efi.LOADER_INFO.rpartition("/")[0]
_ZFS_ROOT = re.compile(r"(?:root=zfs[:=]|zfs=)(?!AUTO)([\w./:-]+)", re.IGNORECASE)
_NOT_PASSED_ON = ("BOOT_IMAGE=", "initrd=")


def owner(machine: Host) -> Owner | None:
    """What owns the boot entries, None where emupmem may know a way to change them."""
    if machine.exists(foreign.NIXOS_MARK):
        return foreign.NIXOS
    return _of_boot(machine) if machine.running else _of_tree(machine)


def by_grub(machine: Host) -> bool:
    """Whether GRUB started this kernel, whatever started GRUB."""
    words = parse_command_line(machine.peek("/proc/cmdline")).words
    if not words or not words[0].startswith("BOOT_IMAGE="):
        return False
    # A command line that was once copied from /proc/cmdline into the entries of another loader has it as well.
    by_other = machine.exists(foreign.PROXMOX_ESPS) and "systemd-boot" in efi.loader_name(machine).lower()
    of_proxmox = (KERNEL_CMDLINE,) if by_other else ()
    others = (*files.entry_files(machine), *_others(machine), *of_proxmox)
    return not any("BOOT_IMAGE=" in machine.peek(n) for n in others)


def _of_boot(machine: Host) -> Owner | None:
    """The owner on a running machine."""
    if _first(machine, foreign.EXTLINUX_CONFIGS) and not machine.exists(environment.grub_cfg(machine)):
        return foreign.EXTLINUX
    if by_grub(machine):
        return None
    if machine.exists(foreign.PROXMOX_ESPS):
        return foreign.PROXMOX
    if dataset := _of_zfsbootmenu(machine):
        return foreign.zfsbootmenu(dataset)
    name = efi.loader_name(machine).strip()[:64]
    if "limine" in name.lower():
        return limine_owner(machine)
    if machine.exists(efi.STUB_INFO) or "systemd-stub" in name.lower():
        return unified_owner(machine, started=True)  # the images that can be read are changed all the same
    return _named(machine, name) if name else _nameless(machine)


def _of_zfsbootmenu(machine: Host) -> str:
    """The root dataset whose kernel ZFSBootMenu started by kexec, empty where that is not so.

    Its own image, and what started that, left the marks that are here. A kexec by hand starts what an entry names.
    """
    words = parse_command_line(machine.peek("/proc/cmdline")).words if started_by_kexec(machine) else ()
    dataset = next((found[1] for w in words if (found := _ZFS_ROOT.fullmatch(w))), "")
    try:
        lines = [i.line for i in all_images(machine)] if dataset else []
    except EmupmemError:
        return ""
    lines += map(machine.peek, files.entry_files(machine)) if dataset else []
    return "" if any(dataset in line for line in lines) else dataset


def _named(machine: Host, name: str) -> Owner | None:
    lower = name.lower()
    if "refind" in lower:
        return foreign.REFIND
    if (
        "linux efi stub" in lower
    ):  # drivers/firmware/efi/libstub of new kernels, where nobody else left a name
        return foreign.EFI_STUB
    if "systemd-boot" in lower:
        return _generator(machine)
    return None if "grub" in lower else foreign.unknown(name)


def _nameless(machine: Host) -> Owner | None:
    """The owner where no loader left its name."""
    there = _configured(machine)
    if there is not None:
        return there
    if machine.exists(environment.grub_cfg(machine)) or machine.exists(GRUB_DEFAULT):
        return None  # GRUB's own checks say what is wrong
    if files.entry_files(machine):
        return foreign.unnamed(machine.exists("/sys/firmware/efi"), bool(machine.names(_EFIVARS)))
    return foreign.NOTHING_KNOWN


def _of_tree(machine: Host) -> Owner | None:
    """The owner in a tree."""
    if machine.exists(foreign.PROXMOX_ESPS):
        return foreign.PROXMOX_TREE
    entries = bool(files.entry_files(machine))
    if entries and (found := _generator(machine)) is not None:
        return found
    grub, systemd_boot = machine.exists(environment.grub_cfg(machine)), has_systemd_boot(machine)
    other = _configured(machine)
    have = [t for t, there in (("GRUB", grub), ("systemd-boot", systemd_boot and entries)) if there]
    have += [other.title] if other is not None else []
    if len(have) > 1 and not environment.grub_reads_bls(machine):
        return foreign.several(" and ".join(have))
    return other or _of_tree_by_entries(machine, entries, grub, systemd_boot)


def _of_tree_by_entries(machine: Host, entries: bool, grub: bool, systemd_boot: bool) -> Owner | None:
    if grub or environment.grub_reads_bls(machine):
        return None
    if entries:
        known = systemd_boot or any(machine.exists(f"{f}/loader/loader.conf") for f in files.BOOT_FOLDERS)
        return None if known else foreign.TREE_UNKNOWN
    if unified_images(machine):
        return unified_owner(machine, started=False)
    return None if machine.exists(GRUB_DEFAULT) else foreign.NOTHING_KNOWN


def _generator(machine: Host) -> Owner | None:
    """What writes the entries that systemd-boot reads, other than kernel-install."""
    if machine.exists(foreign.KERNELSTUB_CONFIG):
        return foreign.KERNELSTUB
    return foreign.SDBOOT_MANAGE if machine.exists(foreign.SDBOOT_MANAGE_CONFIG) else None


def _configured(machine: Host) -> Owner | None:
    """The loader whose configuration is here."""
    if _first(machine, foreign.LIMINE_CONFIGS):
        return limine_owner(machine)
    if _first(machine, foreign.REFIND_CONFIGS):
        return foreign.REFIND
    return foreign.EXTLINUX if _first(machine, foreign.EXTLINUX_CONFIGS) else None


def _others(machine: Host) -> list[str]:
    names = (*foreign.LIMINE_CONFIGS, *foreign.REFIND_CONFIGS)
    return [n for n in names if machine.exists(n)]


def _first(machine: Host, names: Sequence[str]) -> str:
    return next((n for n in names if machine.exists(n)), "")


def limine_owner(machine: Host) -> Owner:
    """Limine, with or without the tool that writes its entries."""
    config = _first(machine, foreign.LIMINE_CONFIGS) or "limine.conf"
    tool = next((t for t in foreign.LIMINE_TOOLS if has_program(machine, t)), "")
    if not tool and machine.exists(foreign.LIMINE_DEFAULTS):
        tool = foreign.LIMINE_TOOLS[0]
    return foreign.limine(
        config, tool, has_limine_line(machine), _passed_on(machine) if machine.running else ""
    )


def has_limine_line(machine: Host) -> bool:
    """Whether the settings of limine-entry-tool give a whole command line: without one it takes that of the boot."""
    words = parse_command_line(limine_lines(machine).get("default", "")).words
    return any(w.startswith("root=") for w in words)


def limine_lines(machine: Host) -> dict[str, str]:
    """The command line that the settings of limine-entry-tool give to each key."""
    return settings([machine.peek(n) for n in limine_layers(machine)])


def limine_layers(machine: Host) -> list[str]:
    """The files that limine-entry-tool reads, in its order (load_config of its version 1.38.0)."""
    parts = {f: [f"{f}/{n}" for n in machine.names(f) if n.endswith(".conf")] for f in foreign.LIMINE_FOLDERS}
    vendor, own = parts.values()
    return [*vendor, foreign.LIMINE_TOOL_CONFIG, *own, foreign.LIMINE_DEFAULTS]


def limine_setting(machine: Host, name: str) -> str:
    """What a setting of limine-entry-tool is in the end, empty where it is not set."""
    texts = [machine.peek(n) for n in limine_layers(machine)]
    found = [f for t in texts for f in re.findall(rf"^[ \t]*{name}[ \t]*=[ \t]*[\"']?(\w*)", t, re.MULTILINE)]
    return found[-1] if found else ""


def _passed_on(machine: Host) -> str:
    """The words of this boot without those that a loader adds, and without ours."""
    line = parse_command_line(machine.peek("/proc/cmdline"))
    return " ".join(w for w in text.foreign_words(line) if not w.startswith(_NOT_PASSED_ON))


def has_systemd_boot(machine: Host) -> bool:
    """Whether systemd-boot is on a boot partition of the tree."""
    names = ("EFI/systemd/systemd-bootx64.efi", "EFI/BOOT/BOOTX64.EFI", "EFI/BOOT/bootx64.efi")
    places = [f"{folder}/{name}" for folder in files.BOOT_FOLDERS for name in names]
    return any(LOADER_MAGIC in (machine.read(p) or b"") for p in places)


def unified_owner(machine: Host, started: bool) -> Owner:
    """A unified kernel image, with the partition that it is on."""
    esps = [f for f in files.BOOT_FOLDERS if machine.exists(f"{f}/EFI")]
    return foreign.unified(next(iter(esps), "/boot"), started)


def by_snapshots(machine: Host) -> bool:
    """Whether transactional-update makes each change in a new snapshot, the root being read-only (openSUSE MicroOS)."""
    if not has_program(machine, TRANSACTIONAL.title):
        return False
    if machine.running:
        root = mount_of(mounts(machine), "/")
        return root is not None and "ro" in root.options
    lines = [x.split() for x in machine.peek("/etc/fstab").splitlines()]
    return any(
        "ro" in x[3].split(",") for x in lines if len(x) > 3 and x[1] == "/" and not x[0].startswith("#")
    )


def by_image(machine: Host) -> bool:
    """Whether a unified kernel image started this kernel, whatever started that."""
    stub = machine.exists(efi.STUB_INFO) or "systemd-stub" in efi.loader_name(machine).lower()
    return stub or efi.efi_text(machine, efi.SELECTED).endswith(".efi")


def boots_image(machine: Host) -> bool:
    """Whether a unified kernel image boots by default, although boot entries are here."""
    if machine.running and by_grub(machine):
        return False
    told = bls_entries.default_id(machine)
    first = told or next(iter(menu_names(machine)), "")
    return first.lower().endswith(".efi")
