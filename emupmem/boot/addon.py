# SPDX-License-Identifier: Apache-2.0
"""Addons: small EFI programs beside unified kernel images, whose words systemd-stub adds to the command line.

One in loader/addons serves all images on its partition, those of kernels to come as well; one in NAME.efi.extra.d
serves one image. Source: systemd-stub(7), since version 254; load_all_addons, src/boot/stub.c: both folders are
looked for on the partition that the image itself was loaded from, whatever started it.
"""

from __future__ import annotations

import io

from emupmem.boot.signing import Key
from emupmem.model import EmupmemError
from emupmem.record import record
from emupmem.system.distribution import install_hint
from emupmem.system.host import Host
from emupmem.system.pe import read_pe

FOLDER = "loader/addons"
OURS = f"{FOLDER}/emupmem.addon.efi"
"""Below the partition that the images are on."""

STUB = "/usr/lib/systemd/boot/efi/addonx64.efi.stub"
SINCE = 254
"""The first version of systemd-stub that reads addons."""

_END = ".addon.efi"


@record
class Addon:
    """An addon that is there: its file, the words in it. `release` is the only kernel that it is for, empty: all."""

    name: str
    line: str
    release: str = ""


def addons_for(machine: Host, partition: str, image: str) -> list[Addon]:
    """The addons that the stub of an image reads, in its order. Raises EmupmemError."""
    found = []
    for folder in (f"{partition}/{FOLDER}", f"{image}.extra.d"):
        for base in machine.names(folder):
            if base.lower().endswith(_END) and base[0] != "." and base.isascii():
                addon = read_addon(machine, f"{folder}/{base}")
                found += [addon] if addon is not None else []
    return found


def read_addon(machine: Host, name: str) -> Addon | None:
    """An addon with words, None where the stub would pass over the file. Raises EmupmemError."""
    file = machine.pe_file(name)
    if file is None or file.kernel or not file.line:
        return None
    return Addon(name, file.line, file.release)


def addon_line(machine: Host, name: str) -> str:
    """The words of an addon, empty where there is none with words. Raises EmupmemError."""
    found = read_addon(machine, name)
    return found.line if found is not None else ""


def refuse_without_tools(machine: Host) -> None:
    """Raise EmupmemError where no addon can be made."""
    if machine.find("ukify") is None:
        raise EmupmemError(
            "ukify is not installed: it makes the addon that adds words to a unified kernel image",
            install_hint(machine, "ukify"),
        )
    if not machine.exists(STUB):
        raise EmupmemError(
            f"there is no {STUB}: an addon is made of it",
            install_hint(machine, "systemd-stub"),
        )


def made_addon(machine: Host, line: str, key: Key | None) -> bytes:
    """An addon with these words, signed where a key is given. Raises EmupmemError where it does not come out so."""
    refuse_without_tools(machine)
    stub = machine.read(STUB) or b""
    argv = (
        *("ukify", "build", "--config=/dev/null", "--stub={}/stub", f"--cmdline={line}"),
        *(key.words if key is not None else ()),
        "--output={}/addon",
    )
    done, data = machine.made(argv, {"stub": stub}, "addon")
    if done.status:
        raise EmupmemError(f"ukify failed with status {done.status}: {done.last_words}")
    file = read_pe(io.BytesIO(data))
    if file is None or file.kernel or file.line != line or (key is not None and not file.signed):
        raise EmupmemError(
            "ukify did not make the addon that was asked for", "ukify inspect shows such a file"
        )
    return data
