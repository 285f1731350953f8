"""FirmwareMap + Request -> Plan, or a named reason why not. Pure.

The rules, in one place: a reservation lies inside one usable range of the firmware map, on one
NUMA node, at or above 4 GiB, clear of everything that other words of the command line take, start
and size whole multiples of the largest step that fits (1 GiB, 128 MiB, 16 MiB, 2 MiB), as low as
possible; what stays for the system is at least the floor; the kernel's address randomisation is
never given more regions than it can keep clear of.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from emupmem.cmdline import format_memmap, format_size, memmap_region_count
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
    NodeRange,
    Offer,
    Plan,
    Rejected,
    Request,
    Reservation,
    Span,
)
from emupmem.units import human, parse_size, tight

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
    `command_line` holds every word that will be on the command line beside the new reservation,
    reservations that stay included. `efi` and `kernel` are None where unknown.
    """

    firmware: FirmwareMap
    vetoes: tuple[tuple[str, tuple[Span, ...]], ...] = ()
    nodes: tuple[NodeRange, ...] = ()
    command_line: CommandLine | None = None
    efi: bool | None = None
    kernel: KernelRelease | None = None


class NoPlan(EmupmemError):
    """Nothing fits. `largest` is the largest size in bytes that would (0: none), per device."""

    def __init__(self, message: str, hint: str, largest: int, rejected: tuple[Rejected, ...]) -> None:
        super().__init__(message, hint)
        self.largest = largest
        self.rejected = rejected


@dataclass(frozen=True, slots=True)
class _Place:
    """A stretch of RAM that a reservation may use; `node` None where no node claims it."""

    start: int
    end: int
    node: int | None


@dataclass(frozen=True, slots=True)
class _Budget:
    """RAM in bytes: all that the firmware reports, what others take, what is then free."""

    total: int
    taken: int

    def left_after(self, reserved: int) -> int:
        return self.total - self.taken - reserved - page_structs(reserved)


def page_structs(size: int) -> int:
    """Bytes of DRAM for the page structs of `size` bytes of pmem: 64 per 4 KiB page (fsdax, map=mem)."""
    return size // PAGE * STRUCT_PAGE


def plan(situation: Situation, request: Request) -> Plan:
    """The lowest reservation that keeps all rules.

    Without a size, one is chosen that leaves half of the RAM, or failing that the floor.
    Raises NoPlan when nothing fits, EmupmemError for a request that no machine can serve.
    """
    _check_request(situation, request)
    if request.size is None:
        request = replace(request, size=_comfortable(situation, request))
    assert request.size is not None
    budget = _budget(situation)
    total = request.size * request.count
    chosen = _find(_places(situation, request), request)
    if chosen is None or _left(situation, budget, chosen) < request.min_free:
        raise _no_plan(situation, request, budget, fits=chosen is not None)
    left = _left(situation, budget, chosen)
    warnings = [*_align_warnings(chosen), *_ram_warnings(budget, left)]
    nokaslr, kaslr_warning = _kaslr(situation)
    warnings += kaslr_warning
    memmap = format_memmap([(r.size, r.start) for r in chosen])
    return Plan(memmap, chosen, left, page_structs(total), tuple(warnings), nokaslr)


def offers(situation: Situation, request: Request) -> tuple[Offer, ...]:
    """For each usable range of the map the most that one device in it could have, with the reason."""
    budget = _budget(situation)
    affordable = _affordable(budget, request.min_free)
    by_entry = _group(situation.firmware.ram, _places(situation, Request(numa_node=request.numa_node)))
    found = []
    for span, places in by_entry:
        room = max((_room(p, STEPS[-1]) for p in places), default=0)
        at_most = min(room, affordable)
        reason = ""
        if not room:
            reason = _why_no_place(situation, request, span)
        elif affordable < room:
            reason = f"the rest keeps {human(request.min_free)} for the system"
        found.append(Offer(span.start, span.size, at_most, reason))
    return tuple(found)


def rejected(situation: Situation, request: Request, made: Plan | None) -> tuple[Rejected, ...]:
    """Every range of the map that was not chosen, with a reason that a person understands."""
    chosen = made.reservations if made else ()
    size = chosen[0].size if chosen else request.size
    budget = _budget(situation)
    by_span = dict(_group(situation.firmware.ram, _places(situation, Request(numa_node=request.numa_node))))
    starts = sorted((r.start, r.end) for r in chosen)
    found, at = [], 0
    for entry in situation.firmware.entries:
        while at < len(starts) and starts[at][1] <= entry.start:
            at += 1
        if at < len(starts) and starts[at][0] < entry.end:
            continue
        reason = _not_ram(entry.kind, entry.words)
        if entry.kind is Kind.RAM:
            reason = _why_not(situation, request, entry.span, by_span[entry.span], size, budget, bool(chosen))
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
    places = _places(situation, Request(numa_node=request.numa_node))
    if not all(any(p.start <= r.start and r.end <= p.end for p in places) for r in existing):
        return False
    return _left(situation, _budget(situation), existing) >= request.min_free


def disagreements(situation: Situation) -> tuple[tuple[str, tuple[Span, ...]], ...]:
    """(source, ranges of 2 MiB and more above 4 GiB) that the map calls RAM and this source does not."""
    high = [Span(max(s.start, LOW_LIMIT), s.end) for s in situation.firmware.ram if s.end > LOW_LIMIT]
    found = []
    for name, allowed in situation.vetoes:
        spans = tuple(s for s in _subtract(high, _joined(allowed)) if s.size >= STEPS[-1])
        if spans:
            found.append((name, spans))
    return tuple(found)


def taken_by(line: CommandLine | None, ram: int) -> int:
    """Bytes of RAM that `crashkernel=` and huge pages will take of `ram` bytes."""
    if line is None:
        return 0
    return line.hugepages + sum(crashkernel_bytes(value, ram)[0] for value in line.crashkernel)


def crashkernel_bytes(value: str, ram: int) -> tuple[int, int | None]:
    """(size, fixed address or None) that `crashkernel=value` takes on a machine with `ram` bytes.

    Forms of kernel/crash_reserve.c: `256M`, `256M@1G`, `512M,high`, `1G-4G:192M,4G-:256M[@addr]`.
    `auto` and what cannot be read count as 256 MiB, which is what distributions take for it.
    """
    guess = 256 * MIB
    body, at, where = value.partition("@")
    try:
        address = parse_size(where) if at else None
        if ":" not in body:
            return parse_size(body.split(",")[0]), address
        for part in body.split(","):
            limits, _, size = part.partition(":")
            low, _, high = limits.partition("-")
            if parse_size(low) <= ram and (not high or ram < parse_size(high)):
                return parse_size(size), address
    except EmupmemError:
        return guess, None
    return 0, None


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


def _places(situation: Situation, request: Request) -> list[_Place]:
    """All stretches of RAM that keep the rules of place, lowest first, none crossing anything."""
    spans: Sequence[Span] = [
        Span(max(s.start, LOW_LIMIT), s.end) for s in situation.firmware.ram if s.end > LOW_LIMIT
    ]
    for _, allowed in situation.vetoes:
        spans = list(_intersect(spans, allowed))
    spans = list(_subtract(spans, _taken_spans(situation)))
    places = _split_nodes(spans, situation.nodes)
    if request.numa_node is not None:
        places = [p for p in places if p.node == request.numa_node]
    return places


def _taken_spans(situation: Situation) -> list[Span]:
    """What other words of the command line claim by address, sorted and joined."""
    line = situation.command_line
    if line is None:
        return []
    spans = [Span(i.start, i.start + i.size) for i in line.items if i.op in "!$#@%" and i.size]
    for value in line.crashkernel:
        size, where = crashkernel_bytes(value, situation.firmware.ram_bytes)
        if where is not None:
            spans.append(Span(where, where + size))
    return _joined(spans)


def _joined(spans: Iterable[Span]) -> list[Span]:
    """The union: sorted, neighbours and overlaps made one."""
    out: list[Span] = []
    for span in sorted(spans):
        if out and span.start <= out[-1].end:
            out[-1] = Span(out[-1].start, max(out[-1].end, span.end))
        else:
            out.append(span)
    return out


def _intersect(spans: Iterable[Span], allowed: Iterable[Span]) -> Iterator[Span]:
    """Parts of sorted `spans` inside the union of `allowed`; borders between spans stay borders."""
    union = _joined(allowed)
    at = 0
    for span in spans:
        while at < len(union) and union[at].end <= span.start:
            at += 1
        i = at
        while i < len(union) and union[i].start < span.end:
            yield Span(max(span.start, union[i].start), min(span.end, union[i].end))
            i += 1


def _subtract(spans: Iterable[Span], taken: Sequence[Span]) -> Iterator[Span]:
    """Parts of sorted `spans` outside the sorted, joined `taken`."""
    at = 0
    for span in spans:
        while at < len(taken) and taken[at].end <= span.start:
            at += 1
        start, i = span.start, at
        while i < len(taken) and taken[i].start < span.end:
            if start < taken[i].start:
                yield Span(start, taken[i].start)
            start = max(start, taken[i].end)
            i += 1
        if start < span.end:
            yield Span(start, span.end)


def _split_nodes(spans: Iterable[Span], nodes: Sequence[NodeRange]) -> list[_Place]:
    """Cut at node borders; what no node claims stays, as a place of its own without a node."""
    ranges = sorted(nodes, key=lambda n: n.start)
    out: list[_Place] = []
    at = 0
    for span in spans:
        while at < len(ranges) and ranges[at].end <= span.start:
            at += 1
        start, i = span.start, at
        while i < len(ranges) and ranges[i].start < span.end and start < span.end:
            if start < ranges[i].start:
                out.append(_Place(start, ranges[i].start, None))
            begin, end = max(start, ranges[i].start), min(span.end, ranges[i].end)
            if begin < end:
                last = out[-1] if out else None
                if last and last.end == begin > span.start and last.node == ranges[i].node:
                    out[-1] = _Place(last.start, end, last.node)  # one node told in several ranges
                else:
                    out.append(_Place(begin, end, ranges[i].node))
                start = end
            i += 1
        if start < span.end:
            out.append(_Place(start, span.end, None))
    return out


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


def _room(place: _Place, step: int) -> int:
    """The largest multiple of `step` that an aligned reservation in the place can have."""
    return max(0, (place.end - _up(place.start, step)) // step * step)


def _find(places: Sequence[_Place], request: Request) -> tuple[Reservation, ...] | None:
    assert request.size is not None
    for step in STEPS:
        if request.size % step or (request.offset or 0) % step:
            continue
        found = _fill(places, request.size, request.count, step, request.offset)
        if found is not None:
            return found
    return None


def _fill(
    places: Sequence[_Place], size: int, count: int, step: int, offset: int | None
) -> tuple[Reservation, ...] | None:
    """The `count` lowest reservations at multiples of `step`; the first exactly at `offset` if given."""
    found: list[Reservation] = []
    for place in places:
        at = _up(max(place.start, offset or 0), step)
        while at + size <= place.end:
            if not found and offset is not None and at != offset:
                return None
            found.append(Reservation(at, size, step, place.node))
            if len(found) == count:
                return tuple(found)
            at += size
    return None


# RAM that stays ---------------------------------------------------------------------------------


def _budget(situation: Situation) -> _Budget:
    """Total RAM, and what mem=, foreign memmap= items, crashkernel= and huge pages take of it."""
    total = situation.firmware.ram_bytes
    line = situation.command_line
    if line is None:
        return _Budget(total, 0)
    ram = list(_subtract(situation.firmware.ram, _foreign_spans(line)))
    limit = _limit(line)
    stays = sum(max(0, min(s.end, limit) - s.start) for s in ram if s.start < limit)
    kept = sum(page_structs(i.size) for i in line.reservations)
    return _Budget(total, total - stays + taken_by(line, total) + kept)


def _foreign_spans(line: CommandLine) -> list[Span]:
    return _joined(Span(i.start, i.start + i.size) for i in line.items if i.op in "!$#%")


def _limit(line: CommandLine) -> int:
    """The lowest address that mem= and bare memmap= cut RAM at (2^64 where none does)."""
    return min((*line.mem_limits, *(i.size for i in line.items if i.op == "limit")), default=1 << 64)


def _left(situation: Situation, budget: _Budget, chosen: Sequence[Reservation]) -> int:
    """RAM left in bytes; a reservation above mem= takes page structs only, its RAM is gone already."""
    limit = _limit(situation.command_line) if situation.command_line else 1 << 64
    above = sum(max(0, r.end - max(r.start, limit)) for r in chosen)
    return budget.left_after(sum(r.size for r in chosen)) + above


def _affordable(budget: _Budget, min_free: int) -> int:
    """The largest multiple of 2 MiB that leaves `min_free`."""
    spare = budget.total - budget.taken - min_free
    step = STEPS[-1]
    return max(0, spare * PAGE // (PAGE + STRUCT_PAGE)) // step * step


def _comfortable(situation: Situation, request: Request) -> int:
    """A size per device that leaves half of the RAM, a power of two; failing that, any that fits."""
    budget = _budget(situation)
    places = _places(situation, request)
    for floor in (max(request.min_free, budget.total // 2), request.min_free):
        size = 1 << 51
        while size >= STEPS[2]:
            chosen = _find(places, replace(request, size=size))
            if chosen is not None and _left(situation, budget, chosen) >= floor:
                return size
            size //= 2
    largest = _largest(situation, request, budget)
    raise NoPlan(
        "this machine has no room for a reservation",
        _roomless_hint(situation, request, budget),
        largest,
        rejected(situation, request, None),
    )


def _roomless_hint(situation: Situation, request: Request, budget: _Budget) -> str:
    if not any(s.end > LOW_LIMIT for s in situation.firmware.ram):
        return "all of its RAM is below 4 GiB, where the kernel, DMA and the initrd need it"
    if not _places(situation, request):
        return "none of its RAM above 4 GiB is free for it"
    return f"it has {human(budget.total - budget.taken)} of RAM; {human(request.min_free)} must stay (--min-free)"


def _largest(situation: Situation, request: Request, budget: _Budget) -> int:
    """The largest size per device, in steps of 2 MiB, that keeps all rules; 0 where none does.

    Both fitting and the floor only get harder as the size grows, so bisection finds it.
    """
    step = STEPS[-1]
    places = _places(situation, request)
    low, high = 0, max((p.end - p.start for p in places), default=0) // step
    while low < high:
        middle = (low + high + 1) // 2
        chosen = _fill(places, middle * step, request.count, step, request.offset)
        if chosen is not None and _left(situation, budget, chosen) >= request.min_free:
            low = middle
        else:
            high = middle - 1
    return low * step


# Words ------------------------------------------------------------------------------------------


def _no_plan(situation: Situation, request: Request, budget: _Budget, *, fits: bool) -> NoPlan:
    assert request.size is not None
    largest = _largest(situation, request, budget)
    each = "" if request.count == 1 else f"{request.count} times "
    if fits:
        left = max(0, budget.left_after(request.size * request.count))
        message = (
            f"{each}{human(request.size)} would leave {human(left)} of RAM, "
            f"less than the {human(request.min_free)} that must stay (--min-free)"
        )
    else:
        where = f" at {tight(request.offset)}" if request.offset is not None else ""
        node = f" on NUMA node {request.numa_node}" if request.numa_node is not None else ""
        message = f"no usable range has room for {each}{human(request.size)}{where}{node}"
    hint = (
        f"the largest size that fits is {format_size(largest)}"
        if largest
        else _roomless_hint(situation, request, budget)
    )
    return NoPlan(message, hint, largest, rejected(situation, request, None))


def _not_ram(kind: Kind, words: str) -> str:
    reasons = {
        Kind.RESERVED: "reserved by firmware",
        Kind.SOFT_RESERVED: "soft reserved: special-purpose memory that a driver owns",
        Kind.ACPI_DATA: "ACPI tables",
        Kind.ACPI_NVS: "ACPI non-volatile storage",
        Kind.UNUSABLE: "marked unusable by firmware",
        Kind.PMEM: "real persistent memory (type 7)",
        Kind.PRAM: "persistent already (type 12)",
    }
    return reasons.get(kind, f"not RAM: {words or 'unknown type'}")


def _why_not(
    situation: Situation,
    request: Request,
    span: Span,
    places: Sequence[_Place],
    size: int | None,
    budget: _Budget,
    planned: bool,
) -> str:
    """Why a usable range was not chosen."""
    if not places:
        return _why_no_place(situation, request, span)
    room = max(_room(p, STEPS[-1]) for p in places)
    if size is not None and room < size:
        what = f"{human(room)}"
        if room + STEPS[-1] <= max(p.end - p.start for p in places):
            what += " after alignment"
        return f"{what}, you asked for {human(size)}" if request.size is not None else f"{what}: too small"
    if planned:
        return "not needed: a lower range was chosen"
    if size is not None and budget.left_after(size * request.count) < request.min_free:
        return f"would leave {human(max(0, budget.left_after(size * request.count)))} of RAM"
    if request.offset is not None and not span.start <= request.offset < span.end:
        return f"not at the offset you asked for, {tight(request.offset)}"
    if size is not None:
        return f"has room for {room // size} of {request.count} devices of {human(size)}"
    return f"would leave less than {human(request.min_free)} of RAM"


def _why_no_place(situation: Situation, request: Request, span: Span) -> str:
    """Why no part of a usable range keeps the rules of place."""
    if span.end <= LOW_LIMIT:
        return _BELOW_4G
    high = [Span(max(span.start, LOW_LIMIT), span.end)]
    for name, allowed in situation.vetoes:
        if not any(s.size >= STEPS[-1] for s in _intersect(high, allowed)):
            return f"not RAM according to {name}"
    if not any(s.size >= STEPS[-1] for s in _subtract(high, _taken_spans(situation))):
        return (
            "taken by another word of the kernel command line" if high[0].size >= STEPS[-1] else _tiny(span)
        )
    nodes = {p.node for p in _split_nodes(high, situation.nodes)}
    if request.numa_node is not None and request.numa_node not in nodes:
        on = ", ".join(str(n) for n in sorted(n for n in nodes if n is not None)) or "none"
        return f"on NUMA node {on}, you asked for node {request.numa_node}"
    return _tiny(span)


def _tiny(span: Span) -> str:
    return f"{human(span.size)} only: no 2 MiB step lies inside"


def _group(entries: Sequence[Span], places: Sequence[_Place]) -> list[tuple[Span, list[_Place]]]:
    """The places that lie in each usable range; both sorted."""
    out: list[tuple[Span, list[_Place]]] = []
    at = 0
    for span in entries:
        inside: list[_Place] = []
        while at < len(places) and places[at].start < span.end:
            if _room(places[at], STEPS[-1]):
                inside.append(places[at])
            at += 1
        out.append((span, inside))
    return out


def _align_warnings(chosen: Sequence[Reservation]) -> list[str]:
    step = chosen[0].align
    if step >= 128 * MIB:
        return []
    return [f"aligned to {human(step)} only: kernels before 5.3 need 128 MiB, ndctl prefers 16 MiB"]


def _ram_warnings(budget: _Budget, left: int) -> list[str]:
    if left * 4 < budget.total:
        return ["less than a quarter of the RAM stays for the system"]
    return []


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
