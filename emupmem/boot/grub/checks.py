# SPDX-License-Identifier: Apache-2.0
"""What keeps GRUB's menu from being changed: no GRUB, another loader, two menus; and reading that menu."""

from __future__ import annotations

from emupmem.boot import foreign
from emupmem.boot.grub import environment
from emupmem.boot.grub.environment import GRUB_DEFAULT
from emupmem.model import EmupmemError
from emupmem.system.host import Host


def readable_menu(machine: Host) -> str:
    """The generated menu, empty where there is none or it is not ours to read."""
    try:
        return machine.text(environment.grub_cfg(machine))
    except EmupmemError:
        return ""


def refuse_no_grub(machine: Host) -> tuple[str, ...]:
    """Raise EmupmemError where grub-mkconfig does not set this machine up."""
    if machine.read(GRUB_DEFAULT) is None:
        raise EmupmemError(
            f"there is no {GRUB_DEFAULT}: this machine is not started by a GRUB that grub-mkconfig sets up",
            "emupmem changes such machines only; emupmem suggest shows the value to add by hand",
        )
    name = environment.grub_cfg(machine)
    try:
        data = machine.read(name)
    except EmupmemError:
        if machine.running and not machine.is_root:
            return ()  # a dry run without root
        raise
    if data is None and machine.running:
        raise EmupmemError(
            f"there is no {name}: GRUB does not start this machine", "is another boot loader in use?"
        )
    return ()


def refuse_other_loader(machine: Host) -> tuple[str, ...]:
    """The boot loader that started this kernel, by the mark that GRUB leaves (`owner` knows those of others)."""
    if "BOOT_IMAGE=" not in machine.peek("/proc/cmdline"):
        raise EmupmemError(
            "GRUB did not start this kernel (no BOOT_IMAGE= in /proc/cmdline): "
            "another boot loader, a unified kernel image or a direct start did",
            "a change to GRUB's settings would not reach it; emupmem suggest shows the value to add by hand",
        )
    return ()


def refuse_two_menus(machine: Host) -> tuple[str, ...]:
    """Raise EmupmemError where it cannot be told which menu starts this machine."""
    menus = environment.grub_cfgs(machine)
    if len(menus) > 1:
        raise EmupmemError(
            f"there are two boot menus, {' and '.join(menus)}: cannot determine which one starts this machine",
            "move the one that is not in use out of the way",
        )
    return ()


def warn_of_copies(machine: Host) -> tuple[str, ...]:
    """Proxmox keeps copies of the menu, which its hook in grub-mkconfig makes (000_proxmox_boot_header)."""
    if not machine.exists(foreign.PROXMOX_ESPS):
        return ()
    return (
        "GRUB reads the copies of the menu that proxmox-boot-tool makes on other partitions: only the menu here "
        "is checked, emupmem verify proves it after the reboot",
    )
