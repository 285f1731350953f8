# SPDX-License-Identifier: Apache-2.0
"""What a boot loader left in UEFI variables."""

from __future__ import annotations

import re

from emupmem.system.host import Host

_EFI = "/sys/firmware/efi/efivars/{}-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"
LOADER_INFO = _EFI.format("LoaderInfo")
STUB_INFO = _EFI.format("StubInfo")
SELECTED = _EFI.format("LoaderEntrySelected")
ONE_SHOT = _EFI.format("LoaderEntryOneShot")


def loader_name(machine: Host) -> str:
    """What the boot loader calls itself in the UEFI variable LoaderInfo, empty where it left none."""
    return efi_text(machine, LOADER_INFO)


def efi_variable(name: str) -> str:
    """The file of a variable of the boot loader's."""
    return _EFI.format(name)


def efi_text(machine: Host, name: str) -> str:
    """Text of a UEFI variable: four bytes of attributes, then UTF-16."""
    data = machine.peek(name).encode("utf-8", "surrogateescape")
    return re.sub(r"[^\x20-\x7e]", "", data.replace(b"\0", b"").decode("utf-8", "replace"))


def one_shot(machine: Host) -> str:
    """The entry that is chosen for the next start only, empty where there is none."""
    return efi_text(machine, ONE_SHOT)
