# SPDX-License-Identifier: Apache-2.0
"""Which distribution a machine has, and how a missing program is installed there."""

from __future__ import annotations

import re

from emupmem.system.host import Host

OS_RELEASE = "/etc/os-release"

_INSTALL = {
    **dict.fromkeys(("debian", "ubuntu"), "apt-get install"),
    **dict.fromkeys(("fedora", "rhel", "centos"), "dnf install"),
    **dict.fromkeys(("suse", "opensuse"), "zypper install"),
    "arch": "pacman -S",
}
# What brings a program, where its package is called otherwise than with Debian.
_PACKAGES: dict[str, dict[str, str]] = {
    "grub-editenv": {
        "debian": "grub-common",
        "fedora": "grub2-tools-minimal",
        "suse": "grub2",
        "arch": "grub",
    },
    "kexec": {"debian": "kexec-tools"},
    "mkfs.ext4": {"debian": "e2fsprogs"},
    "mkfs.xfs": {"debian": "xfsprogs"},
    "ndctl": {"debian": "ndctl"},
    "qemu-system-x86_64": {
        "debian": "qemu-system-x86",
        "fedora": "qemu-system-x86-core",
        "suse": "qemu-x86",
        "arch": "qemu-system-x86",
    },
    "sbsign": {"debian": "sbsigntool", "fedora": "sbsigntools", "suse": "sbsigntools", "arch": "sbsigntools"},
    "systemd-stub": {"debian": "systemd-boot-efi", "fedora": "systemd-boot-unsigned", "arch": "systemd"},
    "ukify": {"debian": "systemd-ukify", "suse": "ukify"},
}
_LIKE = {"ubuntu": "debian", "rhel": "fedora", "centos": "fedora", "opensuse": "suse"}


def families(machine: Host) -> list[str]:
    """The words of ID and ID_LIKE in its os-release(5), the nearest first; none where there is no such file."""
    found = re.findall(r"^ID(?:_LIKE)?=[\"']?([^\"'\n]*)", machine.peek(OS_RELEASE), re.MULTILINE)
    return " ".join(found).split()


def install_hint(machine: Host, program: str) -> str:
    """What installs a program (or what is in _PACKAGES by another name) on that machine.

    Debian's words where the machine does not say what it is; elsewhere only the package, by Debian's name for it;
    empty for what every machine has.
    """
    names = _PACKAGES.get(program)
    if names is None:
        return ""
    told = families(machine)
    family = next((f for f in told if f in _INSTALL), "" if told else "debian")
    name = names.get(_LIKE.get(family, family), names["debian"])
    return f"{_INSTALL[family]} {name}" if family else f"install it: Debian's package is {name}"
