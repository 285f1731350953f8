# SPDX-License-Identifier: Apache-2.0
"""Plain files of a tar archive that anybody may have made, read from a stream; nothing else of tar. Pure.

Python's tarfile knows every dialect, and trusts what it reads: a chain of headers ends in a RecursionError,
a header of digits in hours of work (CVE-2024-6232, which stable distributions still have), and a broken
header ends an archive in silence. What `emupmem collect` writes needs two kinds of headers (POSIX.1-2001 pax:
https://pubs.opengroup.org/onlinepubs/9699919799/utilities/pax.html), and everything else is refused here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from emupmem.record import record

BLOCK = 512
_LONGEST_HEADER = 64 * 1024
_FILE = (b"0", b"\0")


class BadTarError(Exception):
    """This is no tar archive, or not one that was written to its end."""


@record
class Member:
    """A member before its content: `plain` is False for links, folders, devices and unknown dialects."""

    name: str
    size: int
    plain: bool


Read = Callable[[int], bytes]


def members(read: Read) -> Iterator[tuple[Member, Callable[[], bytes]]]:
    """Each member, and a function that gives its content; what is not asked for must not follow.

    `read(n)` gives up to n bytes, fewer only at the end. Raises BadTarError.
    """
    extended: dict[str, str] = {}
    while (block := _exactly(read, BLOCK)) != bytes(BLOCK):
        kind, size = block[156:157], _octal(block[124:136])
        if _octal(block[148:156]) != sum(block[:148]) + 8 * ord(" ") + sum(block[156:]):
            raise BadTarError("a header has a wrong checksum")
        if kind == b"x" and not extended:
            if size > _LONGEST_HEADER:
                raise BadTarError("a header is too long")
            extended = _records(_content(read, size))
            continue
        if "size" in extended:
            raise BadTarError("a header contradicts the size")
        name = extended.get("path", _name(block))
        plain = kind in _FILE and not any(key.startswith("GNU.sparse") for key in extended)
        extended = {}
        yield Member(name, size, plain), lambda size=size: _content(read, size)  # type: ignore[misc]
    if extended:
        raise BadTarError("a header without a member")


def _exactly(read: Read, size: int) -> bytes:
    data = read(size)
    if len(data) != size:
        raise BadTarError("it ends too early")
    return data


def _content(read: Read, size: int) -> bytes:
    data = _exactly(read, size)
    _exactly(read, -size % BLOCK)
    return data


def _octal(field: bytes) -> int:
    digits = field.strip(b" \0")
    if not digits or not set(digits) <= set(b"01234567"):
        raise BadTarError("a header has a number that is none")
    return int(digits, 8)


def _name(block: bytes) -> str:
    name, prefix = (part.partition(b"\0")[0] for part in (block[:100], block[345:500]))
    if block[257:263] == b"ustar\0" and prefix:
        name = prefix + b"/" + name
    return name.decode("utf-8", "surrogateescape")


def _records(data: bytes) -> dict[str, str]:
    """The `LENGTH KEY=VALUE` lines of a pax header."""
    found: dict[str, str] = {}
    at = 0
    while at < len(data):
        digits = data[at : at + 8].partition(b" ")[0]
        length = int(digits) if digits.isdigit() and len(digits) < 8 else 0
        key, equals, value = data[at + len(digits) + 1 : at + length].partition(b"=")
        if not equals or at + length > len(data) or not value.endswith(b"\n"):
            raise BadTarError("a header is not understood")
        found[key.decode("utf-8", "surrogateescape")] = value[:-1].decode("utf-8", "surrogateescape")
        at += length
    return found
