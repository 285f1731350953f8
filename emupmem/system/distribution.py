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
_KNOWN = ("debian", "fedora", "suse", "arch")
# The package that brings a program, as far as its name is known.
_PACKAGES: dict[str, dict[str, str]] = {
    "grub-editenv": {
        "debian": "grub-common",
        "fedora": "grub2-tools-minimal",
        "suse": "grub2",
        "arch": "grub",
    },
    "kexec": dict.fromkeys(_KNOWN, "kexec-tools"),
    "mkfs.ext4": dict.fromkeys(_KNOWN, "e2fsprogs"),
    "mkfs.xfs": dict.fromkeys(_KNOWN, "xfsprogs"),
    "ndctl": dict.fromkeys(_KNOWN, "ndctl"),
    "qemu-system-x86_64": {
        "debian": "qemu-system-x86",
        "fedora": "qemu-system-x86-core",
        "suse": "qemu-x86",
        "arch": "qemu-system-x86",
    },
    "sbsign": {"debian": "sbsigntool", "fedora": "sbsigntools", "arch": "sbsigntools"},
    "systemd-stub": {"debian": "systemd-boot-efi", "fedora": "systemd-boot-unsigned", "arch": "systemd"},
    "ukify": dict.fromkeys(("debian", "fedora", "arch"), "systemd-ukify"),
}
_LIKE = {"ubuntu": "debian", "rhel": "fedora", "centos": "fedora", "opensuse": "suse"}


def families(machine: Host) -> list[str]:
    """The words of ID and ID_LIKE in its os-release(5), the nearest first; none where there is no such file."""
    found = re.findall(r"^ID(?:_LIKE)?=[\"']?([^\"'\n]*)", machine.peek(OS_RELEASE), re.MULTILINE)
    return " ".join(found).split()


def install_hint(machine: Host, program: str) -> str:
    """What installs a program (or what is in _PACKAGES by another name) on that machine.

    Debian's words where the machine does not say what it is; only the package, by Debian's name for it, where another
    name is not known; empty for what every machine has.
    """
    names = _PACKAGES.get(program)
    if names is None:
        return ""
    told = families(machine)
    family = next((f for f in told if f in _INSTALL), "" if told else "debian")
    name = names.get(_LIKE.get(family, family))
    return f"{_INSTALL[family]} {name}" if name else f"install it: Debian's package is {names['debian']}"
