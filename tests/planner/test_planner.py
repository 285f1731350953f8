# SPDX-License-Identifier: Apache-2.0
"""The planner against brute force on small maps, against the document's example, and in its words."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emupmem.kernel.cmdline import parse_command_line
from emupmem.kernel.e820 import apply_memmap
from emupmem.model import (
    GIB,
    MIB,
    EmupmemError,
    FirmwareMap,
    KernelRelease,
    Kind,
    MapEntry,
    NodeRange,
    Plan,
    Request,
    Span,
)
from emupmem.planner.places import crashkernel_bytes
from emupmem.planner.plan import offers, plan, rejected, satisfied
from emupmem.planner.situation import STEPS, NoPlan, Situation, page_structs
from tests import examples

LOW = MapEntry(0x100000, 3 * GIB, Kind.RAM)
HOLE = MapEntry(3 * GIB, 4 * GIB, Kind.RESERVED)


def machine(*high: tuple[int, int], low: bool = True, **more: object) -> Situation:
    """A machine with 3 GiB below the hole and the given RAM ranges (start, end)."""
    entries = ([LOW, HOLE] if low else []) + [MapEntry(a, b, Kind.RAM) for a, b in high]
    return Situation(FirmwareMap(tuple(entries)), **more)  # type: ignore[arg-type]


DOCUMENT = machine((4 * GIB, 21 * GIB))


def test_the_documents_example_comes_out_to_the_byte() -> None:
    made = plan(DOCUMENT, Request(size=16 * GIB))
    assert made.memmap == "memmap=16G!4G"
    assert [(r.start, r.end) for r in made.reservations] == [(0x100000000, 0x4FFFFFFFF + 1)]
    assert made.page_structs == GIB // 4
    assert made.ram_left == 3 * GIB - 0x100000 + GIB - GIB // 4


def test_less_than_a_quarter_of_the_ram_is_a_warning() -> None:
    assert "less than a quarter" in plan(DOCUMENT, Request(size=16 * GIB)).warnings[0]
    assert not plan(DOCUMENT, Request(size=8 * GIB)).warnings


def test_without_a_size_half_of_the_ram_stays() -> None:
    made = plan(DOCUMENT, Request())
    assert made.memmap == "memmap=8G!4G"
    assert made.ram_left >= DOCUMENT.firmware.ram_bytes // 2


def test_a_tight_machine_gets_what_leaves_the_floor() -> None:
    made = plan(machine((4 * GIB, 5 * GIB)), Request(min_free=3 * GIB))
    assert made.ram_left >= 3 * GIB


def test_several_devices_are_one_argument() -> None:
    assert plan(DOCUMENT, Request(size=2 * GIB, count=3)).memmap == "memmap=2G!4G,2G!6G,2G!8G"


def test_one_range_per_device_skips_what_is_too_small() -> None:
    found = plan(machine((4 * GIB, 5 * GIB), (6 * GIB, 16 * GIB)), Request(size=2 * GIB, count=2))
    assert found.memmap == "memmap=2G!6G,2G!8G"


@pytest.mark.parametrize(
    ("start", "end", "size", "expected"),
    [
        (4 * GIB, 8 * GIB, GIB, "memmap=1G!4G"),
        (4 * GIB + MIB, 8 * GIB, GIB, "memmap=1G!5G"),  # 1 GiB steps fit further up
        (4 * GIB + MIB, 6 * GIB - MIB, GIB, "memmap=1G!4224M"),  # only 128 MiB steps fit
        (4 * GIB + MIB, 5 * GIB + 20 * MIB, GIB, "memmap=1G!4112M"),  # only 16 MiB steps fit
        (4 * GIB + MIB, 5 * GIB + 2 * MIB, GIB, "memmap=1G!4098M"),  # only 2 MiB steps fit
        (4 * GIB, 8 * GIB, 1536 * MIB, "memmap=1536M!4G"),
        (4 * GIB, 8 * GIB, 2 * MIB, "memmap=2M!4G"),
    ],
)
def test_the_largest_step_that_fits_is_taken(start: int, end: int, size: int, expected: str) -> None:
    assert plan(machine((start, end)), Request(size=size, min_free=0)).memmap == expected


def test_a_fine_step_is_said() -> None:
    made = plan(machine((4 * GIB + MIB, 5 * GIB + 2 * MIB)), Request(size=GIB, min_free=0))
    assert "aligned to 2 MiB only" in made.warnings[0]


@pytest.mark.parametrize(
    ("request_", "words", "hint"),
    [
        (Request(size=3 * MIB), "size 3M is not a multiple of 2 MiB", "take 2M or 4M"),
        (Request(size=1), "size 1 is not a multiple of 2 MiB", "take 2M"),
        (Request(size=GIB, offset=3 * GIB), "offset 3G is below 4 GiB", "use 4G or more"),
        (Request(size=GIB, offset=4 * GIB + MIB), "not a multiple of 2 MiB", "take 4G"),
        (Request(size=GIB, count=0), "0 devices", "1 to 4"),
        (Request(size=GIB, count=5), "5 memmap regions in all", "fewer devices"),
        (Request(size=GIB, numa_node=3), "there is no NUMA node 3", "no nodes are known"),
    ],
)
def test_requests_that_no_machine_can_serve(request_: Request, words: str, hint: str) -> None:
    with pytest.raises(EmupmemError) as caught:
        plan(DOCUMENT, request_)
    assert words in caught.value.message
    assert hint in caught.value.hint


def test_too_large_says_the_largest_that_fits_and_it_does() -> None:
    with pytest.raises(NoPlan) as caught:
        plan(DOCUMENT, Request(size=18 * GIB))
    assert "no usable range has room for 18 GiB" in caught.value.message
    assert caught.value.hint == "the largest size that fits is 17G"
    assert caught.value.largest == 17 * GIB
    assert plan(DOCUMENT, Request(size=17 * GIB)).ram_left >= 2 * GIB
    with pytest.raises(NoPlan):
        plan(DOCUMENT, Request(size=17 * GIB + STEPS[-1]))


def test_the_floor_is_kept() -> None:
    with pytest.raises(NoPlan, match=r"would leave 2.7 GiB of RAM, less than the 4 GiB that must stay"):
        plan(DOCUMENT, Request(size=17 * GIB, min_free=4 * GIB))


def test_a_machine_without_high_memory_has_no_room() -> None:
    with pytest.raises(NoPlan) as caught:
        plan(machine(), Request())
    assert caught.value.message == "this machine has no room for a reservation"
    assert "all of its RAM is below 4 GiB" in caught.value.hint


def test_the_command_line_takes_its_part() -> None:
    line = parse_command_line("memmap=1G$4G crashkernel=512M hugepagesz=1G hugepages=2")
    situation = dataclasses.replace(DOCUMENT, command_line=line)
    made = plan(situation, Request(size=8 * GIB))
    assert made.memmap == "memmap=8G!5G"
    total = DOCUMENT.firmware.ram_bytes
    assert made.ram_left == total - 8 * GIB - page_structs(8 * GIB) - GIB - 512 * MIB - 2 * GIB


def test_memory_above_a_limit_is_gone_for_the_system_anyway() -> None:
    situation = dataclasses.replace(DOCUMENT, command_line=parse_command_line("mem=4G"))
    made = plan(situation, Request(size=8 * GIB))
    assert made.ram_left == 3 * GIB - 0x100000 - page_structs(8 * GIB)


def test_a_fixed_crash_kernel_is_kept_clear() -> None:
    situation = dataclasses.replace(DOCUMENT, command_line=parse_command_line("crashkernel=256M@4G"))
    assert plan(situation, Request(size=GIB)).memmap == "memmap=1G!5G"


@pytest.mark.parametrize(
    ("value", "size", "where"),
    [
        ("256M", 256 * MIB, None),
        ("256M@1G", 256 * MIB, GIB),
        ("512M,high", 512 * MIB, None),
        ("1G-4G:192M,4G-64G:256M,64G-:512M", 256 * MIB, None),
        ("64G-:512M", 0, None),
        ("auto", 256 * MIB, None),
        ("nonsense@x", 256 * MIB, None),
    ],
)
def test_crashkernel(value: str, size: int, where: int | None) -> None:
    assert crashkernel_bytes(value, 16 * GIB) == (size, where)


def test_exactmap_is_refused() -> None:
    situation = dataclasses.replace(DOCUMENT, command_line=parse_command_line("memmap=exactmap memmap=8G@0"))
    with pytest.raises(EmupmemError, match="memmap=exactmap"):
        plan(situation, Request(size=GIB))


def test_more_than_four_regions_counts_those_of_others() -> None:
    line = parse_command_line("memmap=64K$3G,64K$2G,4K#1G")
    situation = dataclasses.replace(DOCUMENT, command_line=line)
    assert plan(situation, Request(size=GIB)).memmap == "memmap=1G!4G"
    with pytest.raises(EmupmemError, match="5 memmap regions in all") as caught:
        plan(situation, Request(size=GIB, count=2))
    assert "there are 3 already" in caught.value.hint
    free = dataclasses.replace(DOCUMENT, command_line=parse_command_line(f"{line.text} nokaslr"))
    assert plan(free, Request(size=GIB, count=2)).memmap == "memmap=1G!4G,1G!5G"


NODES = (NodeRange(0, 0, 10 * GIB), NodeRange(1, 10 * GIB, 21 * GIB))


def test_a_reservation_never_crosses_a_node() -> None:
    situation = dataclasses.replace(DOCUMENT, nodes=NODES)
    made = plan(situation, Request(size=8 * GIB))
    assert made.memmap == "memmap=8G!10G"
    assert made.reservations[0].numa_node == 1
    assert plan(situation, Request(size=2 * GIB, numa_node=1)).memmap == "memmap=2G!10G"
    assert plan(situation, Request(size=2 * GIB, numa_node=0)).memmap == "memmap=2G!4G"
    with pytest.raises(NoPlan, match="no usable range has room for 12 GiB"):
        plan(situation, Request(size=12 * GIB))
    with pytest.raises(EmupmemError) as caught:
        plan(situation, Request(size=GIB, numa_node=2))
    assert caught.value.hint == "nodes with memory: 0, 1"


def test_one_node_told_in_two_ranges_is_one_place() -> None:
    nodes = (NodeRange(0, 0, 6 * GIB), NodeRange(0, 6 * GIB, 21 * GIB))
    assert plan(dataclasses.replace(DOCUMENT, nodes=nodes), Request(size=16 * GIB)).memmap == "memmap=16G!4G"


def test_only_what_every_source_calls_ram_is_used() -> None:
    veto = (("/proc/iomem", (Span(0, 3 * GIB), Span(6 * GIB, 7 * GIB), Span(7 * GIB, 21 * GIB))),)
    situation = dataclasses.replace(DOCUMENT, vetoes=veto)
    assert plan(situation, Request(size=8 * GIB)).memmap == "memmap=8G!6G"


def test_offset_is_taken_at_its_word() -> None:
    assert plan(DOCUMENT, Request(size=GIB, offset=7 * GIB)).memmap == "memmap=1G!7G"
    assert plan(DOCUMENT, Request(size=GIB, count=2, offset=7 * GIB)).memmap == "memmap=1G!7G,1G!8G"
    with pytest.raises(NoPlan, match="no usable range has room for 2 GiB at 20G"):
        plan(DOCUMENT, Request(size=2 * GIB, offset=20 * GIB))


@pytest.mark.parametrize(
    ("release", "efi", "proposed", "words"),
    [
        (KernelRelease(6, 1, 85, "6.1.85"), True, True, "may place itself inside the reservation"),
        (KernelRelease(6, 1, 80, "6.1.80"), True, False, ""),
        (KernelRelease(6, 1, 93, "6.1.93"), True, False, ""),
        (KernelRelease(6, 6, 0, "6.6.0"), True, True, "nokaslr prevents it"),
        (KernelRelease(6, 6, 33, "6.6.33"), True, False, ""),
        (KernelRelease(6, 8, None, "6.8.0-60"), True, True, "nokaslr"),
        (KernelRelease(6, 9, 3, "6.9.3"), True, True, "nokaslr"),
        (KernelRelease(6, 9, 4, "6.9.4"), True, False, ""),
        (KernelRelease(6, 12, None, "6.12"), True, False, ""),
        (KernelRelease(6, 1, None, "6.1.0-18-amd64"), True, False, "the exact version"),
        (KernelRelease(6, 6, 5, "6.6.5"), False, False, ""),
        (KernelRelease(6, 6, 5, "6.6.5"), None, False, "if it is started by UEFI"),
        (None, True, False, "the exact version"),
    ],
)
def test_nokaslr_is_proposed_where_the_efi_stub_ignores_memmap(
    release: KernelRelease | None, efi: bool | None, proposed: bool, words: str
) -> None:
    made = plan(dataclasses.replace(DOCUMENT, efi=efi, kernel=release), Request(size=GIB))
    assert made.add_nokaslr is proposed
    assert (words in " ".join(made.warnings)) if words else not made.warnings


def test_nokaslr_that_is_there_needs_no_word() -> None:
    situation = dataclasses.replace(
        DOCUMENT, efi=True, kernel=KernelRelease(6, 6, 5), command_line=parse_command_line("quiet nokaslr")
    )
    assert not plan(situation, Request(size=GIB)).warnings


def reasons(situation: Situation, request: Request) -> dict[int, str]:
    try:
        made: Plan | None = plan(situation, request)
    except NoPlan:
        made = None
    return {r.start: r.reason for r in rejected(situation, request, made)}


def test_every_range_that_was_not_chosen_has_a_reason() -> None:
    situation = Situation(
        FirmwareMap(
            (
                LOW,
                HOLE,
                MapEntry(4 * GIB, 7 * GIB - 100 * MIB, Kind.RAM),
                MapEntry(7 * GIB, 8 * GIB, Kind.ACPI_NVS),
                MapEntry(8 * GIB, 16 * GIB, Kind.RAM),
                MapEntry(16 * GIB, 32 * GIB, Kind.RAM),
                MapEntry(32 * GIB, 32 * GIB + MIB, Kind.RAM),
                MapEntry(33 * GIB, 34 * GIB, Kind.SOFT_RESERVED),
                MapEntry(34 * GIB, 35 * GIB, Kind.UNKNOWN, "type 99"),
            )
        )
    )
    assert reasons(situation, Request(size=4 * GIB)) == {
        0x100000: "below 4 GiB: the kernel, DMA and the initrd need it",
        3 * GIB: "reserved by firmware",
        4 * GIB: "2.9 GiB, you asked for 4 GiB",
        7 * GIB: "ACPI non-volatile storage",
        16 * GIB: "not needed: a lower range was chosen",
        32 * GIB: "1 MiB only: no 2 MiB step lies inside",
        33 * GIB: "soft reserved: special-purpose memory that a driver owns",
        34 * GIB: "not RAM: type 99",
    }


def test_reasons_of_what_the_request_itself_rules_out() -> None:
    assert (
        reasons(DOCUMENT, Request(size=17 * GIB, min_free=4 * GIB))[4 * GIB] == "would leave 2.7 GiB of RAM"
    )
    on_one = dataclasses.replace(DOCUMENT, nodes=(NodeRange(0, 0, 4 * GIB), NodeRange(1, 4 * GIB, 21 * GIB)))
    assert reasons(on_one, Request(size=GIB, numa_node=0))[4 * GIB] == "on NUMA node 1, you asked for node 0"
    vetoed = dataclasses.replace(DOCUMENT, vetoes=(("the journal", (Span(0, 3 * GIB),)),))
    assert reasons(vetoed, Request(size=GIB))[4 * GIB] == "not RAM according to the journal"
    taken = dataclasses.replace(DOCUMENT, command_line=parse_command_line("memmap=17G$4G"))
    assert reasons(taken, Request(size=GIB))[4 * GIB] == "taken by another word of the kernel command line"


def test_offers_show_the_most_of_each_range() -> None:
    found = offers(DOCUMENT, Request())
    assert [o.at_most for o in found] == [0, 17 * GIB]
    assert found[0].reason.startswith("below 4 GiB")
    tight = offers(DOCUMENT, Request(min_free=10 * GIB))[1]
    assert 9 * GIB < tight.at_most < 10 * GIB
    assert tight.reason == "the rest keeps 10 GiB for the system"


def test_what_is_there_already_may_be_what_is_asked() -> None:
    there = plan(DOCUMENT, Request(size=4 * GIB, offset=6 * GIB)).reservations
    assert satisfied(DOCUMENT, Request(size=4 * GIB), there)
    assert satisfied(DOCUMENT, Request(size=4 * GIB, offset=6 * GIB), there)
    assert not satisfied(DOCUMENT, Request(size=4 * GIB, offset=4 * GIB), there)
    assert not satisfied(DOCUMENT, Request(size=2 * GIB), there)
    assert not satisfied(DOCUMENT, Request(size=4 * GIB, count=2), there)
    assert not satisfied(machine((4 * GIB, 8 * GIB)), Request(size=4 * GIB), there)


# Against brute force ----------------------------------------------------------------------------------

UNIT = 2 * MIB


@st.composite
def small_maps(draw: st.DrawFn) -> Situation:
    """A few entries of some MiB above 4 GiB, borders off the 2 MiB grid at times, nodes, a veto, a taker."""
    at, entries = 4 * GIB - draw(st.integers(0, 3)) * UNIT, []
    for _ in range(draw(st.integers(1, 5))):
        at += draw(st.sampled_from([0, 0, MIB, UNIT, 5 * MIB]))
        size = draw(st.integers(1, 160)) * MIB
        kind = draw(st.sampled_from([Kind.RAM, Kind.RAM, Kind.RAM, Kind.RESERVED]))
        entries.append(MapEntry(at, at + size, kind))
        at += size
    nodes: tuple[NodeRange, ...] = ()
    if draw(st.booleans()):
        cut = draw(st.integers(4 * GIB // MIB, max(at // MIB, 4 * GIB // MIB))) * MIB
        nodes = (NodeRange(0, 0, cut), NodeRange(1, cut + draw(st.integers(0, 9)) * MIB, 1 << 40))
    vetoes: tuple[tuple[str, tuple[Span, ...]], ...] = ()
    if draw(st.booleans()):
        start = draw(st.integers(4 * GIB // MIB, max(at // MIB, 4 * GIB // MIB))) * MIB
        vetoes = (("other", (Span(0, start), Span(start + draw(st.integers(0, 20)) * MIB, 1 << 40))),)
    line = None
    if draw(st.booleans()):
        where = draw(st.integers(4 * GIB // MIB, max(at // MIB, 4 * GIB // MIB)))
        line = parse_command_line(f"memmap={draw(st.integers(1, 30))}M${where}M")
    return Situation(FirmwareMap((LOW, *entries)), vetoes, nodes, line)


def allowed(situation: Situation, start: int, size: int, node: int | None) -> bool:
    """The rules of place, written down once more and naively."""
    end = start + size
    if start < 4 * GIB or start % UNIT or size % UNIT:
        return False
    if not any(e.kind is Kind.RAM and e.start <= start and end <= e.end for e in situation.firmware.entries):
        return False
    for _, spans in situation.vetoes:
        joined = sorted(spans)
        at = start
        for span in joined:
            if span.start <= at < span.end:
                at = span.end
        if at < end:
            return False
    for item in situation.command_line.items if situation.command_line else ():
        if item.start < end and start < item.start + item.size:
            return False
    nodes = {
        next((n.node for n in situation.nodes if n.start <= a < n.end), None) for a in range(start, end, MIB)
    }
    return len(nodes) == 1 and (node is None or nodes == {node})


def exhaustive(situation: Situation, request: Request) -> bool:
    """Whether any choice of places keeps the rules, by trying all starts."""
    assert request.size is not None
    top = max(e.end for e in situation.firmware.entries)
    starts = [a for a in range(4 * GIB, top, UNIT) if allowed(situation, a, request.size, request.numa_node)]
    if request.offset is not None:
        if request.offset not in starts:
            return False
        starts = [a for a in starts if a == request.offset or a >= request.offset + request.size]
    count, last = 0, -1
    for a in starts:  # intervals of one size: taking the earliest end first gives the most
        if a >= last:
            count, last = count + 1, a + request.size
    return count >= request.count


@examples(300)
@given(
    small_maps(),
    st.integers(1, 60),
    st.integers(1, 3),
    st.one_of(st.none(), st.integers(0, 200)),
    st.sampled_from([None, None, 0, 1]),
)
def test_it_finds_a_place_exactly_when_there_is_one(
    situation: Situation, units: int, count: int, offset: int | None, node: int | None
) -> None:
    if node is not None and node not in {n.node for n in situation.nodes}:
        node = None
    where = None if offset is None else 4 * GIB + offset * UNIT
    request = Request(units * UNIT, count, where, 0, node)
    possible = exhaustive(situation, request)
    try:
        made = plan(situation, request)
    except NoPlan as exc:
        assert not possible
        if exc.largest:
            smaller = dataclasses.replace(request, size=exc.largest)
            assert exhaustive(situation, smaller)
            assert not exhaustive(situation, dataclasses.replace(request, size=exc.largest + UNIT))
            assert plan(situation, smaller).reservations
        return
    assert possible
    for r in made.reservations:
        assert allowed(situation, r.start, r.size, node)
        assert r.start % r.align == 0
        assert r.size % r.align == 0
    for a, b in itertools.pairwise(made.reservations):
        assert a.end <= b.start
    seen = parse_command_line(made.memmap)
    assert [(i.start, i.size) for i in seen.items] == [(r.start, r.size) for r in made.reservations]
    kernel_sees = apply_memmap(situation.firmware, seen)
    pieces = [(e.start, e.size) for e in kernel_sees if e.kind is Kind.PRAM]
    assert pieces == [(r.start, r.size) for r in made.reservations]


# What other words of the command line take -------------------------------------------------------------


def test_crashkernel_is_read_by_the_kernels_numbers() -> None:
    assert crashkernel_bytes("0400M", 16 * GIB) == (256 * MIB, None)
    assert crashkernel_bytes("0x10000000@0x100000000", 16 * GIB) == (256 * MIB, 4 * GIB)
    assert crashkernel_bytes("0-:0100M", 16 * GIB) == (64 * MIB, None)
    assert crashkernel_bytes("256MB", 16 * GIB) == (256 * MIB, None)  # not a size: the guess
    assert crashkernel_bytes("512M@", 16 * GIB) == (256 * MIB, None)


def test_efi_fake_mem_is_taken() -> None:
    line = parse_command_line("quiet efi_fake_mem=1G@8G:0x40000,2G@0x280000000:0x10000")
    assert line.fake_mem == (Span(8 * GIB, 9 * GIB), Span(10 * GIB, 12 * GIB))
    situation = dataclasses.replace(DOCUMENT, command_line=line)
    assert plan(situation, Request(size=8 * GIB)).reservations[0].start == 12 * GIB
    with pytest.raises(NoPlan, match="no usable range"):
        plan(situation, Request(size=GIB, offset=8 * GIB))
    assert plan(situation, Request(size=GIB)).ram_left == plan(DOCUMENT, Request(size=GIB)).ram_left - 3 * GIB
    assert parse_command_line("efi_fake_mem=1G efi_fake_mem=@8G efi_fake_mem=x").fake_mem == ()


@pytest.mark.parametrize(
    ("words", "hugepages", "why"),
    [
        (
            "default_hugepagesz=1G hugepages=256",
            0,
            "default_hugepagesz=1G hugepages=256 takes all of its 19.9 GiB of RAM",
        ),
        ("crashkernel=64G", 0, "crashkernel=64G takes all of its 19.9 GiB of RAM"),
        ("", 64 * GIB, "what is set up as huge pages takes all of its 19.9 GiB of RAM"),
    ],
)
def test_what_takes_all_of_the_ram_is_named(words: str, hugepages: int, why: str) -> None:
    situation = dataclasses.replace(DOCUMENT, command_line=parse_command_line(words), hugepages=hugepages)
    for size in (None, GIB):
        with pytest.raises(NoPlan) as caught:
            plan(situation, Request(size=size))
        assert caught.value.hint == why
