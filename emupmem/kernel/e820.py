# SPDX-License-Identifier: Apache-2.0
"""What the kernel makes of a memory map when it reads `memmap=` (arch/x86/kernel/e820.c)."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from itertools import pairwise

from emupmem.kernel.cmdline import (
    OPERATORS,
    U64,
    mem_limit,
    memparse,
    parameters,
    parse_memmap_value,
    strtoull,
)
from emupmem.model import CommandLine, EmupmemError, FirmwareMap, Kind, MapEntry, MemmapItem

# E820_TYPE_* of arch/x86/include/asm/e820/types.h: where ranges overlap the highest number wins.
_TYPE_NUMBERS = {
    Kind.RAM: 1,
    Kind.RESERVED: 2,
    Kind.ACPI_DATA: 3,
    Kind.ACPI_NVS: 4,
    Kind.UNUSABLE: 5,
    Kind.PMEM: 7,
    Kind.PRAM: 12,
    Kind.SOFT_RESERVED: 0xEFFFFFFF,
}
_KINDS = {number: kind for kind, number in _TYPE_NUMBERS.items()}
PRAM_TYPE = _TYPE_NUMBERS[Kind.PRAM]
SOFT_TYPE = _TYPE_NUMBERS[Kind.SOFT_RESERVED]
_NEVER_JOINED = (PRAM_TYPE, SOFT_TYPE)

Row = tuple[int, int, int]
"""(start, end, type number) of a range of the map."""


# The map after the command line ----------------------------------------------------------------


class _Table:
    """The e820 table while the early parameters are read: rows of [start, size, type]."""

    def __init__(self, entries: Sequence[MapEntry]) -> None:
        self.rows = [[e.start, e.size, _number(e)] for e in entries]
        self.names = {_number(e): e.words for e in entries}

    def add(self, start: int, size: int, number: int) -> None:
        self.rows.append([start, size, number])

    def change(self, start: int, size: int, old: int, new: int) -> None:
        """e820__range_update and e820__range_remove: `old` 0 is any type, `new` 0 takes it out."""
        end = min(start + size, U64)
        at = 0
        while at < len(self.rows):  # rows that are added on the way are looked at as well
            row = self.rows[at]
            at += 1
            row_start, row_end = row[0], row[0] + row[1]
            if old and row[2] != old:
                continue
            if row_start >= start and row_end <= end:
                row[:] = [row_start, row[1], new] if new else [0, 0, 0]
                continue
            first, last = max(start, row_start), min(end, row_end)
            if first >= last:
                continue
            if new:
                self.add(first, last - first, new)
            if row_start < first and last < row_end:
                self.add(last, row_end - last, row[2])
                row[1] = first - row_start
            elif row_start < first:
                row[1] = first - row_start
            else:
                row[:] = [last, row_end - last, row[2]]

    def settled(self) -> list[Row]:
        """e820__update_table: sorted, the highest type wins, neighbours of a type joined (not type 12)."""
        made: list[Row] = []
        for row in _highest([(r[0], r[0] + r[1], r[2]) for r in self.rows if r[1]]):
            last = made[-1] if made else (0, 0, 0)
            if row[2] and last[1] == row[0] and last[2] == row[2] and row[2] not in _NEVER_JOINED:
                made[-1] = (last[0], row[1], row[2])
            elif row[2]:
                made.append(row)
        return made


def _highest(rows: list[Row]) -> Iterator[Row]:
    """(start, end, highest number) between all borders of the rows, gaps left out."""
    rows.sort()
    group: list[Row] = []  # rows that overlap
    reach = -1
    for row in rows:
        if group and row[0] >= reach:
            yield from _highest_of(group)
            group = []
        group.append(row)
        reach = max(reach, row[1])
    yield from _highest_of(group)


def _highest_of(rows: Sequence[Row]) -> Iterator[Row]:
    if len(rows) == 1:
        yield from rows
        return
    edges = sorted({edge for row in rows for edge in row[:2]})
    covering: list[tuple[int, int]] = []  # a heap: (minus the number, end)
    at = 0
    for low, high in pairwise(edges):
        while at < len(rows) and rows[at][0] <= low:
            heapq.heappush(covering, (-rows[at][2], rows[at][1]))
            at += 1
        while covering and covering[0][1] <= low:
            heapq.heappop(covering)
        if covering:
            yield low, high, -covering[0][0]


def apply_memmap(
    firmware: FirmwareMap, line: CommandLine, more: Sequence[MemmapItem] = ()
) -> tuple[MapEntry, ...]:
    """What the kernel's map will be once it has read the command line: the model of its `user:` lines.

    `more` are items that will stand behind the others.

    Raises EmupmemError where the kernel would stop: fewer than two ranges left, a range beyond 64
    bits, or a `%` item that changes a type into itself.
    Source: e820__finish_early_params, parse_memmap_one, e820__update_table of arch/x86/kernel/e820.c.
    """
    table = _read(firmware, line, more)
    made = []
    for low, high, number in table.settled():
        kind = _KINDS.get(number, Kind.UNKNOWN)
        default = f"type {number}" if kind is Kind.UNKNOWN else kind.value
        made.append(MapEntry(low, high, kind, table.names.get(number) or default))
    return tuple(made)


def settled_types(firmware: FirmwareMap, line: CommandLine, more: Sequence[MemmapItem] = ()) -> list[Row]:
    """As apply_memmap, for maps of any length: plain rows. Raises as it does."""
    return _read(firmware, line, more).settled()


def _read(firmware: FirmwareMap, line: CommandLine, more: Sequence[MemmapItem]) -> _Table:
    table = _Table(firmware.entries)
    steps = [*_steps(line), *more]
    for item in steps:
        _apply(table, item)
    stops = len(table.rows) < 2 or any(start + size > U64 for start, size, _ in table.rows)
    if steps and stops:
        raise EmupmemError("the kernel would stop at this command line: Invalid user supplied memory map")
    return table


def _steps(line: CommandLine) -> list[MemmapItem]:
    """The items and the limits of mem= in the order of the line, where its text still is their origin."""
    in_order: list[MemmapItem] = []
    for name, value in parameters(line.text):
        key = name.replace("-", "_")
        if key == "memmap" and value is not None:
            in_order += parse_memmap_value(value)
        elif key == "mem" and value is not None:
            in_order += [MemmapItem("mem", limit, 0, value) for limit in mem_limit(value)]
    if tuple(i for i in in_order if i.op != "mem") == line.items:
        return in_order
    return [*line.items, *(MemmapItem("mem", limit, 0, "") for limit in line.mem_limits)]


def _apply(table: _Table, item: MemmapItem) -> None:
    if item.op == "exactmap":
        table.rows.clear()
    elif item.op in OPERATORS:
        table.add(item.start, item.size, _TYPE_NUMBERS[OPERATORS[item.op]])
    elif item.op == "%":
        _apply_percent(table, item)
    else:
        table.change(item.size, U64 - item.size, _TYPE_NUMBERS[Kind.RAM], 0)


def _apply_percent(table: _Table, item: MemmapItem) -> None:
    rest = memparse(memparse(item.text)[1][1:])[1]
    old = new = 0
    if rest[:1] == "-":
        old, rest = strtoull(rest[1:])
    if rest[:1] == "+":
        new, rest = strtoull(rest[1:])
    if rest:
        return
    old, new = old & 0xFFFFFFFF, new & 0xFFFFFFFF  # enum e820_type is 32 bits wide
    if old and old == new:
        raise EmupmemError(f"the kernel would stop at memmap={item.text}: it changes a type into itself")
    if new and not old:
        table.add(item.start, item.size, new)
    else:
        table.change(item.start, item.size, old, new)


def _number(entry: MapEntry) -> int:
    """The type number of a map line; that of an unknown type is in its words, or else reserved."""
    if entry.kind in _TYPE_NUMBERS:
        return _TYPE_NUMBERS[entry.kind]
    digits = entry.words.removeprefix("type ")
    return int(digits) if digits.isascii() and digits.isdigit() else _TYPE_NUMBERS[Kind.RESERVED]
