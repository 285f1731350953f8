# SPDX-License-Identifier: Apache-2.0
"""Finding the few lines that matter in a long text, at the speed of a search."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO

from emupmem.parser.reader import LogReader

PIECE = 256 << 10

# Every boot prints the first and the last; the second is the beginning of a map without its header.
# Long phrases, because bytes.find skips by their length: these cost less than one short one.
ASLEEP = (
    b"BIOS-provided physical RAM map:",
    b"[mem 0x0000000000000000-0x0000",
    b"Inode-cache hash table entries:",
)
_PHRASES = (
    b"BIOS-",
    b"physical RAM map:",
    b"Linux version ",
    b"ommand line:",
    b"[mem 0x0000000",
    b" - 0000000",
    b"SRAT: Node ",
    b"misaligned, unable to map",
    b"failed with error -95",
    b".data .bss are not marked",
    b"table full; ignoring",
    b"too many entries; ignoring",
    b"legacy persistent memory ranges",
    b"e820: update [mem",
    b"e820: remove [mem",
    b"e820 update range:",
    b"e820 remove range:",
    b"MTRRs don't cover all",
    b"update e820 for mtrr",
    b"bad mem addr ",
    b"Memory failure: 0x",
    b"MCE 0x",
    b"Soft-offlining pfn: 0x",
    b"soft offline: 0x",
    b"Reserving Intel graphics ",
    b"Memory Encryption Features active",
    b"tdx: Guest detected",
    b" mirrored memory",
    b"devm_memremap_pages attempted",
    b"Conflicting mapping in same section",
)


def regions_of_interest(stream: IO[str] | IO[bytes]) -> Iterator[tuple[bytearray, int]]:
    """(buffer, bytes in it) again and again: whole lines, but for those that are too long to wait for.

    A region is overwritten when the next but one is asked for.
    """
    buffer, other = bytearray(PIECE), bytearray(PIECE)
    have, ended = 0, False
    while not ended:
        have, ended = _fill(stream, buffer, have)
        end = have if ended else buffer.rfind(b"\n", 0, have) + 1
        if not end:
            # A line without an end in sight: cut it behind a NUL, if it has one (see _shortened).
            end = buffer.rfind(b"\0", 0, have) + 1 or have
        if end:
            yield buffer, end
        other[: have - end] = buffer[end:have]
        have -= end
        buffer, other = other, buffer


def _fill(stream: IO[str] | IO[bytes], buffer: bytearray, have: int) -> tuple[int, bool]:
    """Read until the buffer is full or the stream ends: (bytes in the buffer, whether it ended)."""
    into = getattr(stream, "readinto", None)
    with memoryview(buffer) as view:
        while have + 4 <= PIECE:
            if into is not None:
                got = into(view[have:]) or 0
            else:
                piece = encoded(stream.read((PIECE - have) // 4))  # UTF-8 has up to 4 bytes for each
                got = len(piece)
                view[have : have + got] = piece
            if not got:
                return have, True
            have += got
    return have, False


def encoded(piece: str | bytes) -> bytes:
    return piece.encode("utf-8", "replace") if isinstance(piece, str) else piece


def scan(region: bytearray, size: int, number: int, reader: LogReader) -> None:
    """Hand the lines to the reader that hold one of the phrases, and those that it watches."""
    at = counted = 0
    nexts = [_find(region, phrase, 0, size) for phrase in _PHRASES]
    while at < size:
        start = at
        if reader.watch <= 0:
            nearest = min(nexts)
            if nearest == size:
                return
            start = max(at, region.rfind(b"\n", at, nearest) + 1)
        end = _find(region, b"\n", start, size)
        number += region.count(b"\n", counted, start)
        counted = start
        reader.take(number, region[start:end])
        if reader.enough:
            return
        at = end + 1
        for i, place in enumerate(nexts):
            if place < at:
                nexts[i] = _find(region, _PHRASES[i], at, size)


def _find(region: bytearray, phrase: bytes, at: int, size: int) -> int:
    found = region.find(phrase, at, size)
    return size if found < 0 else found
