# SPDX-License-Identifier: Apache-2.0
"""What a boot loader left in UEFI variables."""

from __future__ import annotations

import re

from emupmem.model import EmupmemError
from emupmem.system.host import Host

_EFI = "/sys/firmware/efi/efivars/{}-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"
LOADER_INFO = _EFI.format("LoaderInfo")
STUB_INFO = _EFI.format("StubInfo")
SELECTED = _EFI.format("LoaderEntrySelected")
ONE_SHOT = _EFI.format("LoaderEntryOneShot")
STUB_IMAGE = _EFI.format("StubImageIdentifier")
LOADER_IMAGE = _EFI.format("LoaderImageIdentifier")

_VARIABLES = "/sys/firmware/efi/efivars"
SECURE_BOOT = f"{_VARIABLES}/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
TRUSTED = f"{_VARIABLES}/db-d719b2cb-3d3a-4596-a3bc-dad00e67656f"
TRUSTED_BY_SHIM = f"{_VARIABLES}/MokListRT-605dab50-e046-4300-abb6-3dd810dd8b23"
"""The certificates that programs may be signed with, as the firmware and as shim hold them."""


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


def secure_boot(machine: Host) -> bool | None:
    """Whether Secure Boot is on, None where that is not told: the byte after four bytes of attributes."""
    try:
        data = machine.read(SECURE_BOOT)
    except EmupmemError:
        return None
    return data[4] == 1 if data is not None and len(data) > 4 else None
