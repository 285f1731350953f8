# SPDX-License-Identifier: Apache-2.0
"""FirmwareMap + Request -> Plan, or a named reason why not. Pure.

The rules, in one place: a reservation lies inside one usable range of the firmware map, on one
NUMA node, at or above 4 GiB, clear of everything that other words of the command line take, start
and size whole multiples of the largest step that fits (1 GiB, 128 MiB, 16 MiB, 2 MiB), as low as
possible; what stays for the system is at least the floor; the kernel's address randomisation is
never given more regions than it can keep clear of. Every plan is proven: see kernel_map.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import replace

from emupmem.kernel.cmdline import format_memmap, format_size, memmap_region_count
from emupmem.model import (
    LOW_LIMIT,
    MAX_MEMMAP_REGIONS,
    MIB,
    DeviceKind,
    EmupmemError,
    Kind,
    MapEntry,
    Offer,
    Plan,
    Rejected,
    Request,
    Reservation,
)
from emupmem.planner.far import far_warnings, with_node
from emupmem.planner.kernel_map import prove_plan
from emupmem.planner.kernels import kaslr, kernel_problem, kernel_warnings, soft_kaslr
from emupmem.planner.nodes import node_warnings, nodes_with_ram
from emupmem.planner.places import (
    Field,
    Place,
    field_of,
    fill_places,
    find_places,
    gone,
    high_places,
    memory_limits,
    room_in,
    rooms_of,
    subtract,
    taken_by,
    union_of,
)
from emupmem.planner.situation import (
    BELOW_4G,
    LEAST_BLOCK,
    PAGE,
    STEPS,
    STRUCT_PAGE,
    NoPlan,
    Situation,
    page_structs,
)
from emupmem.record import record
from emupmem.units import human, multiples_near, span_text, tight


def plan(situation: Situation, request: Request) -> Plan:
    """The lowest reservation that keeps all rules.

    Without a size, one is chosen that leaves half of the RAM, or failing that the floor.
    Raises NoPlan when nothing fits, EmupmemError for a request that no machine can serve.
    """
    problem = kernel_problem(situation.kernel, request.kind)
    if problem is not None:
        raise problem
    request = with_node(situation, request)
    _check_request(situation, request)
    field = field_of(situation, request)
    budget = _budget(situation)
    if request.size is None:
        request = replace(request, size=_proposed(situation, request, field, budget))
    assert request.size is not None
    chosen = _chosen(field, request, budget)
    if chosen is None or budget.left(chosen) < request.min_free:
        raise _no_plan(situation, request, field, budget, fits=chosen is not None)
    left = budget.left(chosen)
    inside = soft_kaslr(situation, chosen)
    nokaslr, kaslr_warning = (True, [f"{inside}: nokaslr is added"]) if inside else kaslr(situation)
    warnings = (
        *kernel_warnings(situation.kernel),
        *_align_warnings(chosen),
        *_ram_warnings(budget, left),
        *kaslr_warning,
        *node_warnings(situation, chosen),
        *far_warnings(situation, request),
    )
    memmap = format_memmap(chosen)
    prove_plan(situation, memmap, chosen)
    structs = page_structs(request.size * request.count)
    return Plan(memmap, chosen, left, structs, warnings, nokaslr, bool(inside))


def offers(situation: Situation, request: Request) -> tuple[Offer, ...]:
    """For each usable range of the map the most that one device in it could have, with the reason."""
    request = with_node(situation, request)
    field = field_of(situation, request)
    budget = _budget(situation)
    step = field.steps[-1]
    affordable = {
        above: _affordable(budget, request.min_free, above) // step * step for above in (False, True)
    }
    rooms = rooms_of(field)
    most = rooms_of(field, lambda place: affordable[place[0] >= budget.limit])
    found = []
    for index, entry in enumerate(situation.firmware.entries):
        if entry.kind is not Kind.RAM:
            continue
        room = rooms.get(index, 0)
        reason = field.reasons.get(index, "")
        if most.get(index, 0) < room:
            reason = f"the rest keeps {human(request.min_free)} for the system"
        found.append(Offer(entry.start, entry.size, most.get(index, 0), reason))
    return tuple(found)


def rejected(situation: Situation, request: Request, made: Plan | None) -> tuple[Rejected, ...]:
    """Every range of the map that was not chosen, with a reason that a person understands."""
    request = with_node(situation, request)
    chosen = sorted((r.start, r.end) for r in made.reservations) if made else []
    size = made.reservations[0].size if made else request.size
    field = field_of(situation, request)
    rooms, budget = rooms_of(field), _budget(situation)
    found, at = [], 0
    for index, entry in enumerate(situation.firmware.entries):
        while at < len(chosen) and chosen[at][1] <= entry.start:
            at += 1
        if at < len(chosen) and chosen[at][0] < entry.end:
            continue
        if entry.kind is not Kind.RAM:
            reason = _not_ram(entry.kind, entry.words)
        elif index in field.reasons:
            reason = field.reasons[index]
        else:
            reason = _why_not(entry, rooms[index], request, size, budget, bool(chosen))
        found.append(Rejected(entry.start, entry.size, reason))
    return tuple(found)


def satisfied(situation: Situation, request: Request, existing: Sequence[Reservation]) -> bool:
    """Whether reservations that are there already are what is asked, and keep every rule still."""
    if len(existing) != request.count or request.size is None:
        return False
    request = with_node(situation, request)
    field = field_of(situation, request)
    if any(r.size != request.size or r.kind != request.kind or r.start % field.steps[-1] for r in existing):
        return False
    if request.offset is not None and min(r.start for r in existing) != request.offset:
        return False
    if not all(any(p[0] <= r.start and r.end <= p[1] for p in field.places) for r in existing):
        return False
    return _budget(situation).left(existing) >= request.min_free


def check_values(request: Request) -> None:
    """Raise EmupmemError for numbers that no machine could serve, whatever its memory is."""
    step = LEAST_BLOCK if request.kind is DeviceKind.MEMORY else STEPS[-1]
    if request.count < 1:
        raise EmupmemError(f"{request.count} devices make no sense", "--count takes 1 to 4")
    if request.size is not None and (request.size < step or request.size % step):
        near = multiples_near(request.size, step)
        raise EmupmemError(f"size {tight(request.size)} is not a multiple of {human(step)}", f"take {near}")
    if request.offset is not None:
        if request.offset < LOW_LIMIT:
            raise EmupmemError(
                f"offset {tight(request.offset)} is {BELOW_4G}", "use 4G or more, or omit --offset"
            )
        if request.offset % step:
            near = tight(request.offset // step * step)
            raise EmupmemError(
                f"offset {tight(request.offset)} is not a multiple of {human(step)}", f"take {near}"
            )


def _check_request(situation: Situation, request: Request) -> None:
    check_values(request)
    _check_command_line(situation, request)
    step = situation.steps(request.kind)[-1]
    if any(value % step for value in (request.size or 0, request.offset or 0)):
        raise EmupmemError(
            f"this machine adds memory in blocks of {human(step)}", f"give multiples of {tight(step)}"
        )
    told = {n.node for n in situation.nodes}
    if request.numa_node is not None and request.numa_node not in told:
        nodes = nodes_with_ram(situation)
        known = f"nodes with memory: {', '.join(map(str, nodes))}" if nodes else "no nodes are known"
        raise EmupmemError(f"there is no NUMA node {request.numa_node}", known)


def _check_command_line(situation: Situation, request: Request) -> None:
    line = situation.command_line
    if line is not None and any(i.op == "exactmap" for i in line.items):
        raise EmupmemError(
            "the command line has memmap=exactmap: it replaces the firmware's map by one made by hand",
            "remove it first; emupmem plans on what the firmware says",
        )
    if request.kind.soft:
        return  # kaslr.c counts no `%` items: see soft_kaslr
    present = memmap_region_count(line) if line is not None else 0
    there = f"there are {present} already; " if present else ""
    fewer = (
        f"ask for fewer devices (--count {MAX_MEMMAP_REGIONS - present}), or "
        if present < MAX_MEMMAP_REGIONS
        else ""
    )
    if present + request.count > MAX_MEMMAP_REGIONS and not (line is not None and line.nokaslr):
        raise EmupmemError(
            f"{present + request.count} memmap regions in all: the kernel's address randomisation keeps clear "
            f"of {MAX_MEMMAP_REGIONS} only and may put the kernel into the fifth",
            f"{there}{fewer}apply with --nokaslr: the kernel then stays at its place",
        )


# RAM that stays ---------------------------------------------------------------------------------


@record
class _Budget:
    """RAM in bytes: all that the kernel has of what the firmware reports, and what others take of it.

    `limit` is the address above which mem= or a bare memmap= takes all RAM away (2^64: none).
    """

    total: int
    taken: int
    limit: int

    def left(self, chosen: Sequence[Reservation]) -> int:
        """What stays; a reservation above the limit costs page structs only, its RAM is gone already."""
        size = sum(r.size for r in chosen)
        above = sum(max(0, r.end - max(r.start, self.limit)) for r in chosen)
        return self.total - self.taken - size - page_structs(size) + above


def _budget(situation: Situation) -> _Budget:
    """What mem=, memmap= items, crashkernel= and huge pages take of the RAM that the kernel has at all."""
    entries = ((e.start, e.end, 0, None) for e in situation.firmware.entries if e.kind is Kind.RAM)
    ram = list(subtract(entries, gone(situation)))
    total = sum(p[1] - p[0] for p in ram)
    line = situation.command_line
    if line is None:
        return _Budget(total, situation.hugepages, 1 << 64)
    limit = min(memory_limits(line), default=1 << 64)
    taken = [(i.start, i.start + i.size) for i in line.items if i.op in "!$#%"]
    others = union_of([*taken, *((s.start, s.end) for s in line.fake_mem)])
    stays = sum(min(p[1], limit) - p[0] for p in subtract(ram, others) if p[0] < limit)
    kept = sum(page_structs(i.size) for i in line.reservations)
    return _Budget(total, total - stays + taken_by(line, total, situation.hugepages) + kept, limit)


def _affordable(budget: _Budget, min_free: int, above: bool) -> int:
    """The largest multiple of 2 MiB that leaves `min_free`; `above` the limit a device costs page structs only."""
    spare = budget.total - budget.taken - min_free
    cost = STRUCT_PAGE if above else PAGE + STRUCT_PAGE
    return max(0, spare * PAGE // cost) // STEPS[-1] * STEPS[-1]


def _chosen(field: Field, request: Request, budget: _Budget) -> tuple[Reservation, ...] | None:
    """The lowest places that fit; where they leave too little, those above the limit of the RAM, which cost none."""
    lowest = find_places(field, request)
    if lowest is None or budget.left(lowest) >= request.min_free:
        return lowest
    above = find_places(field, request, [p for p in field.places if p[0] >= budget.limit])
    return above if above is not None and budget.left(above) >= request.min_free else lowest


def _proposed(situation: Situation, request: Request, field: Field, budget: _Budget) -> int:
    """A size for who gives none: all memory of a node that is asked for as memory, or what leaves half of the RAM."""
    if request.kind is DeviceKind.MEMORY and request.numa_node is not None and request.count == 1:
        whole = _largest(request, field, budget)
        if whole:
            return whole
    return _comfortable(situation, request, field, budget)


def _comfortable(situation: Situation, request: Request, field: Field, budget: _Budget) -> int:
    """A size per device that leaves half of the RAM, a power of two; failing that, any that fits."""
    largest = _largest(request, field, budget)
    for floor in (max(request.min_free, budget.total // 2), request.min_free):
        size = 1 << max(largest.bit_length() - 1, 0)
        while size >= max(STEPS[2], field.steps[-1]):
            chosen = _chosen(field, replace(request, size=size, min_free=floor), budget)
            if chosen is not None and budget.left(chosen) >= floor:
                return size
            size //= 2
    where = f" at {tight(request.offset)}" if request.offset is not None else ""
    raise NoPlan(
        f"this machine has no room for a reservation{where}",
        _roomless_hint(situation, request, field, budget),
        largest,
        rejected(situation, request, None),
    )


def _roomless_hint(situation: Situation, request: Request, field: Field, budget: _Budget) -> str:
    if not high_places(situation):
        return "all of its RAM is below 4 GiB, where the kernel, DMA and the initrd need it"
    if not field.places and request.numa_node is not None:
        option = "--far" if request.far else "--numa-node"
        return f"nothing above 4 GiB is free on node {request.numa_node}; omit {option}"
    if not field.places:
        return "none of its RAM above 4 GiB is free for it"
    if request.offset is not None and not any(p[0] <= request.offset < p[1] for p in field.places):
        places = ", ".join(span_text(p[0], p[1]) for p in field.places[:3])
        return f"that is not in what is free ({places}); omit --offset, or give another"
    if budget.taken >= budget.total:
        return f"{_takers(situation)} takes all of its {human(budget.total)} of RAM"
    return f"it has {human(budget.total - budget.taken)} of RAM; {human(request.min_free)} must stay (--min-free)"


def _takers(situation: Situation) -> str:
    """Who takes the RAM, for people: the words of the command line, or the pages that the machine has now."""
    line = situation.command_line
    words = [line.hugepages_text] if line is not None and line.hugepages_text else []
    words += [f"crashkernel={value}" for value in line.crashkernel] if line is not None else []
    if not words and situation.hugepages:
        return "what is set up as huge pages"
    return " ".join(words) or "the kernel command line"


def _largest(request: Request, field: Field, budget: _Budget) -> int:
    """The largest size per device, in the smallest steps, that keeps all rules; 0 where none does: see _chosen."""
    above = [p for p in field.places if p[0] >= budget.limit]
    step = field.steps[-1]
    return max(_largest_in(places, request, budget, step) for places in (field.places, above))


def _largest_in(places: Sequence[Place], request: Request, budget: _Budget, step: int) -> int:
    """The same in some of the places.

    Only the roomiest matter, as many as there are devices, and the one that holds the offset; both fitting and the
    floor get harder as the size grows, so bisection finds it.
    """
    offset = request.offset
    if offset is not None:
        places = [(max(p[0], offset), *p[1:]) for p in places if p[1] > offset]
    best = heapq.nlargest(request.count, places, key=lambda p: room_in(p, step))
    first = [p for p in places[:1] if offset is not None and p not in best]
    best = sorted([*first, *best])
    low, high = 0, max((room_in(p, step) for p in best), default=0) // step
    while low < high:
        middle = (low + high + 1) // 2
        chosen = fill_places(best, middle * step, request.count, step, offset)
        if chosen is not None and budget.left(chosen) >= request.min_free:
            low = middle
        else:
            high = middle - 1
    return low * step


# Words ------------------------------------------------------------------------------------------


def _no_plan(situation: Situation, request: Request, field: Field, budget: _Budget, *, fits: bool) -> NoPlan:
    assert request.size is not None
    largest = _largest(request, field, budget)
    each = "" if request.count == 1 else f"{request.count} times "
    if fits:
        message = (
            f"{each}{human(request.size)} would leave {human(_would_leave(request, request.size, budget))} of RAM, "
            f"less than the {human(request.min_free)} that must stay (--min-free)"
        )
    else:
        where = f" at {tight(request.offset)}" if request.offset is not None else ""
        node = f" on NUMA node {request.numa_node}" if request.numa_node is not None else ""
        message = f"no usable range has room for {each}{human(request.size)}{where}{node}"
    hint = (
        f"the largest size that fits is {format_size(largest)}"
        if largest
        else _roomless_hint(situation, request, field, budget)
    )
    return NoPlan(message, hint, largest, rejected(situation, request, None))


def _would_leave(request: Request, size: int, budget: _Budget) -> int:
    return max(0, budget.left([Reservation(0, size, 1)] * request.count))


def _not_ram(kind: Kind, words: str) -> str:
    return _REASONS.get(kind) or f"not RAM: {words or 'unknown type'}"


_REASONS = {
    Kind.RESERVED: "reserved by firmware",
    Kind.SOFT_RESERVED: "soft reserved: special-purpose memory that a driver owns",
    Kind.ACPI_DATA: "ACPI tables",
    Kind.ACPI_NVS: "ACPI non-volatile storage",
    Kind.UNUSABLE: "marked unusable by firmware",
    Kind.PMEM: "real persistent memory (type 7)",
    Kind.PRAM: "persistent already (type 12)",
}


def _why_not(
    entry: MapEntry, room: int, request: Request, size: int | None, budget: _Budget, planned: bool
) -> str:
    """Why a usable range with a place in it was not chosen."""
    if size is not None and room < size:
        what = human(room) + (" after alignment" if room + STEPS[-1] <= entry.size else "")
        return f"{what}, you asked for {human(size)}" if request.size is not None else f"{what}: too small"
    if planned:
        return "not needed: a lower range was chosen"
    if size is not None and _would_leave(request, size, budget) < request.min_free:
        return f"would leave {human(_would_leave(request, size, budget))} of RAM"
    if request.offset is not None and not entry.start <= request.offset < entry.end:
        return f"not at the offset you asked for, {tight(request.offset)}"
    if size is not None:
        return f"has room for {room // size} of {request.count} devices of {human(size)}"
    return f"would leave less than {human(request.min_free)} of RAM"


def _align_warnings(chosen: Sequence[Reservation]) -> list[str]:
    step = chosen[0].align
    if step >= 128 * MIB or chosen[0].kind.soft:
        return []
    return [f"aligned to {human(step)} only: kernels before 5.3 need 128 MiB, ndctl prefers 16 MiB"]


def _ram_warnings(budget: _Budget, left: int) -> list[str]:
    if left * 4 < budget.total:
        return ["less than a quarter of the RAM stays for the system"]
    return []
