# SPDX-License-Identifier: Apache-2.0
"""PE files for tests, as small as they can be: EFI kernels, unified images, addons, and what is damaged."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from tests.scenario import kernel

AT = 0x400
"""Where the PE header begins: behind all that a kernel's own header has."""


def program(sections: Sequence[tuple[str, bytes]], head: bytes = b"", signed: bool = False) -> bytes:
    """An EFI program with these sections, as ukify lays them out; `head` is what its first bytes hold besides."""
    optional = struct.pack("<H22xQII", 0x20B, 0x140000000, 0x1000, 0x200).ljust(56, b"\0")
    optional += struct.pack("<II", 0x100000, 0x1000)  # size of the image, of the headers
    optional = optional.ljust(108, b"\0") + struct.pack("<I", 16)
    optional += b"".join(struct.pack("<II", 0x2000, 8) if signed and n == 4 else bytes(8) for n in range(16))
    data = bytearray(head.ljust(0x2000, b"\0"))
    data[0:2] = b"MZ"
    struct.pack_into("<I", data, 0x3C, AT)
    table = (
        struct.pack("<4sHHIIIHH", b"PE\0\0", 0x8664, len(sections), 0, 0, 0, len(optional), 0x2022) + optional
    )
    memory, where, bodies = 0x2000, len(data), b""
    for name, body in sections:
        raw = body.ljust(-(-len(body) // 0x200) * 0x200, b"\0")
        table += struct.pack(
            "<8sIIIIIIHHI", name.encode(), len(body), memory, len(raw), where, 0, 0, 0, 0, 0x40000040
        )
        memory += -(-max(1, len(raw)) // 0x1000) * 0x1000
        where += len(raw)
        bodies += raw
    data[AT : AT + len(table)] = table
    return bytes(data[:0x2000]) + bodies


def efi_kernel(release: str) -> bytes:
    """A kernel that is an EFI program as well, by its headers alone."""
    return program([(".text", b"\x90" * 16)], kernel.image(release))


def unified(
    release: str, line: str, stub: str = "systemd-stub 257.9-1", more: Sequence[tuple[str, bytes]] = ()
) -> bytes:
    """A unified kernel image."""
    sections = [
        (".text", b"\x90" * 16),
        (".sdmagic", f"#### LoaderInfo: {stub} ####\0".encode()),
        (".osrel", b"ID=debian\n"),
        (".cmdline", line.encode()),
        (".uname", release.encode()),
        *more,
        (".linux", efi_kernel(release)),
    ]
    return program(sections)


def addon(line: str, signed: bool = False, more: Sequence[tuple[str, bytes]] = ()) -> bytes:
    """A command-line addon."""
    sections = [(".text", b"\x90"), (".sdmagic", b"#### LoaderInfo: systemd-addon 257.9-1 ####\0")]
    return program([*sections, (".cmdline", line.encode()), *more], signed=signed)
