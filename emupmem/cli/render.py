# SPDX-License-Identifier: Apache-2.0
"""What people see on a terminal: the memory map as a picture, tables, the ladder. Plain when piped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from emupmem.cli.terminal import Part, Printer
from emupmem.model import GIB, LOW_LIMIT, Check, DeviceKind, FirmwareMap, Kind, Offer, Plan, Rejected
from emupmem.planner.kernel_map import kernel_map
from emupmem.planner.places import gone, subtract, takers
from emupmem.units import human, plain, span_text, tight

if TYPE_CHECKING:
    from emupmem.doctor.finding import Finding
    from emupmem.planner.situation import Situation


STYLES = {"planned": "bold magenta", "usable": "green", "firmware": "yellow", "lost": "red", "hole": "dim"}
WIDEST = 200
"""Columns of the picture: with more, nobody sees it as one."""

CELLS = {"planned": "█", "usable": "▒", "firmware": "░", "lost": "×", "hole": "·"}
MARKS = {"ok": ("✓", "green"), "fail": ("✗", "bold red"), "pending": ("…", "yellow"), "skipped": ("-", "dim")}


def suggestion(
    out: Printer,
    situation: Situation,
    source: str,
    offers: Sequence[Offer],
    rejected: Sequence[Rejected],
    plan: Plan | None,
) -> None:
    """The map, each usable range with the most it could give, and the plan."""
    firmware = situation.firmware
    out.print(f"{title(situation)} · from {plain(source)}")
    out.print()
    if firmware.ram:
        scale, kinds = bar(situation, plan, min(out.width, WIDEST) - 4)
        out.print("  ", scale, whole=True)
        out.print("  ", *((CELLS[kind], STYLES[kind]) for kind in kinds), whole=True)
        for row in legend(kinds, plan, out.width - 2 if out.breaks else None):
            out.print("  ", *row, hang=4)
        out.print()
    rows = _rows(offers, rejected, plan)
    width = max((len(r[0]) for r in rows), default=5)
    out.print(f"  {'Range':{width}}  {'Size':>9}  {'At most':>9}", style="bold")
    for where, size, most, why, chosen in rows:
        numbers = f"  {where:{width}}  {size:>9}  {most:>9}  "
        out.print(f"{numbers}{plain(why)}", style="magenta" if chosen else "", hang=len(numbers))
    taken = takers(situation)
    if taken:
        out.print()
        out.print(f"  taken already:  {plain(' · '.join(taken))}", hang=len("  taken already:  "))
    if plan:
        out.print()
        plan_line(out, plan)
        for entry in kernel_map(situation, plan.memmap):
            if any(r.start < entry.end and entry.start < r.end for r in plan.reservations):
                out.print(f"  the kernel will have:  {span_text(entry.start, entry.end)}  {entry.kind.value}")
        for warning in plan.warnings:
            out.print(("  ! ", "yellow"), plain(warning), hang=4)


def title(situation: Situation) -> str:
    """What the picture shows."""
    ram = ((e.start, e.end, 0, None) for e in situation.firmware.entries if e.kind is Kind.RAM)
    return f"Memory · {_gib(sum(p[1] - p[0] for p in subtract(ram, gone(situation))))} usable"


_PLANNED = {
    DeviceKind.PMEM: "persistent, volatile",
    DeviceKind.DEVDAX: "persistent as a DAX device, volatile",
    DeviceKind.DAX: "a DAX device, volatile",
    DeviceKind.MEMORY: "memory of its own",
}


def plan_line(out: Printer, plan: Plan) -> None:
    """The argument, and what stays of the RAM."""
    out.print("  ", (plan.memmap, "bold magenta"), f"      {what_is_left(plan)}", hang=len(plan.memmap) + 8)


def what_is_left(plan: Plan) -> str:
    """What stays of the RAM, as a sentence."""
    left = f"leaves {human(plan.ram_left)} of RAM after {human(plan.page_structs)} of page structs for the device"
    if plan.reservations[0].kind is DeviceKind.MEMORY:
        left += f"; {human(sum(r.size for r in plan.reservations))} comes back as movable memory"
    return left


def legend_of(plan: Plan | None) -> dict[str, str]:
    """What each kind of place of the map is called, in the order of a legend."""
    return {
        "usable": "usable",
        "firmware": "firmware",
        "lost": "lost: the kernel took it away",
        "hole": "not memory",
        "planned": f"planned: {_PLANNED[plan.reservations[0].kind if plan else DeviceKind.PMEM]}",
    }


def _gib(size: int) -> str:
    return f"{size * 10 // GIB / 10:.1f} GiB" if size >= GIB else human(size)


def _rows(
    offers: Sequence[Offer], rejected: Sequence[Rejected], plan: Plan | None
) -> list[tuple[str, str, str, str, bool]]:
    """(range, size, at most, reason, chosen) of each usable range."""
    reasons = {r.start: r.reason for r in rejected}
    rows = []
    for offer in offers:
        chosen = (
            [r for r in plan.reservations if offer.start <= r.start < offer.start + offer.size]
            if plan
            else []
        )
        what = ", ".join(f"{tight(r.size)} at {tight(r.start)}" for r in chosen)
        why = f"chosen: {what}" if chosen else reasons.get(offer.start, "")
        why = why or offer.reason
        most = tight(offer.at_most) if offer.at_most else "-"
        row = (span_text(offer.start, offer.start + offer.size), human(offer.size), most, why, bool(chosen))
        rows.append(row)
    return rows


def bar(situation: Situation, plan: Plan | None, width: int) -> tuple[str, list[str]]:
    """The map up to the end of RAM as one line of cells: the scale above it, and what kind fills each cell."""
    firmware = situation.firmware
    lost = gone(situation)
    end = max(s.end for s in firmware.ram)
    width = max(width, 20)
    kinds = [_cell(firmware, lost, plan, i * end // width, (i + 1) * end // width) for i in range(width)]
    return _scale(firmware, plan, end, width), kinds


def legend(kinds: Iterable[str], plan: Plan | None, width: int | None) -> list[list[Part]]:
    """What the cells of these kinds mean, in as many rows as they need: an entry wider than that has its own.

    Without a width it is one row.
    """
    there = set(kinds)
    rows: list[list[Part]] = [[]]
    used = 0
    for kind, name in legend_of(plan).items():
        if kind not in there:
            continue
        needed = 2 + len(name)
        if rows[-1] and width is not None and used + 3 + needed > width:
            rows.append([])
            used = 0
        gap = "   " if rows[-1] else ""
        rows[-1] += [gap, (f"{CELLS[kind]} ", STYLES[kind]), name]
        used += len(gap) + needed
    return rows


def _cell(
    firmware: FirmwareMap, lost: Sequence[tuple[int, int]], plan: Plan | None, start: int, end: int
) -> str:
    """What fills most of a cell; a planned device shows in every cell that it touches."""
    if plan and any(r.start < end and start < r.end for r in plan.reservations):
        return "planned"
    shares = dict.fromkeys(("usable", "lost", "firmware"), 0)
    for entry in firmware.entries:
        first, last = max(start, entry.start), min(end, entry.end)
        if first >= last:
            continue
        gone = sum(max(0, min(last, b) - max(first, a)) for a, b in lost) if entry.kind is Kind.RAM else 0
        shares["lost"] += gone
        shares["usable" if entry.kind is Kind.RAM else "firmware"] += last - first - gone
    most = max(shares, key=lambda kind: shares[kind])
    return most if shares[most] else "hole"


def _scale(firmware: FirmwareMap, plan: Plan | None, end: int, width: int) -> str:
    marks = {0: "0", end: human(end).replace(" GiB", "G").replace(" MiB", "M").replace(" TiB", "T")}
    if end > LOW_LIMIT:
        marks[LOW_LIMIT] = "4G"
    for r in plan.reservations if plan else ():
        marks.setdefault(r.start, tight(r.start))
    line = [" "] * (width + 8)
    used = 0
    for where in sorted(marks):
        text = marks[where]
        at = min(where * width // end, width - len(text))
        if where and at < used + 1:
            continue
        line[at : at + len(text)] = text
        used = at + len(text)
    return "".join(line).rstrip()


def diff(out: Printer, text: str) -> None:
    """A unified diff in colours."""
    for line in text.splitlines():
        out.print(plain(line), style={"+": "green", "-": "red", "@": "cyan"}.get(line[:1], ""), whole=True)


def print_ladder(out: Printer, checks: Iterable[Check]) -> None:
    """One line a rung, and below a broken one the thing to do."""
    margin = out.margin(14, 2)
    for check in checks:
        mark, style = MARKS[check.status]
        found = check.found
        if check.status in ("fail", "pending") and check.expected:
            found = f"{found} (expected: {check.expected})"
        out.print(
            (mark, style),
            f" {check.name:12} ",
            (plain(found), "dim" if check.status == "skipped" else ""),
            hang=15,
        )
        if check.hint and check.status != "ok":
            out.print(f"{'':{margin}} → {plain(check.hint)}", hang=margin + 3)


FINDINGS = {
    "ok": ("✓", "green"),
    "note": ("·", "cyan"),
    "warn": ("!", "yellow"),
    "stop": ("✗", "bold red"),
    "fail": ("✗", "bold red"),
}


def findings(out: Printer, found: Sequence[Finding]) -> None:
    """One line for each finding of the doctor, and below it the one thing to do."""
    width = max((len(f.name) for f in found), default=0)
    margin = out.margin(width + 8, 2)
    for one in found:
        mark, style = FINDINGS[one.status]
        out.print(
            (f"{mark} {one.status:4}", style), f" {one.name:{width}}  ", plain(one.evidence), hang=width + 9
        )
        if one.fix:
            out.print(f"{'':{margin}} → {plain(one.fix)}", hang=margin + 3)
