# SPDX-License-Identifier: Apache-2.0
"""Sizes between people and bytes. What the kernel can read is `cmdline.format_size`'s business."""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache

from emupmem.model import GIB, KIB, MIB, TIB, EmupmemError

_UNITS = {"": 1, "K": KIB, "M": MIB, "G": GIB, "T": TIB}
_NAMES = ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB"))
_LONGEST = 40  # letters of a size: more digits than any address has
_NUMBER = re.compile(r"[0-9]+\.?[0-9]*|\.[0-9]+")
_LONG_NUMBER = re.compile(r"(?:[1-9][0-9]*|0[xX][1-9a-fA-F][0-9a-fA-F]*)(?:[KMGTkmgt]i?[Bb]?)?")
_MOST = 1 << 52  # physical addresses of x86-64 have at most 52 bits


def parse_size(text: str, what: str = "size") -> int:
    """Bytes that a person means by `16G`, `16GiB`, `16Gi`, `0.5g`, `4096` or `0x100000000`.

    Raises EmupmemError for decimal units (`GB`), signs, fractions of a byte and anything past 2^52.
    """
    word = text.strip()
    hint = "write a whole number with a binary unit, as in 512M or 16G"
    if what == "offset":
        hint = "write an address, as 8G or 0x200000000"
    shown = repr(text) if len(text) <= 60 else f"{text[:59]!r}…"
    if len(word) > _LONGEST:
        large = _LONG_NUMBER.fullmatch(word)
        raise EmupmemError(
            f"{what} {shown} is {'more than any machine can address' if large else 'not a size'}", hint
        )
    if re.fullmatch("0[xX][0-9a-fA-F]+", word):
        number, unit = Fraction(int(word, 16)), ""
    else:
        digits = word.rstrip("KMGTIBkmgtib")
        unit = word[len(digits) :].upper()
        digits = digits.strip()
        if not _NUMBER.fullmatch(digits):
            raise EmupmemError(f"{what} {shown} is not a size", hint)
        if unit in ("KB", "MB", "GB", "TB"):
            raise EmupmemError(
                f"{what} {shown} is in decimal units, memory is not",
                f"for binary units write {digits}{unit[0]}",
            )
        unit = unit.removesuffix("B") if unit == "B" or len(unit) == 3 else unit
        unit = unit.removesuffix("I") if len(unit) == 2 else unit
        if unit not in _UNITS:
            raise EmupmemError(f"{what} {shown} is not a size", hint)
        number = Fraction(digits.removesuffix("."))
    size = number * _UNITS[unit]
    if size > _MOST:
        raise EmupmemError(f"{what} {shown} is more than any machine can address", hint)
    if size.denominator != 1:
        raise EmupmemError(f"{what} {shown} is not a whole number of bytes", _nearest(size))
    return int(size)


def _nearest(size: Fraction) -> str:
    step = next((s for s in (2 * MIB, KIB) if size >= s), 1)
    below = int(size // step) * step
    return f"the nearest sizes are {tight(below)} and {tight(below + step)}"


@lru_cache(1024)
def human(size: int) -> str:
    """`16 GiB`, `2.9 GiB`, `512 MiB`: one digit after the point, cut and never rounded up."""
    for unit, name in _NAMES:
        if abs(size) >= unit:
            if size % unit == 0:
                return f"{size // unit} {name}"
            tenths = abs(size) * 10 // unit
            return f"{'-' if size < 0 else ''}{tenths // 10}.{tenths % 10} {name}"
    return f"{size} B"


def tight(size: int) -> str:
    """`16G`, `1536M`: the shortest exact form, as users type it."""
    for unit, letter in ((GIB, "G"), (MIB, "M"), (KIB, "K")):
        if size and size % unit == 0:
            return f"{size // unit}{letter}"
    return str(size)


def address(value: int) -> str:
    """An address in hexadecimal, at least nine digits wide so that columns line up."""
    return f"0x{value:09x}"


def span_text(start: int, end: int) -> str:
    """A range as the kernel prints it: both ends in hexadecimal, the last byte included."""
    return f"{address(start)}-{address(end - 1)}"


_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def plain(text: str) -> str:
    """Text for a terminal: what could drive it, turn its order round or not be printed at all is made visible."""
    return _UNSEEN.sub(_visible, text)


def _visible(found: re.Match[str]) -> str:
    number = ord(found[0])
    if 0xDC80 <= number <= 0xDCFF:
        number -= 0xDC00  # a byte that is no UTF-8
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"


def multiples_near(size: int, step: int) -> str:
    """The multiples of a step (bytes) around a size, for a hint: `2M or 4M`."""
    lower = size // step * step
    return f"{tight(lower)} or {tight(lower + step)}" if lower else tight(lower + step)
