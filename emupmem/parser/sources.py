# SPDX-License-Identifier: Apache-2.0
"""The same data from /sys/firmware/memmap and /proc/iomem."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from emupmem.model import MIB, EmupmemError, FirmwareMap, IomemLine, Kind, MapEntry
from emupmem.parser.grammar import MAX_ADDRESS, pattern, visible

_SYSFS_KINDS = {
    "system ram": Kind.RAM,
    "reserved": Kind.RESERVED,
    "soft reserved": Kind.SOFT_RESERVED,
    "acpi tables": Kind.ACPI_DATA,
    "acpi non-volatile storage": Kind.ACPI_NVS,
    "unusable memory": Kind.UNUSABLE,
    "persistent memory": Kind.PMEM,
    "persistent memory (legacy)": Kind.PRAM,
}


# Other sources -------------------------------------------------------------------------------


def parse_sysfs_memmap(entries: Iterable[tuple[int, str, str, str]]) -> FirmwareMap:
    """Read /sys/firmware/memmap: (N, start, end, type) of each entry, the texts as the files have them.

    Ends are inclusive there. Raises EmupmemError for what is no number, overlaps, or lacks the
    memory below 1 MiB or all RAM. Source: drivers/firmware/memmap.c, e820_type_to_string of e820.c.
    """
    made: list[MapEntry] = []
    for index, start, end, words in sorted(entries):
        try:
            span = int(start, 16), int(end, 16) + 1
        except ValueError:
            shown = f"start {visible(start.strip())!r}, end {visible(end.strip())!r}"
            raise EmupmemError(f"/sys/firmware/memmap/{index} cannot be read: {shown}") from None
        kind = _SYSFS_KINDS.get(words.strip().lower(), Kind.UNKNOWN)
        made.append(MapEntry(*span, kind, words.strip(), index))
    made.sort(key=lambda e: (e.start, e.end))
    for entry in made:
        if not 0 <= entry.start < entry.end <= MAX_ADDRESS:
            raise EmupmemError(f"/sys/firmware/memmap/{entry.line} ends before it begins, or beyond 2^52")
    for last, entry in pairwise(made):
        if entry.start < last.end:
            raise EmupmemError(f"/sys/firmware/memmap/{last.line} and {entry.line} overlap")
    if not made or made[0].start >= MIB or not any(e.kind is Kind.RAM for e in made):
        raise EmupmemError("/sys/firmware/memmap is not complete: the first MiB or all RAM is missing")
    return FirmwareMap(tuple(made), "/sys/firmware/memmap", "sysfs")


def parse_iomem(text: str) -> tuple[IomemLine, ...] | None:
    """Read /proc/iomem: every line, ends made exclusive; None where the kernel hides all addresses.

    Without CAP_SYS_ADMIN every address reads 0 (kernel/resource.c r_show). Raises EmupmemError,
    naming the line, for text that is no /proc/iomem.
    """
    lines: list[IomemLine] = []
    for number, text_line in enumerate(text.splitlines(), 1):
        if not text_line.strip():
            continue
        found = pattern("iomem").fullmatch(text_line)
        if found is None:
            raise EmupmemError(f'line {number} of /proc/iomem is not understood: "{visible(text_line)}"')
        lines.append(IomemLine(len(found[1]) // 2, int(found[2], 16), int(found[3], 16) + 1, found[4]))
    hidden = all(x.start == 0 and x.end == 1 for x in lines)
    return None if lines and hidden else tuple(lines)
