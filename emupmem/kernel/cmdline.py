# SPDX-License-Identifier: Apache-2.0
"""The kernel command line, read and written by the kernel's own rules.

A model of lib/cmdline.c (memparse, next_arg), kernel/params.c (parse_args), arch/x86/kernel/e820.c
(parse_memmap_one, e820__update_table) and arch/x86/boot/compressed/kaslr.c (mem_avoid_memmap) of
Linux 6.12. Pure: text in, values out. Where the kernel goes on in silence after nonsense, so does
the model: what matters is what the machine will do with the words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise

from emupmem.model import (
    GIB,
    KIB,
    MAX_MEMMAP_REGIONS,
    MIB,
    CommandLine,
    EmupmemError,
    Kind,
    MemmapItem,
    Reservation,
    Span,
)

COMMAND_LINE_MAX = 2047
"""Bytes of the command line that an x86 kernel reads (COMMAND_LINE_SIZE less the final NUL)."""

U64 = (1 << 64) - 1
_SUFFIXES = "kmgtpe"
_DIGITS = "0123456789abcdef"

# lib/ctype.c: what isspace() is true for, the Latin-1 no-break space included.
_SPACES = " \t\n\v\f\r\xa0"
_COUNT = r"(?:0[xX][0-9a-fA-F]+|[0-9]+)[KMGTPEkmgtpe]?"
RESERVATION = re.compile(
    rf"{_COUNT}(?:!{_COUNT}|%{_COUNT}-(?:0[xX])?0*1\+(?:0[xX]0*[eE][fF]{{7}}|4026531839))"
)
"""An item that makes a device: type 12 (`!`), or RAM (type 1) changed into soft reserved memory (0xefffffff)."""
_SOFT = "-1+0xefffffff"

WITHOUT_KMEM = "modprobe.blacklist=kmem"
"""Keeps udev from loading kmem, to which the kernel gives soft reserved memory since Linux 6.3. `modprobe kmem` by
name still loads it (modprobe(8), -b)."""

OUR_WORDS = ("nokaslr", WITHOUT_KMEM)
"""Words beside memmap= that apply adds where they are asked for, or needed."""

OPERATORS = {"@": Kind.RAM, "#": Kind.ACPI_DATA, "$": Kind.RESERVED, "!": Kind.PRAM}


# Numbers -------------------------------------------------------------------------------------


def memparse(text: str) -> tuple[int, str]:
    """Read a size as the kernel does: (bytes, what follows it).

    `0x` is hexadecimal, a leading 0 octal, one suffix letter K M G T P E of either case multiplies
    by powers of 1024, and everything wraps at 64 bits. Text that is no number gives (0, text).
    Source: lib/cmdline.c memparse, lib/vsprintf.c simple_strtoull, lib/kstrtox.c.
    """
    value, rest = strtoull(text)
    shift = 10 * (_SUFFIXES.find(rest[0].lower()) + 1) if rest and rest[0].isascii() else 0
    return (value << shift) & U64, rest[1:] if shift else rest


def strtoull(text: str) -> tuple[int, str]:
    """simple_strtoull(text, …, 0): unsigned, no sign, no blanks skipped, wraps at 64 bits."""
    base, at = 10, 0
    if text[:1] == "0":
        # "0x" without a digit after it is the octal number 0, followed by an x.
        hexadecimal = text[1:2] in ("x", "X") and text[2:3] and text[2:3].lower() in _DIGITS
        base, at = (16, 2) if hexadecimal else (8, 0)
    value = 0
    while at < len(text) and 0 <= _DIGITS.find(text[at].lower()) < base:
        value = (value * base + int(text[at], 16)) & U64
        at += 1
    return value, text[at:]


def format_size(size: int) -> str:
    """Write a size for a kernel argument: a whole number with the largest exact unit up to G.

    `size` is bytes, 0 < size < 2^64. Decimals, `GB` and leading zeros do not exist here: the kernel
    would read another number. Raises EmupmemError for what cannot be said, or would not be read back.
    """
    if not 0 < size <= U64:
        raise EmupmemError(f"{size} bytes cannot be a size on the kernel command line")
    unit, letter = next(((u, c) for u, c in ((GIB, "G"), (MIB, "M"), (KIB, "K")) if size % u == 0), (1, ""))
    text = f"{size // unit}{letter}"
    if memparse(text) != (size, ""):
        raise EmupmemError(f"{size} bytes would not be read back from {text}")
    return text


def format_item(kept: Reservation) -> str:
    """Write one reservation: `1G!4G`, or `1G%4G-1+0xefffffff` for the kinds that are soft reserved."""
    sign, change = ("%", _SOFT) if kept.kind.soft else ("!", "")
    return f"{format_size(kept.size)}{sign}{format_size(kept.start)}{change}"


def format_memmap(reservations: Iterable[Reservation]) -> str:
    """Write reservations as one `memmap=ITEM,…` argument.

    One argument and not several: kaslr.c neither avoids nor flags a fifth separate `memmap=`.
    The text is read back through the model before it is returned; raises EmupmemError where the
    kernel would not read exactly these ranges, and for ranges that are empty or overlap.
    """
    wanted = list(reservations)
    if not wanted:
        raise EmupmemError("a memmap= argument needs at least one reservation")
    spans = sorted(Span(r.start, r.end) for r in wanted)
    if any(b.start < a.end for a, b in pairwise(spans)) or spans[-1].end > U64:
        raise EmupmemError("reservations overlap or reach beyond 64 bits")
    text = "memmap=" + ",".join(map(format_item, wanted))
    read = parse_command_line(text).reservations
    if [(i.soft, i.size, i.start) for i in read] != [(r.kind.soft, r.size, r.start) for r in wanted]:
        raise EmupmemError(f"the kernel would not read {text[:100]} as it is meant")
    return text


# Words ---------------------------------------------------------------------------------------


@lru_cache(maxsize=64)  # asked the same again and again
def parse_command_line(text: str) -> CommandLine:
    """Read a kernel command line as the kernel does, up to its 2047th byte and to a word `--`.

    `words` have the quotes removed that the kernel removes. Other items are read in the units of
    `CommandLine`. Never raises: what the kernel ignores is not in the result.
    Source: init/main.c do_early_param, lib/cmdline.c next_arg, arch/x86/kernel/e820.c.
    """
    words: list[str] = []
    items: list[MemmapItem] = []
    limits: list[int] = []
    crashkernel: list[str] = []
    huge: list[tuple[str, str]] = []
    fake: list[Span] = []
    for name, value in parameters(text):
        words.append(name if value is None else f"{name}={value}")
        # parameq() takes - and _ for the same, kernel/params.c
        key = name.replace("-", "_")
        if value is None:
            continue
        if key == "memmap":
            items += parse_memmap_value(value)
        elif key == "mem":
            limits += mem_limit(value)
        elif key == "crashkernel":
            crashkernel.append(value)
        elif key == "efi_fake_mem":
            fake += _fake_mem(value)
        elif key in ("hugepages", "hugepagesz", "default_hugepagesz"):
            huge.append((key, value))
    return CommandLine(
        text=text,
        words=tuple(words),
        items=tuple(items),
        mem_limits=tuple(limits),
        crashkernel=tuple(crashkernel),
        hugepages=_huge_bytes(huge),
        hugepages_text=" ".join(f"{key}={value}" for key, value in huge),
        nokaslr=_has_bare_word(text, "nokaslr"),
        fake_mem=tuple(fake),
    )


def mangled(line: CommandLine) -> str:
    """The first `memmap=` item that the kernel takes for a memory limit and nobody meant so, empty where all are well.

    A limit that is meant is a bare number: `1G\\!4G`, `1GiB!4G`, `1.5G!4G` and `64Kx18690000` (of which GRUB ate the
    `$0`) are not.
    """
    return next((i.text for i in line.items if i.op == "limit" and memparse(i.text)[1]), "")


def half_written(line: CommandLine) -> MemmapItem | None:
    """The first `memmap=` item of persistent memory that is not a whole one: `4G!` (at 0), `1G!4Gx`; None without.

    The kernel takes it all the same, and emupmem neither made it nor takes it away.
    """
    return next((i for i in line.items if i.op == "!" and not RESERVATION.fullmatch(i.text)), None)


def is_cut(text: str) -> bool:
    """Whether the kernel reads only a part of this command line, for it is longer than 2047 bytes."""
    return len(text.rstrip("\n").encode("utf-8", "surrogateescape")) > COMMAND_LINE_MAX


def _seen(text: str) -> str:
    """The bytes that the kernel reads, as Latin-1 characters: its quoting and blanks are of bytes."""
    raw = text.encode("utf-8", "surrogateescape")[:COMMAND_LINE_MAX]
    return raw.split(b"\0", 1)[0].decode("latin-1")


def _back(text: str) -> str:
    return text if text.isascii() else text.encode("latin-1").decode("utf-8", "surrogateescape")


def parameters(text: str) -> Iterator[tuple[str, str | None]]:
    """(name, value or None) of each parameter up to `--`. Source: parse_args of kernel/params.c."""
    rest = _seen(text).lstrip(_SPACES)
    at = 0
    while at < len(rest):
        name, value, at = _next_arg(rest, at)
        if value is None and name == "--":
            return
        yield _back(name), None if value is None else _back(value)


def _next_arg(text: str, at: int) -> tuple[str, str | None, int]:
    """next_arg() of lib/cmdline.c, to the letter: (name, value, where the next one begins)."""
    quoted = in_quote = text[at] == '"'
    start = at + quoted
    end, equals = start, 0
    while end < len(text) and (in_quote or text[end] not in _SPACES):
        if text[end] == "=" and equals == 0:
            equals = end - start  # stays 0 for a leading =, as in the kernel
        if text[end] == '"':
            in_quote = not in_quote
        end += 1
    word = text[start:end]
    value = word[equals + 1 :] if equals else None
    name = word[:equals] if equals else word
    if value is not None and value[:1] == '"':
        value = value[1:]
        if word[-1] == '"':
            value = value[:-1]
            quoted = False  # this quote is taken off already
    if quoted and word[-1:] == '"':
        name, value = (name, value[:-1]) if value is not None else (name[:-1], None)
    end += 1
    while end < len(text) and text[end] in _SPACES:
        end += 1
    return name, value, end


def _has_bare_word(text: str, word: str) -> bool:
    """cmdline_find_option_bool() of arch/x86/boot/cmdline.c: knows neither quotes nor `--`."""
    seen = "".join(c if c > " " else " " for c in _seen(text))
    return word in seen.split(" ")


# memmap= -------------------------------------------------------------------------------------


def parse_memmap_value(value: str) -> tuple[MemmapItem, ...]:
    """Read the value of a `memmap=` parameter: the items that have an effect, in order.

    Whatever follows a size and is none of `@ # $ ! %` makes the item a memory limit; text that does
    not begin with a number is ignored, as is junk after the second number of an item.
    Source: parse_memmap_opt and parse_memmap_one of arch/x86/kernel/e820.c.
    """
    return tuple(i for i in map(_memmap_item, value.split(",")) if i is not None)


def _memmap_item(text: str) -> MemmapItem | None:
    if text.startswith("exactmap"):
        return MemmapItem("exactmap", 0, 0, text)
    size, rest = memparse(text)
    if rest == text:
        return None
    if rest[:1] in OPERATORS or rest[:1] == "%":
        soft = rest[0] == "%" and RESERVATION.fullmatch(text) is not None
        return MemmapItem(rest[0], size, memparse(rest[1:])[0], text, soft)
    return MemmapItem("limit", size, 0, text)


def items_meant(present: Sequence[str], typed: Iterable[str]) -> list[str]:
    """The items of `present` that a person means by `1G!4G,1G!5G`, `memmap=1024M!4096M` or `0x100000000-0x13fffffff`.

    `1G%4G` means the soft reserved range, whatever follows it.

    What is none of them comes back as it was typed.
    """
    known = {_ranges_of(item): item for item in present}
    words = [part for word in typed for part in word.replace("\\", "").removeprefix("memmap=").split(",")]
    return [word if word in present else known.get(_ranges_of(word), word) for word in words]


def _ranges_of(item: str) -> tuple[int, int]:
    """(start, end) of a reservation, however it is written; two zeros for what is none."""
    first, dash, last = item.partition("-")
    if dash and first[:2] == last[:2] == "0x":
        return strtoull(first)[0], strtoull(last)[0] + 1
    read = [i for i in parse_memmap_value(item) if i.op in "!%"]
    return (read[0].start, read[0].start + read[0].size) if read else (0, 0)


def mem_limit(value: str) -> list[int]:
    """The limit that `mem=` sets: none for nopentium and 0 (parse_memopt of e820.c)."""
    size = memparse(value)[0]
    return [size] if size and value != "nopentium" else []


def _fake_mem(value: str) -> list[Span]:
    """The ranges of `efi_fake_mem=SIZE@START:ATTRIBUTE,…` (setup_fake_mem of drivers/firmware/efi/fake_mem.c)."""
    spans = []
    for item in value.split(","):
        size, rest = memparse(item)
        if size and rest[:1] == "@":
            start = memparse(rest[1:])[0]
            spans.append(Span(start, start + size))
    return spans


def memmap_region_count(line: CommandLine) -> int:
    """How many of the kernel's 4 slots for ranges that address randomisation avoids are asked for.

    Items with `!`, `#` or `$` and a start above 0 take one each (parse_memmap of
    arch/x86/boot/compressed/kaslr.c); `@`, `%`, limits and exactmap take none.
    """
    return sum(1 for i in line.items if i.op in ("!", "#", "$") and i.start)


def kaslr_avoided(line: CommandLine) -> tuple[tuple[Span, ...], bool]:
    """What kaslr.c keeps the kernel clear of: (ranges in bytes, whether it gives up randomising).

    It gives up where a `memmap=` list goes on after the fourth range. A fifth range in a parameter
    of its own is neither avoided nor noticed: that is the kernel's bug and the reason for one list.
    Source: mem_avoid_memmap and handle_mem_options of arch/x86/boot/compressed/kaslr.c.
    """
    spans: list[Span] = []
    too_many = False
    for name, value in parameters(line.text):
        if name != "memmap" or value is None or len(spans) >= MAX_MEMMAP_REGIONS:
            continue
        left = value.split(",")
        while left and len(spans) < MAX_MEMMAP_REGIONS:
            item = _memmap_item(left[0])
            if item is None or item.op == "exactmap":
                break  # the rest of this list is not looked at
            del left[0]
            if item.op in ("!", "#", "$") and item.start:
                spans.append(Span(item.start, item.start + item.size))
        too_many = too_many or (len(spans) >= MAX_MEMMAP_REGIONS and bool(left))
    return tuple(spans), too_many


def kaslr_limit(line: CommandLine) -> int:
    """The address below which kaslr.c keeps the kernel: the smallest size that has no start for it, or of mem=.

    A `%` item is one: its size is taken for a limit of the memory, and its range is not kept clear of.
    Source: mem_avoid_memmap, parse_memmap and handle_mem_options of arch/x86/boot/compressed/kaslr.c.
    """
    sizes = [
        i.size for i in line.items if i.size and (i.op in ("%", "limit") or (i.op in "!#$" and not i.start))
    ]
    return min((*sizes, *line.mem_limits), default=1 << 64)


# hugepages= ----------------------------------------------------------------------------------


def _huge_bytes(words: Sequence[tuple[str, str]]) -> int:
    """Bytes that the huge page parameters ask for (mm/hugetlb.c: the *_setup functions, 6.12)."""
    default, size, valid = 2 * MIB, 0, True  # size 0: the default one, whichever it becomes
    counts: dict[int, int] = {}
    known: set[int] = set()
    default_given = False
    last: int | None = None
    for key, value in words:
        if key == "hugepages":
            if valid and size != last:
                counts[size] = _huge_count(value)
                last = size
            valid = True
            continue
        asked = memparse(value)[0]
        valid = asked in (2 * MIB, GIB)  # arch_hugetlb_valid_size() of x86-64
        if key == "default_hugepagesz":
            valid = valid and not default_given
            if valid:
                default, default_given = asked, True
        elif asked in known and not (default_given and asked == default and not counts.get(asked)):
            valid = False  # "specified twice, ignoring"
        if valid:
            size = asked
            known.add(asked)
    if 0 in counts:
        counts.setdefault(default, counts[0])
    return sum(size * count for size, count in counts.items())


def _huge_count(value: str) -> int:
    """`N`, or `node:N,node:N`: the sum over the nodes (hugepages_setup of mm/hugetlb.c)."""
    total = 0
    for part in value.split(","):
        number = _leading_decimal(part.split(":", 1)[-1])
        if ":" not in part:
            return total or number
        total += number
    return total


def _leading_decimal(text: str) -> int:
    """sscanf("%lu") without signs."""
    digits = text[: len(text) - len(text.lstrip("0123456789"))]
    return int(digits) & U64 if digits else 0
