"""FirmwareMap + Request -> Plan, or a named reason why not. Pure.

The rules, in one place: a reservation lies inside one usable range of the firmware map, on one
NUMA node, at or above 4 GiB, clear of everything that other words of the command line take, start
and size whole multiples of the largest step that fits (1 GiB, 128 MiB, 16 MiB, 2 MiB), as low as
possible; what stays for the system is at least the floor; the kernel's address randomisation is
never given more regions than it can keep clear of.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from emupmem.cmdline import format_memmap, format_size, memmap_region_count, memparse
from emupmem.model import (
    GIB,
    LOW_LIMIT,
    MAX_MEMMAP_REGIONS,
    MIB,
    CommandLine,
    EmupmemError,
    FirmwareMap,
    KernelRelease,
    Kind,
    Loss,
    MapEntry,
    NodeRange,
    Offer,
    Plan,
    Rejected,
    Request,
    Reservation,
    Span,
)
from emupmem.units import human, tight

STEPS = (GIB, 128 * MIB, 16 * MIB, 2 * MIB)
"""Steps of alignment, best first.

1 GiB keeps devdax huge pages and NUMA simple; 128 MiB is the memory section that kernels before
5.3 map as a whole; 16 MiB is ndctl's own region alignment; below 2 MiB the driver refuses
(`misaligned, unable to map`, memremap_compat_align() since 5.7).
"""

STRUCT_PAGE, PAGE = 64, 4096
_BELOW_4G = "below 4 GiB: the kernel, DMA and the initrd need it"


@dataclass(frozen=True, slots=True)
class Situation:
    """What the planner knows of the machine.

    `vetoes` are (name, spans): RAM as other sources see it; a place must be RAM for all of them.
    `losses` are ranges that the kernel took out of the RAM: no place may touch one.
    `command_line` holds every word that will be on the command line beside the new reservation,
    reservations that stay included. `hugepages` are the bytes of huge pages that the machine has
    now, however it got them (sysctl): the next boot will have as many. `efi` and `kernel` are None
    where unknown.
    """

    firmware: FirmwareMap
    vetoes: tuple[tuple[str, tuple[Span, ...]], ...] = ()
    nodes: tuple[NodeRange, ...] = ()
    command_line: CommandLine | None = None
    efi: bool | None = None
    kernel: KernelRelease | None = None
    hugepages: int = 0
    losses: tuple[Loss, ...] = ()


class NoPlan(EmupmemError):
    """Nothing fits. `largest` is the largest size in bytes that would (0: none), per device."""

    def __init__(self, message: str, hint: str, largest: int, rejected: tuple[Rejected, ...]) -> None:
        super().__init__(message, hint)
        self.largest = largest
        self.rejected = rejected


def page_structs(size: int) -> int:
    """Bytes of DRAM for the page structs of `size` bytes of pmem: 64 per 4 KiB page (fsdax, map=mem)."""
    return size // PAGE * STRUCT_PAGE


def plan(situation: Situation, request: Request) -> Plan:
    """The lowest reservation that keeps all rules.

    Without a size, one is chosen that leaves half of the RAM, or failing that the floor.
    Raises NoPlan when nothing fits, EmupmemError for a request that no machine can serve.
    """
    problem = kernel_problem(situation.kernel)
    if problem is not None:
        raise problem
    _check_request(situation, request)
    field = _field(situation, request.numa_node)
    budget = _budget(situation)
    if request.size is None:
        request = replace(request, size=_comfortable(situation, request, field, budget))
    assert request.size is not None
    chosen = _find(field.places, request)
    if chosen is None or budget.left(chosen) < request.min_free:
        raise _no_plan(situation, request, field, budget, fits=chosen is not None)
    left = budget.left(chosen)
    nokaslr, kaslr_warning = _kaslr(situation)
    warnings = (
        *_kernel_warnings(situation.kernel),
        *_align_warnings(chosen),
        *_ram_warnings(budget, left),
        *kaslr_warning,
    )
    memmap = format_memmap([(r.size, r.start) for r in chosen])
    return Plan(memmap, chosen, left, page_structs(request.size * request.count), warnings, nokaslr)


def offers(situation: Situation, request: Request) -> tuple[Offer, ...]:
    """For each usable range of the map the most that one device in it could have, with the reason."""
    field = _field(situation, request.numa_node)
    affordable = _affordable(_budget(situation), request.min_free)
    rooms = _rooms(field)
    found = []
    for index, entry in enumerate(situation.firmware.entries):
        if entry.kind is not Kind.RAM:
            continue
        room = rooms.get(index, 0)
        reason = field.reasons.get(index, "")
        if affordable < room:
            reason = f"the rest keeps {human(request.min_free)} for the system"
        found.append(Offer(entry.start, entry.size, min(room, affordable), reason))
    return tuple(found)


def rejected(situation: Situation, request: Request, made: Plan | None) -> tuple[Rejected, ...]:
    """Every range of the map that was not chosen, with a reason that a person understands."""
    chosen = sorted((r.start, r.end) for r in made.reservations) if made else []
    size = made.reservations[0].size if made else request.size
    field = _field(situation, request.numa_node)
    rooms, budget = _rooms(field), _budget(situation)
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
    if any(r.size != request.size or r.start % STEPS[-1] for r in existing):
        return False
    if request.offset is not None and min(r.start for r in existing) != request.offset:
        return False
    places = _field(situation, request.numa_node).places
    if not all(any(p[0] <= r.start and r.end <= p[1] for p in places) for r in existing):
        return False
    return _budget(situation).left(existing) >= request.min_free


def disagreements(situation: Situation) -> tuple[tuple[str, tuple[Span, ...]], ...]:
    """(source, ranges of 2 MiB and more above 4 GiB) that the map calls RAM and this source does not.

    What the kernel's own lines say is lost is left out: those name it better.
    """
    lost = _union((x.start, x.end) for x in situation.losses)
    high = list(_subtract(_high(situation), lost))
    found = []
    for name, allowed in situation.vetoes:
        outside = _subtract(high, _union((s.start, s.end) for s in allowed))
        spans = tuple(Span(p[0], p[1]) for p in outside if p[1] - p[0] >= STEPS[-1])
        if spans:
            found.append((name, spans))
    return tuple(found)


def high_losses(situation: Situation) -> tuple[Loss, ...]:
    """The losses that took RAM at or above 4 GiB, where there could have been a place."""
    high = _high(situation)
    return tuple(x for x in situation.losses if any(_intersect(high, [(x.start, x.end)])))


def taken_by(line: CommandLine | None, ram: int, hugepages: int = 0) -> int:
    """Bytes of RAM that `crashkernel=` and huge pages (at least `hugepages`) will take of `ram` bytes."""
    if line is None:
        return hugepages
    kernels = sum(crashkernel_bytes(value, ram)[0] for value in line.crashkernel)
    return max(line.hugepages, hugepages) + kernels


def crashkernel_bytes(value: str, ram: int) -> tuple[int, int | None]:
    """(size, fixed address or None) that `crashkernel=value` takes on a machine with `ram` bytes.

    Forms of kernel/crash_reserve.c: `256M`, `256M@1G`, `512M,high`, `1G-4G:192M,4G-:256M[@addr]`.
    `auto` and what cannot be read count as 256 MiB, which is what distributions take for it.
    """
    guess = 256 * MIB
    body, at, where = value.partition("@")
    try:
        address = _kernel_size(where) if at else None
        if ":" not in body:
            return _kernel_size(body.split(",")[0]), address
        for part in body.split(","):
            limits, _, size = part.partition(":")
            low, _, high = limits.partition("-")
            if _kernel_size(low) <= ram and (not high or ram < _kernel_size(high)):
                return _kernel_size(size), address
    except ValueError:
        return guess, None
    return 0, None


def _kernel_size(text: str) -> int:
    """A size as the kernel reads it: `0400M` is octal, 256 MiB. Raises ValueError where more than a size is there."""
    size, rest = memparse(text)
    if rest or not text:
        raise ValueError(text)
    return size


def _check_request(situation: Situation, request: Request) -> None:
    step = STEPS[-1]
    if request.count < 1:
        raise EmupmemError(f"{request.count} devices make no sense", "--count takes 1 to 4")
    if request.size is not None and (request.size < step or request.size % step):
        lower, upper = request.size // step * step, (request.size // step + 1) * step
        near = f"{tight(lower)} or {tight(upper)}" if lower else tight(upper)
        raise EmupmemError(f"size {tight(request.size)} is not a multiple of 2 MiB", f"take {near}")
    if request.offset is not None:
        if request.offset < LOW_LIMIT:
            raise EmupmemError(
                f"offset {tight(request.offset)} is {_BELOW_4G}", "take 4G or more, or leave --offset away"
            )
        if request.offset % step:
            near = tight(request.offset // step * step)
            raise EmupmemError(f"offset {tight(request.offset)} is not a multiple of 2 MiB", f"take {near}")
    _check_command_line(situation, request)
    nodes = sorted({n.node for n in situation.nodes})
    if request.numa_node is not None and request.numa_node not in nodes:
        known = f"nodes with memory: {', '.join(map(str, nodes))}" if nodes else "no nodes are known"
        raise EmupmemError(f"there is no NUMA node {request.numa_node}", known)


def _check_command_line(situation: Situation, request: Request) -> None:
    line = situation.command_line
    if line is not None and any(i.op == "exactmap" for i in line.items):
        raise EmupmemError(
            "the command line has memmap=exactmap: it replaces the firmware's map by one made by hand",
            "remove it first; emupmem plans on what the firmware says",
        )
    present = memmap_region_count(line) if line is not None else 0
    if present + request.count > MAX_MEMMAP_REGIONS and not (line is not None and line.nokaslr):
        raise EmupmemError(
            f"{present + request.count} memmap regions in all: the kernel's address randomisation keeps clear "
            f"of {MAX_MEMMAP_REGIONS} only and may put the kernel into the fifth",
            f"there are {present} already; ask for fewer devices, or boot with nokaslr",
        )


# Places --------------------------------------------------------------------------------------

# Plain tuples in here: a map may have 100,000 ranges, and a dataclass costs ten times a tuple.
_Place = tuple[int, int, int, int | None]
"""(start, end, index of the map's entry, NUMA node or None where no node claims it)."""
_Pair = tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Field:
    """Where reservations may lie: `places`, lowest first, none crossing anything, each with room for
    2 MiB; and for every usable entry without a place the reason."""

    places: list[_Place]
    reasons: dict[int, str]


def _high(situation: Situation) -> list[_Place]:
    """The usable entries, as far as they lie at or above 4 GiB."""
    entries = enumerate(situation.firmware.entries)
    return [
        (max(e.start, LOW_LIMIT), e.end, i, None)
        for i, e in entries
        if e.kind is Kind.RAM and e.end > LOW_LIMIT
    ]


def _field(situation: Situation, node: int | None) -> _Field:
    """Take away from the usable entries what each rule forbids; the rule that took the last is the reason."""
    entries = situation.firmware.entries
    reasons: dict[int, str] = {}
    alive = {i for i, e in enumerate(entries) if e.kind is Kind.RAM}

    def keep(places: Iterable[_Place], why: Callable[[int], str]) -> list[_Place]:
        left = [p for p in places if _room(p, STEPS[-1])]
        gone = alive - {p[2] for p in left}
        reasons.update((i, why(i)) for i in gone)
        alive.difference_update(gone)
        return left

    def tiny(i: int) -> str:
        if entries[i].end <= LOW_LIMIT:
            return _BELOW_4G
        return f"{human(entries[i].size)} only: no 2 MiB step lies inside"

    places = keep(_high(situation), tiny)
    lost = _union((x.start, x.end) for x in situation.losses)
    places = keep(_subtract(places, lost), lambda i: _lost(situation.losses, entries[i]))
    for name, allowed in situation.vetoes:
        union = _union((s.start, s.end) for s in allowed)
        places = keep(_intersect(places, union), lambda i, name=name: f"not RAM according to {name}")  # type: ignore[misc]
    taken = _taken(situation)
    if taken:
        places = keep(_subtract(places, taken), lambda i: "taken by another word of the kernel command line")
    if situation.nodes:
        places = keep(
            _split_nodes(places, situation.nodes), lambda i: "in pieces that belong to different NUMA nodes"
        )
    if node is not None:
        on = {i: {p[3] for p in places if p[2] == i} for i in alive} if len(alive) < 1000 else {}
        places = keep([p for p in places if p[3] == node], lambda i: _other_node(on.get(i, set()), node))
    return _Field(places, reasons)


def _lost(losses: Sequence[Loss], entry: MapEntry) -> str:
    first = next(x for x in losses if x.start < entry.end and entry.start < x.end)
    return f"the kernel took it away: {first.why}"


def _other_node(nodes: set[int | None], node: int) -> str:
    known = ", ".join(str(n) for n in sorted(n for n in nodes if n is not None)) or "another"
    return f"on NUMA node {known}, you asked for node {node}"


def _taken(situation: Situation) -> list[_Pair]:
    """What other words of the command line claim by address, sorted and joined."""
    line = situation.command_line
    if line is None:
        return []
    spans = [(i.start, i.start + i.size) for i in line.items if i.op in "!$#@%" and i.size]
    spans += [(s.start, s.end) for s in line.fake_mem]
    for value in line.crashkernel:
        size, where = crashkernel_bytes(value, situation.firmware.ram_bytes)
        if where is not None:
            spans.append((where, where + size))
    return _union(spans)


def _union(spans: Iterable[_Pair]) -> list[_Pair]:
    """Sorted, neighbours and overlaps made one."""
    out: list[_Pair] = []
    for start, end in sorted(spans):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], end))
        else:
            out.append((start, end))
    return out


def _intersect(places: Iterable[_Place], union: Sequence[_Pair]) -> Iterator[_Place]:
    """Parts of sorted `places` inside `union`; borders between places stay borders."""
    at = 0
    for start, end, entry, node in places:
        while at < len(union) and union[at][1] <= start:
            at += 1
        i = at
        while i < len(union) and union[i][0] < end:
            yield max(start, union[i][0]), min(end, union[i][1]), entry, node
            i += 1


def _subtract(places: Iterable[_Place], taken: Sequence[_Pair]) -> Iterator[_Place]:
    """Parts of sorted `places` outside `taken`."""
    at = 0
    for first, end, entry, node in places:
        start = first
        while at < len(taken) and taken[at][1] <= start:
            at += 1
        i = at
        while i < len(taken) and taken[i][0] < end:
            if start < taken[i][0]:
                yield start, taken[i][0], entry, node
            start = max(start, taken[i][1])
            i += 1
        if start < end:
            yield start, end, entry, node


def _split_nodes(places: Iterable[_Place], nodes: Sequence[NodeRange]) -> Iterator[_Place]:
    """Cut at node borders; what no node claims stays, as a place of its own without a node."""
    ranges: list[tuple[int, int, int]] = []
    for n in sorted(nodes, key=lambda n: n.start):
        if ranges and ranges[-1][1] == n.start and ranges[-1][2] == n.node:
            ranges[-1] = (ranges[-1][0], n.end, n.node)  # one node told in several ranges
        else:
            ranges.append((n.start, n.end, n.node))
    at = 0
    for first, end, entry, _ in places:
        start = first
        while at < len(ranges) and ranges[at][1] <= start:
            at += 1
        i = at
        while i < len(ranges) and ranges[i][0] < end and start < end:
            begin, stop, node = ranges[i]
            if start < begin:
                yield start, begin, entry, None
            start, stop = max(start, begin), min(end, stop)
            if start < stop:
                yield start, stop, entry, node
                start = stop
            i += 1
        if start < end:
            yield start, end, entry, None


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


def _room(place: _Place, step: int) -> int:
    """The largest multiple of `step` that an aligned reservation in the place can have."""
    return max(0, (place[1] - _up(place[0], step)) // step * step)


def _rooms(field: _Field) -> dict[int, int]:
    """For each entry with a place the most that one reservation in it can have."""
    rooms: dict[int, int] = {}
    for place in field.places:
        rooms[place[2]] = max(rooms.get(place[2], 0), _room(place, STEPS[-1]))
    return rooms


def _find(places: Sequence[_Place], request: Request) -> tuple[Reservation, ...] | None:
    assert request.size is not None
    roomy = [p for p in places if p[1] - p[0] >= request.size]
    for step in STEPS:
        if request.size % step or (request.offset or 0) % step:
            continue
        found = _fill(roomy, request.size, request.count, step, request.offset)
        if found is not None:
            return found
    return None


def _fill(
    places: Sequence[_Place], size: int, count: int, step: int, offset: int | None
) -> tuple[Reservation, ...] | None:
    """The `count` lowest reservations at multiples of `step`; the first exactly at `offset` if given."""
    found: list[Reservation] = []
    for start, end, _, node in places:
        at = _up(max(start, offset or 0), step)
        while at + size <= end:
            if not found and offset is not None and at != offset:
                return None
            found.append(Reservation(at, size, step, node))
            if len(found) == count:
                return tuple(found)
            at += size
    return None


# RAM that stays ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
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
    """What mem=, memmap= items, crashkernel= and huge pages take of the RAM that the kernel did not lose."""
    entries = ((e.start, e.end, 0, None) for e in situation.firmware.entries if e.kind is Kind.RAM)
    ram = list(_subtract(entries, _union((x.start, x.end) for x in situation.losses)))
    total = sum(p[1] - p[0] for p in ram)
    line = situation.command_line
    if line is None:
        return _Budget(total, situation.hugepages, 1 << 64)
    limit = min((*line.mem_limits, *(i.size for i in line.items if i.op == "limit")), default=1 << 64)
    taken = [(i.start, i.start + i.size) for i in line.items if i.op in "!$#%"]
    others = _union([*taken, *((s.start, s.end) for s in line.fake_mem)])
    stays = sum(min(p[1], limit) - p[0] for p in _subtract(ram, others) if p[0] < limit)
    kept = sum(page_structs(i.size) for i in line.reservations)
    return _Budget(total, total - stays + taken_by(line, total, situation.hugepages) + kept, limit)


def _affordable(budget: _Budget, min_free: int) -> int:
    """The largest multiple of 2 MiB that leaves `min_free`."""
    spare = budget.total - budget.taken - min_free
    return max(0, spare * PAGE // (PAGE + STRUCT_PAGE)) // STEPS[-1] * STEPS[-1]


def _comfortable(situation: Situation, request: Request, field: _Field, budget: _Budget) -> int:
    """A size per device that leaves half of the RAM, a power of two; failing that, any that fits."""
    largest = _largest(request, field, budget)
    for floor in (max(request.min_free, budget.total // 2), request.min_free):
        size = 1 << max(largest.bit_length() - 1, 0)
        while size >= STEPS[2]:
            chosen = _find(field.places, replace(request, size=size))
            if chosen is not None and budget.left(chosen) >= floor:
                return size
            size //= 2
    raise NoPlan(
        "this machine has no room for a reservation",
        _roomless_hint(situation, request, field, budget),
        largest,
        rejected(situation, request, None),
    )


def _roomless_hint(situation: Situation, request: Request, field: _Field, budget: _Budget) -> str:
    if not _high(situation):
        return "all of its RAM is below 4 GiB, where the kernel, DMA and the initrd need it"
    if not field.places:
        return "none of its RAM above 4 GiB is free for it"
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


def _largest(request: Request, field: _Field, budget: _Budget) -> int:
    """The largest size per device, in steps of 2 MiB, that keeps all rules; 0 where none does.

    Only the roomiest places matter, as many as there are devices, and the one that holds the
    offset; both fitting and the floor get harder as the size grows, so bisection finds it.
    """
    step, offset = STEPS[-1], request.offset
    places = field.places
    if offset is not None:
        places = [(max(p[0], offset), *p[1:]) for p in places if p[1] > offset]
    best = heapq.nlargest(request.count, places, key=lambda p: _room(p, step))
    first = [p for p in places[:1] if offset is not None and p not in best]
    best = sorted([*first, *best])
    low, high = 0, max((_room(p, step) for p in best), default=0) // step
    while low < high:
        middle = (low + high + 1) // 2
        chosen = _fill(best, middle * step, request.count, step, offset)
        if chosen is not None and budget.left(chosen) >= request.min_free:
            low = middle
        else:
            high = middle - 1
    return low * step


# Words ------------------------------------------------------------------------------------------


def _no_plan(situation: Situation, request: Request, field: _Field, budget: _Budget, *, fits: bool) -> NoPlan:
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


FIRST_EL7 = 514
"""The RHEL 7 kernel (3.10.0-514.el7, RHEL 7.3) from which on `memmap=SIZE!OFFSET` is known.

Its changelog brings the persistent types of e820 (ad5fb870c486, mainline 4.2, which builds on the `!` of
ec776ef6bbe1) with the internal build 3.10.0-427, between RHEL 7.2 (327) and 7.3 (514): the later one is safe.
"""


def kernel_problem(kernel: KernelRelease | None) -> EmupmemError | None:
    """Why a kernel must not be given `memmap=SIZE!OFFSET`, None where nothing is known against it.

    Before Linux 4.1 (ec776ef6bbe1) parse_memmap_one takes the item for `memmap=SIZE`: a limit for all memory.
    """
    if kernel is None:
        return None
    if kernel.i386:
        return EmupmemError(f"{kernel.text} is a 32-bit kernel, which has no /dev/pmem", KERNEL_NEEDED)
    if (kernel.major, kernel.minor) >= (4, 1) or _el7_build(kernel) >= FIRST_EL7:
        return None
    return EmupmemError(
        f"{kernel.text} does not know memmap=SIZE!OFFSET: it takes SIZE as a limit for all of its memory",
        KERNEL_NEEDED,
    )


KERNEL_NEEDED = (
    "memmap=SIZE!OFFSET needs a 64-bit kernel, Linux 4.1 or later (on RHEL 7: 3.10.0-514.el7 or later)"
)


def _el7_build(kernel: KernelRelease) -> int:
    """The build of a RHEL 7 kernel (and its rebuilds), 0 for all others."""
    found = re.match(r"3\.10\.0-(\d{1,6})\..*\bel7", kernel.release)
    return int(found[1]) if found else 0


def _kernel_warnings(kernel: KernelRelease | None) -> list[str]:
    if kernel is None or (kernel.major, kernel.minor) >= (4, 1):
        return []
    return [
        f"{kernel.text} is older than Linux 4.1 and knows memmap=SIZE!OFFSET by a backport only: try it once first "
        "(apply --trial)"
    ]


def _align_warnings(chosen: Sequence[Reservation]) -> list[str]:
    step = chosen[0].align
    if step >= 128 * MIB:
        return []
    return [f"aligned to {human(step)} only: kernels before 5.3 need 128 MiB, ndctl prefers 16 MiB"]


def _ram_warnings(budget: _Budget, left: int) -> list[str]:
    if left * 4 < budget.total:
        return ["less than a quarter of the RAM stays for the system"]
    return []


def randomisation(situation: Situation) -> tuple[bool, list[str]]:
    """Whether to propose nokaslr for what will boot, and what a person should know of it."""
    return _kaslr(situation)


def _kaslr(situation: Situation) -> tuple[bool, list[str]]:
    """Whether to propose nokaslr, and what to say (facts: a1b87d54f4e4, fixed by 15aa8fb852f9).

    EFI stubs that decompress the kernel themselves ignored memmap= when they randomised the
    kernel's place: 6.1.81-6.1.92 and 6.6.0 until 6.6.33 / 6.9.4.
    """
    line = situation.command_line
    if line is not None and line.nokaslr:
        return False, []
    kernel = situation.kernel
    if situation.efi is False:
        return False, []
    affected = None if kernel is None else _randomises_into(kernel)
    if affected is False:
        return False, []
    name = "this kernel" if kernel is None else kernel.text
    why = f"{name}, started by UEFI, may place itself inside the reservation at random"
    if affected and situation.efi:
        return True, [f"{why}: nokaslr prevents it (--nokaslr adds it), or install a newer kernel"]
    if affected is None and situation.efi:
        return False, [
            f"the exact version of {name} is unknown: Linux 6.1.81-6.1.92 and 6.6.0-6.9.3 started by UEFI "
            "may place themselves inside the reservation; if it is one of these, add --nokaslr"
        ]
    if affected and situation.efi is None:
        return False, [
            f"if it is started by UEFI, {name} may place itself inside the reservation: add --nokaslr"
        ]
    return False, []


def _randomises_into(kernel: KernelRelease) -> bool | None:
    """Whether this kernel's EFI stub ignores memmap=; None where the stable number decides and hides."""
    series, stable = (kernel.major, kernel.minor), kernel.stable
    first_bad = {(6, 1): 81}.get(series, 0)
    first_good = {(6, 1): 93, (6, 6): 33, (6, 9): 4}.get(series)
    if first_good is None:
        return series in ((6, 7), (6, 8))
    return None if stable is None else first_bad <= stable < first_good
