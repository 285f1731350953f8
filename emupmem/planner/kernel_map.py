# SPDX-License-Identifier: Apache-2.0
"""The proof of a plan: what the kernel makes of its `memmap=`, by the model of the kernel's own rules. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from emupmem.kernel.cmdline import parse_command_line
from emupmem.kernel.e820 import PRAM_TYPE, SOFT_TYPE, Row, apply_memmap, settled_types
from emupmem.model import EmupmemError, MapEntry, Reservation
from emupmem.planner.places import subtract
from emupmem.planner.situation import Situation
from emupmem.units import address, span_text


def prove_plan(situation: Situation, memmap: str, chosen: Sequence[Reservation]) -> None:
    """Prove that the kernel makes of `memmap` exactly the chosen ranges, of the type of their kind, and changes
    nothing else.

    Raises EmupmemError where the kernel would stop at the words that are there already, and an internal error
    where the argument would make anything else of the map than what was chosen.
    """
    line = situation.command_line or parse_command_line("")
    before = settled_types(situation.firmware, line)
    planned = sorted((r.start, r.end, SOFT_TYPE if r.kind.soft else PRAM_TYPE) for r in chosen)
    try:
        after = settled_types(situation.firmware, line, parse_command_line(memmap).items)
        problem = _difference(situation, before, after, planned)
    except EmupmemError as exc:
        problem = exc.message
    if problem:
        raise EmupmemError(
            f"internal error: the kernel would not make of {memmap} what is planned: {problem}",
            "this is no fault of yours; please report it, with an archive of emupmem collect",
        )


def kernel_map(situation: Situation, memmap: str) -> tuple[MapEntry, ...]:
    """The map that the kernel will have with `memmap`, as its `user:` lines will tell."""
    line = situation.command_line or parse_command_line("")
    return apply_memmap(situation.firmware, line, parse_command_line(memmap).items)


def _difference(
    situation: Situation, before: Sequence[Row], after: Sequence[Row], planned: Sequence[Row]
) -> str:
    """What is otherwise than planned, empty where nothing is."""
    made = [row for row in after if any(row[0] < end and start < row[1] for start, end, _ in planned)]
    if made != planned:
        return "; ".join(f"{span_text(a, b)} of type {number}" for a, b, number in made) or "no range"
    for start, end, _ in planned:
        if not any(s.start <= start and end <= s.end for s in situation.firmware.ram):
            return f"{span_text(start, end)} is not RAM"
    for was, becomes in zip_longest(_outside(before, planned), _outside(after, planned)):
        if was != becomes:
            same = was and becomes and (was[0], was[2]) == (becomes[0], becomes[2])
            edges = [row[1 if same else 0] for row in (was, becomes) if row]
            return f"from {address(min(edges))} on there is another change"
    return ""


def _outside(rows: Sequence[Row], planned: Sequence[Row]) -> list[Row]:
    """What lies outside, neighbours of one type made one."""
    places = ((start, end, number, None) for start, end, number in rows)
    found: list[Row] = []
    for start, end, number, _ in subtract(places, [(start, end) for start, end, _ in planned]):
        if found and found[-1][1] == start and found[-1][2] == number:
            found[-1] = (found[-1][0], end, number)
        else:
            found.append((start, end, number))
    return found
