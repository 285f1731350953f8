# SPDX-License-Identifier: Apache-2.0
"""PE files, which EFI programs are: the texts in a unified kernel image or in an addon to one. Bounded.

Source: the PE format of Microsoft's; systemd's src/boot/pe.c and src/fundamental/uki.c for the sections of an image.
Of an image of 100 MiB only the headers and some short texts are read.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import BinaryIO

from emupmem.record import record

TEXTS = (".cmdline", ".uname", ".osrel", ".sdmagic")
"""The sections that are read, where they are there."""

MOST_SECTIONS = 256
LARGEST_TEXT = 64 << 10
_HEADERS = 64 << 10
"""Where the headers end at the latest; those of real images end within 4 KiB."""

_TOLD = "PE"

_SECTION = struct.Struct("<8sIIII16x")
_CERTIFICATES = 4
"""The number of the data directory that holds signatures."""


@record
class PeFile:
    """What is in such a file: `texts` by section, where a kernel begins in it (0: none), whether it is `signed`."""

    texts: Mapping[str, str]
    kernel: int
    signed: bool

    @property
    def shown(self) -> str:
        """The texts as lines, from which `told_pe` makes the same again."""
        marks = [f"{_TOLD} {int(bool(self.kernel))} {int(self.signed)}"]
        texts = [f"{name} {x}" for name, text in self.texts.items() for x in text.split("\n")]
        return "\n".join([*marks, *texts, ""])

    @property
    def line(self) -> str:
        """The command line in it, as systemd-stub takes it: without blanks at its ends, and others as one space."""
        text = self.texts.get(".cmdline", "")
        return "".join(" " if c <= " " else c for c in text).strip()

    @property
    def release(self) -> str:
        """The kernel's release, empty where the file does not tell it."""
        return self.texts.get(".uname", "").strip()

    @property
    def maker(self) -> str:
        """The program that it was made around and its version (`systemd-stub 257.9`), empty where it does not tell."""
        head, _, rest = self.texts.get(".sdmagic", "").partition("#### LoaderInfo: ")
        return "" if head.strip() else rest.partition(" ####")[0].strip()


def read_pe(file: BinaryIO) -> PeFile | None:
    """What is in an open file, None where it is no PE file or is damaged. Raises OSError."""
    head = file.read(_HEADERS)
    try:
        return _read(file, head)
    except struct.error:
        return None


def told_pe(text: str) -> PeFile | None:
    """What `shown` told of a file, None where it is no such text."""
    head, *lines = text.strip("\n").split("\n")
    words = head.split(" ")
    if words[0] != _TOLD or len(words) != 3:
        return None
    texts: dict[str, str] = {}
    for name, _, part in (line.partition(" ") for line in lines):
        texts[name] = f"{texts[name]}\n{part}" if name in texts else part
    return PeFile(texts, int(words[1] == "1"), words[2] == "1")


def _read(file: BinaryIO, head: bytes) -> PeFile | None:
    (at,) = struct.unpack_from("<I", head, 0x3C)
    if head[:2] != b"MZ" or head[at : at + 4] != b"PE\0\0":
        return None
    count, size = struct.unpack_from("<2xH12xH", head, at + 4)
    table = at + 24 + size
    if count > MOST_SECTIONS or table + count * _SECTION.size > len(head):
        return None
    texts: dict[str, str] = {}
    kernel = 0
    for name, where, length in _sections(head, table, count):
        if name in TEXTS:
            text = _text(file, where, length)
            if text is None:
                return None
            texts[name] = text
        kernel = where if name == ".linux" else kernel
    return PeFile(texts, kernel, _has_signature(head, at + 24, size))


def _sections(head: bytes, table: int, count: int) -> Iterator[tuple[str, int, int]]:
    """(name, offset, bytes) of the sections of the base and of the first profile, which may replace those.

    Of several with one name the first counts. Each `.profile` begins the next one.
    """
    found: dict[str, tuple[int, int]] = {}
    profile, here = -1, set[str]()
    for number in range(count):
        raw, memory, _, size, where = _SECTION.unpack_from(head, table + number * _SECTION.size)
        name = raw.rstrip(b"\0").decode("ascii", "replace")
        if name == ".profile":
            profile, here = profile + 1, set()
        elif profile < 1 and name not in here:
            found[name] = (where, min(memory, size))
            here.add(name)
    yield from ((name, *place) for name, place in found.items())


def _text(file: BinaryIO, where: int, length: int) -> str | None:
    """The text of a section, None where the file ends before it or it is too long for one."""
    if length > LARGEST_TEXT:
        return None
    file.seek(where)
    data = file.read(length)
    return data.partition(b"\0")[0].decode("utf-8", "surrogateescape") if len(data) == length else None


def _has_signature(head: bytes, optional: int, size: int) -> bool:
    """Whether the directory of certificates is filled in."""
    (magic,) = struct.unpack_from("<H", head, optional)
    first = {0x10B: 96, 0x20B: 112}.get(magic, 0)
    (count,) = struct.unpack_from("<I", head, optional + first - 4) if first else (0,)
    end = first + (_CERTIFICATES + 1) * 8
    if count <= _CERTIFICATES or end > size:
        return False
    where, length = struct.unpack_from("<II", head, optional + end - 8)
    return bool(where and length)
