# SPDX-License-Identifier: Apache-2.0
"""Which boot loader starts a machine."""

from __future__ import annotations

from collections.abc import Callable

from emupmem.boot import foreign, owner, uki
from emupmem.boot.bls.files import entry_files
from emupmem.boot.efi import loader_name
from emupmem.boot.grub import environment
from emupmem.boot.grub.environment import grub_reads_bls
from emupmem.boot.grub.loader import Grub
from emupmem.boot.grub_bls import GrubBls
from emupmem.boot.kernelstub import Kernelstub
from emupmem.boot.limine import TOOL as LIMINE_TOOL
from emupmem.boot.limine import Limine
from emupmem.boot.loader import Loader, Owned
from emupmem.boot.programs import has_program
from emupmem.boot.proxmox_boot_tool import ProxmoxBootTool
from emupmem.boot.refind import Refind, is_for_options
from emupmem.boot.rpm_ostree import RpmOstree
from emupmem.boot.sdboot_manage import SdbootManage
from emupmem.boot.systemd_boot import SdBootUtil, SystemdBoot
from emupmem.model import EmupmemError
from emupmem.system.host import Host

_GENERATORS: dict[foreign.Owner, Callable[[], Loader]] = {
    foreign.KERNELSTUB: Kernelstub,
    foreign.SDBOOT_MANAGE: SdbootManage,
    foreign.PROXMOX: ProxmoxBootTool,
    foreign.PROXMOX_TREE: ProxmoxBootTool,
}
"""Owners of the boot entries whose own source of them is changed, where their program is installed."""


def title_of(machine: Host) -> str:
    """The name of what starts the machine; empty where that cannot be read."""
    try:
        return of(machine).title
    except EmupmemError:
        return ""


def of(machine: Host) -> Loader:
    """What starts the machine: GRUB with a menu by grub-mkconfig where nothing else is to be seen."""
    if _is_ostree(machine):
        return RpmOstree()
    by = owner.owner(machine)
    if (by is None or by.title == foreign.UNIFIED) and uki.starts_images(machine):
        return uki.Unified(machine)
    if by is not None and by.title == Limine.title and has_program(machine, LIMINE_TOOL):
        return Limine(by) if owner.has_limine_line(machine) else Owned(by)
    if by is foreign.REFIND and is_for_options(machine):
        return Refind()
    if by is not None:
        return _GENERATORS[by]() if by in _GENERATORS and has_program(machine, by.title) else Owned(by)
    entries = bool(entry_files(machine))
    if entries and has_program(machine, "sdbootutil"):
        return SdBootUtil()
    if machine.running and "systemd-boot" in loader_name(machine).lower() and not owner.by_grub(machine):
        return SystemdBoot()
    if grub_reads_bls(machine):
        return GrubBls()
    if entries and not machine.running and not machine.exists(environment.grub_cfg(machine)):
        return SystemdBoot()
    return Owned(foreign.TRANSACTIONAL) if owner.by_snapshots(machine) else Grub()


def _is_ostree(machine: Host) -> bool:
    if machine.running:
        return machine.exists("/run/ostree-booted")
    # The top of the disk, or a deployment of it, whose /ostree leads there.
    return machine.exists("/ostree/repo") or machine.is_link("/ostree")
