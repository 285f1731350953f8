# SPDX-License-Identifier: Apache-2.0
"""Where a reservation may lie: usable ranges less all that is taken."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

from emupmem.kernel.cmdline import mem_limit, memparse
from emupmem.model import (
    LOW_LIMIT,
    MIB,
    CommandLine,
    Kind,
    Loss,
    MapEntry,
    NodeRange,
    Request,
    Reservation,
    Span,
)
from emupmem.planner.situation import BELOW_4G, STEPS, Situation
from emupmem.record import record
from emupmem.units import address, human, span_text


def disagreements(situation: Situation) -> tuple[tuple[str, tuple[Span, ...]], ...]:
    """(source, ranges of 2 MiB and more above 4 GiB) that the map calls RAM and this source does not.

    What the kernel's own lines say is lost is left out: those name it better.
    """
    lost = union_of((x.start, x.end) for x in situation.losses)
    high = list(subtract(high_places(situation), lost))
    found = []
    for name, allowed in situation.vetoes:
        outside = subtract(high, union_of((s.start, s.end) for s in allowed))
        spans = tuple(Span(p[0], p[1]) for p in outside if p[1] - p[0] >= STEPS[-1])
        if spans:
            found.append((name, spans))
    return tuple(found)


def gone(situation: Situation) -> list[tuple[int, int]]:
    """What the map calls RAM and the kernel does not have: by its own lines, or by another source (see above).

    What words of this boot took away is not meant: the next one has its own.
    """
    denied = ((s.start, s.end, 0, None) for _, spans in disagreements(situation) for s in spans)
    others = subtract(sorted(denied), union_of((s.start, s.end) for s in situation.asked))
    return union_of([*((x.start, x.end) for x in situation.losses), *((p[0], p[1]) for p in others)])


def taken_by(line: CommandLine | None, ram: int, hugepages: int = 0) -> int:
    """Bytes of RAM that `crashkernel=` and huge pages (at least `hugepages`) will take of `ram` bytes."""
    if line is None:
        return hugepages
    kernels = sum(crashkernel_bytes(value, ram)[0] for value in line.crashkernel)
    return max(line.hugepages, hugepages) + kernels


def takers(situation: Situation) -> tuple[str, ...]:
    """Each word beside the reservations that takes RAM, with what it takes, for people."""
    line = situation.command_line
    found: list[str] = []
    if line is not None:
        for limit in memory_limits(line):
            word = next((w for w in line.words if w.startswith("mem=") and mem_limit(w[4:]) == [limit]), "")
            word = word or next((f"memmap={i.text}" for i in line.items if i.size == limit), "mem=")
            found.append(f"{word}: all RAM above {human(limit)}")
        for item in line.items:
            if item.op in "$#@%" and item.size:
                found.append(f"memmap={item.text}: {span_text(item.start, item.start + item.size)}")
        found += [f"efi_fake_mem=: {span_text(s.start, s.end)}" for s in line.fake_mem]
        for value in line.crashkernel:
            size, where = crashkernel_bytes(value, situation.firmware.ram_bytes)
            at = f" at {address(where)}" if where is not None else ""
            found += [f"crashkernel={value}: {human(size)}{at}"] if size else []
    asked = line.hugepages if line is not None else 0
    if line is not None and asked and asked >= situation.hugepages:
        found.append(f"{line.hugepages_text}: {human(asked)}")
    elif situation.hugepages:
        found.append(f"huge pages that this machine has now: {human(situation.hugepages)}")
    return tuple(found)


def crashkernel_bytes(value: str, ram: int) -> tuple[int, int | None]:
    """(size, fixed address or None) that `crashkernel=value` takes on a machine with `ram` bytes.

    Forms of kernel/crash_reserve.c: `256M`, `256M@1G`, `512M,high`, `1G-4G:192M,4G-:256M[@addr]`.
    `auto` and what cannot be read count as 256 MiB, which is what distributions take for it.
    """
    guess = 256 * MIB
    body, at, place = value.partition("@")
    try:
        where = kernel_size(place) if at else None
        if ":" not in body:
            return kernel_size(body.split(",")[0]), where
        for part in body.split(","):
            limits, _, size = part.partition(":")
            low, _, high = limits.partition("-")
            if kernel_size(low) <= ram and (not high or ram < kernel_size(high)):
                return kernel_size(size), where
    except ValueError:
        return guess, None
    return 0, None


# Places --------------------------------------------------------------------------------------

# Plain tuples in here: a map may have 100,000 ranges, and a dataclass costs ten times a tuple.
Place = tuple[int, int, int, int | None]
"""(start, end, index of the map's entry, NUMA node or None where no node claims it)."""
_Pair = tuple[int, int]


@record
class Field:
    """Where reservations may lie: `places`, lowest first, none crossing anything, each with room for
    2 MiB; for every usable entry without a place the reason; and the steps of alignment, best first."""

    places: list[Place]
    reasons: dict[int, str]
    steps: tuple[int, ...] = STEPS


def high_places(situation: Situation) -> list[Place]:
    """The usable entries, as far as they lie at or above 4 GiB."""
    entries = enumerate(situation.firmware.entries)
    return [
        (max(e.start, LOW_LIMIT), e.end, i, None)
        for i, e in entries
        if e.kind is Kind.RAM and e.end > LOW_LIMIT
    ]


def field_of(situation: Situation, request: Request) -> Field:
    """Take away from the usable entries what each rule forbids; the rule that took the last is the reason."""
    entries, node = situation.firmware.entries, request.numa_node
    steps = situation.steps(request.kind)
    reasons: dict[int, str] = {}
    alive = {i for i, e in enumerate(entries) if e.kind is Kind.RAM}

    def keep(places: Iterable[Place], why: Callable[[int], str]) -> list[Place]:
        left = [p for p in places if room_in(p, steps[-1])]
        gone = alive - {p[2] for p in left}
        reasons.update((i, why(i)) for i in gone)
        alive.difference_update(gone)
        return left

    def tiny(i: int) -> str:
        if entries[i].end <= LOW_LIMIT:
            return BELOW_4G
        return f"{human(entries[i].size)} only: no {human(steps[-1])} step lies inside"

    places = keep(high_places(situation), tiny)
    lost = union_of((x.start, x.end) for x in situation.losses)
    places = keep(subtract(places, lost), lambda i: lost_ranges(situation.losses, entries[i]))
    for name, allowed in situation.vetoes:
        union = union_of((s.start, s.end) for s in allowed)
        places = keep(intersect(places, union), lambda i, name=name: f"not RAM according to {name}")  # type: ignore[misc]
    taken = _taken(situation)
    if taken:
        places = keep(subtract(places, taken), lambda i: "taken by another word of the kernel command line")
    limits = memory_limits(situation.command_line)
    if limits:
        # What the kernel took away before it adds ours has another history: it would make two devices of it.
        places = keep(_cut(places, limits), lambda i: "cut in two by mem= on the kernel command line")
        if request.kind.soft:  # of RAM only it is made; type 12 of anything
            places = keep((p for p in places if p[1] <= min(limits)), lambda i: "taken away by mem=")
    if situation.nodes:
        places = keep(
            _split_nodes(places, situation.nodes), lambda i: "in pieces that belong to different NUMA nodes"
        )
    if node is not None:
        on = {i: {p[3] for p in places if p[2] == i} for i in alive} if len(alive) < 1000 else {}
        places = keep([p for p in places if p[3] == node], lambda i: _other_node(on.get(i, set()), node))
    return Field(places, reasons, steps)


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
    return union_of(spans)


def memory_limits(line: CommandLine | None) -> list[int]:
    """Addresses above which `mem=` or a bare `memmap=` takes all RAM away, lowest first."""
    if line is None:
        return []
    return sorted({*line.mem_limits, *(i.size for i in line.items if i.op == "limit")})


def union_of(spans: Iterable[_Pair]) -> list[_Pair]:
    """Sorted, neighbours and overlaps made one."""
    out: list[_Pair] = []
    for start, end in sorted(spans):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], end))
        else:
            out.append((start, end))
    return out


def intersect(places: Iterable[Place], union: Sequence[_Pair]) -> Iterator[Place]:
    """Parts of sorted `places` inside `union`; borders between places stay borders."""
    at = 0
    for start, end, entry, node in places:
        while at < len(union) and union[at][1] <= start:
            at += 1
        i = at
        while i < len(union) and union[i][0] < end:
            yield max(start, union[i][0]), min(end, union[i][1]), entry, node
            i += 1


def subtract(places: Iterable[Place], taken: Sequence[_Pair]) -> Iterator[Place]:
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


def _split_nodes(places: Iterable[Place], nodes: Sequence[NodeRange]) -> Iterator[Place]:
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


def _cut(places: Iterable[Place], borders: Sequence[int]) -> Iterator[Place]:
    """The same places in pieces that no border lies inside of."""
    for start, end, entry, node in places:
        edges = [start, *(b for b in borders if start < b < end), end]
        yield from ((low, high, entry, node) for low, high in pairwise(edges))


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


def room_in(place: Place, step: int) -> int:
    """The largest multiple of `step` that an aligned reservation in the place can have."""
    return max(0, (place[1] - _up(place[0], step)) // step * step)


def rooms_of(field: Field, most: Callable[[Place], int] = lambda place: place[1]) -> dict[int, int]:
    """For each entry with a place the most that one reservation in it can have, `most` of each place at most."""
    rooms: dict[int, int] = {}
    for place in field.places:
        rooms[place[2]] = max(rooms.get(place[2], 0), min(room_in(place, field.steps[-1]), most(place)))
    return rooms


def find_places(
    field: Field, request: Request, places: Sequence[Place] | None = None
) -> tuple[Reservation, ...] | None:
    assert request.size is not None
    roomy = [p for p in (field.places if places is None else places) if p[1] - p[0] >= request.size]
    for step in field.steps:
        if request.size % step or (request.offset or 0) % step:
            continue
        found = fill_places(roomy, request.size, request.count, step, request.offset)
        if found is not None:
            return tuple(replace(r, kind=request.kind) for r in found)
    return None


def fill_places(
    places: Sequence[Place], size: int, count: int, step: int, offset: int | None
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


def high_losses(situation: Situation) -> tuple[Loss, ...]:
    """The losses that took RAM at or above 4 GiB, where there could have been a place."""
    high = high_places(situation)
    return tuple(x for x in situation.losses if any(intersect(high, [(x.start, x.end)])))


def kernel_size(text: str) -> int:
    """A size as the kernel reads it: `0400M` is octal, 256 MiB. Raises ValueError where more than a size is there."""
    size, rest = memparse(text)
    if rest or not text:
        raise ValueError(text)
    return size


def lost_ranges(losses: Sequence[Loss], entry: MapEntry) -> str:
    first = next(x for x in losses if x.start < entry.end and entry.start < x.end)
    return f"the kernel took it away: {first.why}"
