# SPDX-License-Identifier: Apache-2.0
"""The model of the kernel's command line reader: what it says must be what a kernel does."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emupmem.editor.quoting import items_of
from emupmem.kernel.cmdline import (
    COMMAND_LINE_MAX,
    format_memmap,
    format_size,
    is_cut,
    kaslr_avoided,
    kaslr_limit,
    memmap_region_count,
    memparse,
    parse_command_line,
    parse_memmap_value,
)
from emupmem.kernel.e820 import apply_memmap
from emupmem.model import (
    GIB,
    KIB,
    MIB,
    TIB,
    DeviceKind,
    EmupmemError,
    FirmwareMap,
    Kind,
    MapEntry,
    MemmapItem,
    Reservation,
    Span,
)

U64 = (1 << 64) - 1


def firmware(*entries: tuple[int, int, Kind]) -> FirmwareMap:
    return FirmwareMap(tuple(MapEntry(*e) for e in entries))


THREE_GIB = firmware(
    (0, 0x9FC00, Kind.RAM),
    (0x9FC00, 0xA0000, Kind.RESERVED),
    (0xF0000, MIB, Kind.RESERVED),
    (MIB, 0x7FFDF000, Kind.RAM),
    (0x7FFDF000, 0x80000000, Kind.RESERVED),
    (0xFFFC0000, 4 * GIB, Kind.RESERVED),
    (4 * GIB, 5 * GIB, Kind.RAM),
)


def after(line: str, before: FirmwareMap = THREE_GIB) -> list[tuple[int, int, Kind]]:
    return [(e.start, e.end, e.kind) for e in apply_memmap(before, parse_command_line(line))]


@pytest.mark.parametrize(
    ("text", "value", "rest"),
    [
        ("", 0, ""),
        ("4G", 4 * GIB, ""),
        ("4g!12G", 4 * GIB, "!12G"),
        ("1.5G!1G", 1, ".5G!1G"),
        ("256MB!1G", 256 * MIB, "B!1G"),
        ("2GiB", 2 * GIB, "iB"),
        ("2T", 2 * TIB, ""),
        ("1p", 1 << 50, ""),
        ("1E", 1 << 60, ""),
        ("16E", 0, ""),  # wraps
        ("0x10", 16, ""),
        ("0X10k", 16 * KIB, ""),
        ("0x1E", 30, ""),  # E is a digit there
        ("0x", 0, "x"),
        ("0xg", 0, "xg"),
        ("010", 8, ""),
        ("08", 0, "8"),
        ("010G", 8 * GIB, ""),
        ("-1", 0, "-1"),
        (" 1", 0, " 1"),
        ("G", 0, ""),  # the kernel takes the letter even without a number
        ("18446744073709551615", U64, ""),
        ("18446744073709551616", 0, ""),
        ("18446744073709551617K", KIB, ""),
        ("٣", 0, "٣"),
        ("1\u212a", 1, "\u212a"),  # the Kelvin sign is no suffix
    ],
)
def test_memparse(text: str, value: int, rest: str) -> None:
    assert memparse(text) == (value, rest)


@given(
    st.integers(0, U64),
    st.sampled_from(["", "K", "m", "G", "t", "P", "e"]),
    st.sampled_from(["", "!1", ",", "z"]),
)
def test_memparse_scales_and_wraps(number: int, suffix: str, rest: str) -> None:
    shift = 10 * (" kmgtpe".index(suffix.lower()) if suffix else 0)
    assert memparse(f"{number}{suffix}{rest}") == ((number << shift) & U64, rest)
    if not suffix:
        assert memparse(f"{number:#x}{rest}") == (number, rest)
        assert memparse(f"0{number:o}{rest}") == (number, rest)


@given(st.text(max_size=30))
def test_memparse_leaves_a_rest_of_the_text(text: str) -> None:
    value, rest = memparse(text)
    assert text.endswith(rest)
    assert 0 <= value <= U64


# Sizes for the kernel ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (1, "1"),
        (KIB, "1K"),
        (1536 * MIB, "1536M"),
        (4 * GIB, "4G"),
        (TIB, "1024G"),
        (4097, "4097"),
        (3 * KIB, "3K"),
    ],
)
def test_format_size(size: int, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(1, U64))
def test_format_size_is_read_back(size: int) -> None:
    text = format_size(size)
    assert memparse(text) == (size, "")
    assert not text.startswith("0")
    assert text.rstrip("KMG").isdigit()


@pytest.mark.parametrize("size", [0, -1, 1 << 64])
def test_format_size_refuses(size: int) -> None:
    with pytest.raises(EmupmemError, match=f"^{size} bytes cannot be a size on the kernel command line$"):
        format_size(size)


def reservations(pairs: Iterable[tuple[int, int]], kind: DeviceKind = DeviceKind.PMEM) -> list[Reservation]:
    """Of pairs (size, start)."""
    return [Reservation(start, size, 1, kind=kind) for size, start in pairs]


def test_format_memmap_is_one_list() -> None:
    assert format_memmap(reservations([(16 * GIB, 4 * GIB)])) == "memmap=16G!4G"
    two = [(GIB, 4 * GIB), (1536 * MIB, 8 * GIB)]
    assert format_memmap(reservations(two)) == "memmap=1G!4G,1536M!8G"
    mixed = [*reservations(two[:1]), *reservations(two[1:], DeviceKind.MEMORY)]
    assert format_memmap(mixed) == "memmap=1G!4G,1536M%8G-1+0xefffffff"
    assert format_memmap(reservations(two[:1], DeviceKind.DAX)) == "memmap=1G%4G-1+0xefffffff"


@pytest.mark.parametrize(
    ("item", "soft"),
    [
        ("1G%4G-1+0xefffffff", True),
        ("1024M%0x100000000-0x1+0XEFFFFFFF", True),
        ("1G%4G-01+4026531839", True),
        ("1G%4G-1+12", False),
        ("1G%4G-2+0xefffffff", False),
        ("1G%4G+0xefffffff", False),
        ("1G%4G-1+0xefffffffx", False),
        ("1G%4G-1", False),
        ("1G!4G", False),
    ],
)
def test_which_items_are_reservations(item: str, soft: bool) -> None:
    """One notion of it for the kernel's words and for the editor's text."""
    line = parse_command_line(f"memmap={item}")
    assert [i.soft for i in line.items] == [soft]
    ours = [i.text for i in line.reservations]
    assert ours == list(items_of(f"memmap={item}")) == ([item] if soft or "!" in item else [])
    assert [i.text for i in (*line.pmem, *line.soft)] == ours


def test_what_limits_the_place_of_the_kernel() -> None:
    for words, limit in (
        ("memmap=2G%4G-1+0xefffffff,1G!8G", 2 * GIB),
        ("memmap=2G%4G-1+12 memmap=1G%8G-1 mem=512M", 512 * MIB),
        ("memmap=1G!0 memmap=3G", GIB),
        ("memmap=1G!4G,1G@8G", 1 << 64),
    ):
        assert kaslr_limit(parse_command_line(words)) == limit, words


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "needs at least one reservation"),
        ([(GIB, 4 * GIB), (GIB, 4 * GIB)], "overlap"),
        ([(2 * GIB, 4 * GIB), (GIB, 5 * GIB)], "overlap"),
        ([(GIB, U64 - MIB)], "beyond 64 bits"),
        ([(0, 4 * GIB)], "0 bytes cannot be"),
        ([(GIB, 0)], "0 bytes cannot be"),
        ([(GIB, n * GIB) for n in range(1000)], "cannot be|would not read"),
        (
            [(GIB, (n + 4) * GIB) for n in range(400)],
            "the kernel would not read memmap=1G!4G,",
        ),  # over 2047 bytes
    ],
)
def test_format_memmap_refuses(pairs: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(EmupmemError, match=message):
        format_memmap(reservations(pairs))


@given(st.lists(st.integers(1, 1 << 20), min_size=1, max_size=8))
def test_format_memmap_is_read_back(steps: list[int]) -> None:
    start, pairs = 4 * GIB, []
    for step in steps:
        pairs.append((step * 2 * MIB, start))
        start += step * 2 * MIB
    for kind in (DeviceKind.PMEM, DeviceKind.DAX):
        items = parse_command_line(f"ro {format_memmap(reservations(pairs, kind))} quiet").reservations
        assert [(i.size, i.start, i.soft) for i in items] == [(*pair, kind.soft) for pair in pairs]


# Items ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "items"),
    [
        ("4G!12G", [("!", 4 * GIB, 12 * GIB)]),
        ("64K$0x18690000", [("$", 64 * KIB, 0x18690000)]),
        ("1M@2M,3M#4M", [("@", MIB, 2 * MIB), ("#", 3 * MIB, 4 * MIB)]),
        ("4G", [("limit", 4 * GIB, 0)]),
        ("4G!", [("!", 4 * GIB, 0)]),
        ("1.5G!1G", [("limit", 1, 0)]),
        ("256MB!1G", [("limit", 256 * MIB, 0)]),
        ("2G\\!1G", [("limit", 2 * GIB, 0)]),
        ('2G"!1G', [("limit", 2 * GIB, 0)]),
        ("4G:12G", [("limit", 4 * GIB, 0)]),
        ("4G!12GB", [("!", 4 * GIB, 12 * GIB)]),  # junk behind the item is dropped
        ("4G! 12G", [("!", 4 * GIB, 0)]),
        ("4G%12G-1+12", [("%", 4 * GIB, 12 * GIB)]),
        ("exactmap", [("exactmap", 0, 0)]),
        ("exactmapping,1G!4G", [("exactmap", 0, 0), ("!", GIB, 4 * GIB)]),
        ("exact", [("limit", 0, 0)]),  # the e is a suffix
        ("xact", []),
        ("", []),
        (",,1G!4G,", [("!", GIB, 4 * GIB)]),
        ("!4G", []),
        ("off", []),
        ("G", [("limit", 0, 0)]),
    ],
)
def test_parse_memmap_value(value: str, items: list[tuple[str, int, int]]) -> None:
    assert [(i.op, i.size, i.start) for i in parse_memmap_value(value)] == items


def test_items_keep_their_text() -> None:
    assert [i.text for i in parse_memmap_value("1G!4G,64K$0x10000,512M")] == ["1G!4G", "64K$0x10000", "512M"]


# Words ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", ()),
        ("   ro  quiet \n", ("ro", "quiet")),
        ('a="b c" d', ("a=b c", "d")),
        ('"a=b c" d', ("a=b c", "d")),
        ('a=b" "c d', ('a=b" "c', "d")),  # quotes inside stay
        ('a="b', ("a=b",)),  # never closed: to the end of the line
        ('a="b c', ("a=b c",)),
        ('a="', ("a=",)),
        ('"a', ("a",)),
        ('"a"', ("a",)),
        ('""', ("",)),
        ('"a"="b c"', ('a"=b c',)),
        ("=a=b", ("=a=b",)),
        ("ro -- memmap=1G!4G", ("ro",)),
        ("ro --=x memmap=1G!4G", ("ro", "--=x", "memmap=1G!4G")),
        ("a\tb\vc\fd\re", ("a", "b", "c", "d", "e")),
        ("acpi_osi='!Windows 2012'", ("acpi_osi='!Windows", "2012'")),
        ("name=Jürgen x", ("name=Jürgen", "x")),
    ],
)
def test_words(line: str, words: tuple[str, ...]) -> None:
    assert parse_command_line(line).words == words


def test_latin1_blank_ends_a_word_as_in_the_kernel() -> None:
    # isspace(0xa0) is true in the kernel, and U+00A0 is c2 a0 in UTF-8
    assert len(parse_command_line("a\u00a0b").words) == 2


def test_all_of_a_line() -> None:
    line = parse_command_line(
        'BOOT_IMAGE=/vmlinuz root=UUID=1 memmap=4G!12G "memmap=1G!20G,2M$64M" mem=32G mem=nopentium mem=0 '
        "crashkernel=1G-4G:192M,4G-64G:256M crashkernel=64M,low hugepagesz=1G hugepages=2 nokaslr quiet"
    )
    assert [i.text for i in line.items] == ["4G!12G", "1G!20G", "2M$64M"]
    assert [i.text for i in line.reservations] == ["4G!12G", "1G!20G"]
    assert line.mem_limits == (32 * GIB,)
    assert line.crashkernel == ("1G-4G:192M,4G-64G:256M", "64M,low")
    assert line.hugepages == 2 * GIB
    assert line.hugepages_text == "hugepagesz=1G hugepages=2"
    assert line.nokaslr


def test_memmap_without_a_value_does_nothing() -> None:
    assert parse_command_line("memmap mem crashkernel hugepages").items == ()


def test_what_begins_behind_2047_bytes_is_not_read() -> None:
    filler = "x" * (COMMAND_LINE_MAX - len(" memmap=4G!1"))
    line = f"{filler} memmap=4G!12G"
    assert parse_command_line(line).items == (MemmapItem("!", 4 * GIB, 1, "4G!1"),)
    assert is_cut(line)
    assert not is_cut(line[:COMMAND_LINE_MAX] + "\n")
    assert is_cut("ü" * 1024)


def test_nokaslr_is_a_bare_word_anywhere() -> None:
    assert parse_command_line("ro -- nokaslr").nokaslr
    assert not parse_command_line("nokaslr=1").nokaslr
    assert not parse_command_line("xnokaslr").nokaslr


@given(st.text())
def test_any_text_is_read(text: str) -> None:
    line = parse_command_line(text)
    assert line.text == text
    kaslr_avoided(line)


@given(
    st.lists(
        st.sampled_from(["memmap=1G!4G", '"memmap=2G!8G"', "ro", 'a="b c"', "--x", "mem=9G"]), max_size=8
    )
)
def test_words_are_read_one_by_one(words: list[str]) -> None:
    line = parse_command_line("  ".join(words))
    assert len(line.words) == len(words)
    assert len(line.items) == sum("memmap" in w for w in words)


@pytest.mark.parametrize(
    ("line", "size"),
    [
        ("hugepages=512", GIB),
        ("hugepagesz=1G hugepages=4", 4 * GIB),
        ("hugepages=4 hugepagesz=1G", 8 * MIB),
        ("default_hugepagesz=1G hugepages=4", 4 * GIB),
        ("hugepages=4 default_hugepagesz=1G", 4 * GIB),
        ("hugepagesz=1G hugepages=2 hugepagesz=2M hugepages=8", 2 * GIB + 16 * MIB),
        ("hugepagesz=2M hugepages=0:2,1:3", 10 * MIB),
        ("hugepagesz=1G hugepages=2 hugepages=9", 2 * GIB),  # twice without a size between: ignored
        ("hugepagesz=1G hugepages=2 hugepagesz=2M hugepagesz=1G hugepages=9", 2 * GIB),  # size given twice
        ("hugepagesz=4M hugepages=3", 0),  # no such size
        ("hugepagesz=3M hugepages=3 hugepages=5", 10 * MIB),
        ("hugepages=x", 0),
        ("hugepages=", 0),
    ],
)
def test_hugepages(line: str, size: int) -> None:
    assert parse_command_line(line).hugepages == size


# Address randomisation -------------------------------------------------------------------------


def test_region_count() -> None:
    line = parse_command_line(
        "memmap=1G!4G,2M$64M,1M#32M memmap=1G@2G memmap=1G!0 memmap=4G memmap=1G%2G-1+12"
    )
    assert memmap_region_count(line) == 3


FIVE = ["2M!4100M", "2M!4200M", "2M!4300M", "2M!4400M", "1792M!64M"]


def test_fifth_separate_memmap_is_neither_avoided_nor_noticed() -> None:
    spans, gives_up = kaslr_avoided(parse_command_line(" ".join(f"memmap={i}" for i in FIVE)))
    assert len(spans) == 4
    assert spans[0] == Span(4100 * MIB, 4102 * MIB)
    assert not gives_up


def test_fifth_of_one_list_turns_randomising_off() -> None:
    spans, gives_up = kaslr_avoided(parse_command_line(f"memmap={','.join(FIVE)}"))
    assert len(spans) == 4
    assert gives_up


def test_four_are_fine() -> None:
    spans, gives_up = kaslr_avoided(parse_command_line(f"memmap={','.join(FIVE[:4])}"))
    assert len(spans) == 4
    assert not gives_up


def test_exactmap_ends_what_randomising_reads_of_a_list() -> None:
    assert kaslr_avoided(parse_command_line("memmap=exactmap,1G!4G")) == ((), False)
    assert kaslr_avoided(parse_command_line("memmap=1G%4G-1+12,1G@4G,5G")) == ((), False)


# The map after the command line ------------------------------------------------------------------


def test_nothing_changes_without_memmap() -> None:
    assert after("ro quiet") == [(e.start, e.end, e.kind) for e in THREE_GIB.entries]


def test_a_reservation_is_cut_out_of_ram() -> None:
    assert after("memmap=256M!1G")[3:6] == [
        (MIB, GIB, Kind.RAM),
        (GIB, GIB + 256 * MIB, Kind.PRAM),
        (GIB + 256 * MIB, 0x7FFDF000, Kind.RAM),
    ]


def test_persistent_beats_reserved_and_fills_holes() -> None:
    # seen in a virtual machine: memmap=1G!1536M over the end of low RAM gives three pieces
    assert [e for e in after("memmap=1G!1536M") if e[2] is Kind.PRAM] == [
        (1536 * MIB, 0x7FFDF000, Kind.PRAM),
        (0x7FFDF000, 0x80000000, Kind.PRAM),
        (0x80000000, 2560 * MIB, Kind.PRAM),
    ]


def test_neighbours_stay_apart_and_overlaps_are_cut_at_every_border() -> None:
    assert sum(e[2] is Kind.PRAM for e in after("memmap=128M!1G,128M!1152M")) == 2
    assert sum(e[2] is Kind.PRAM for e in after("memmap=256M!1G memmap=256M!1152M")) == 3
    assert sum(e[2] is Kind.PRAM for e in after("memmap=256M!1G memmap=256M!1G")) == 1


def test_past_the_end_of_ram() -> None:
    assert after("memmap=256M!8G")[-1] == (8 * GIB, 8 * GIB + 256 * MIB, Kind.PRAM)


def test_soft_reserved_beats_persistent() -> None:
    before = firmware((0, GIB, Kind.RAM), (GIB, 2 * GIB, Kind.SOFT_RESERVED))
    assert after("memmap=1G!512M", before)[1:] == [
        (GIB // 2, GIB, Kind.PRAM),
        (GIB, 3 * GIB // 2, Kind.SOFT_RESERVED),  # this type is cut at every border as well
        (3 * GIB // 2, 2 * GIB, Kind.SOFT_RESERVED),
    ]


@pytest.mark.parametrize("line", ["mem=1G", "memmap=1G", "memmap=1GB!4G", "memmap=1G\\!4G"])
def test_a_limit_takes_ram_only(line: str) -> None:
    made = after(f"{line} memmap=256M!4G")
    assert [e for e in made if e[2] is Kind.RAM] == [(0, 0x9FC00, Kind.RAM), (MIB, GIB, Kind.RAM)]
    assert (4 * GIB, 4 * GIB + 256 * MIB, Kind.PRAM) in made
    assert (0x7FFDF000, 0x80000000, Kind.RESERVED) in made


def test_order_matters_between_mem_and_added_ram() -> None:
    assert (8 * GIB, 9 * GIB, Kind.RAM) in after("mem=1G memmap=1G@8G")
    assert (8 * GIB, 9 * GIB, Kind.RAM) not in after("memmap=1G@8G mem=1G")


def test_exactmap_drops_what_came_before() -> None:
    assert after("memmap=1G!4G memmap=exactmap memmap=640K@0 memmap=1G@1M") == [
        (0, 640 * KIB, Kind.RAM),
        (MIB, MIB + GIB, Kind.RAM),
    ]


def test_percent_changes_one_type_only() -> None:
    made = after("memmap=1G%1536M-1+12")
    assert [e for e in made if e[2] is Kind.PRAM] == [(1536 * MIB, 0x7FFDF000, Kind.PRAM)]
    assert (0x7FFDF000, 0x80000000, Kind.RESERVED) in made
    assert after("memmap=1G%1536M-1+12x") == after("")  # junk behind it: no effect
    assert (4 * GIB, 5 * GIB, Kind.RAM) not in after("memmap=1G%4G-1")
    assert after("memmap=1G%4G") == after("")[:-1]
    assert after("memmap=1G%8G+12")[-1] == (8 * GIB, 9 * GIB, Kind.PRAM)
    assert (4 * GIB + 512 * MIB, 5 * GIB, Kind.RAM) in after("memmap=512M%4G-1")


def test_unknown_type_numbers_keep_their_number() -> None:
    before = FirmwareMap((MapEntry(0, GIB, Kind.RAM), MapEntry(GIB, 2 * GIB, Kind.UNKNOWN, "type 20")))
    made = apply_memmap(before, parse_command_line("memmap=512M!1G"))
    assert [(e.kind, e.words) for e in made[1:]] == [(Kind.UNKNOWN, "type 20")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("memmap=exactmap memmap=1G@0", "Invalid user supplied memory map"),
        ("memmap=1G!0xffffffffffffffff", "Invalid user supplied memory map"),
        ("memmap=1G%1G-1+1", "changes a type into itself"),
    ],
)
def test_apply_memmap_refuses_what_stops_the_kernel(line: str, message: str) -> None:
    with pytest.raises(EmupmemError, match=message):
        after(line)


SPAN = st.tuples(st.integers(1, 64), st.integers(0, 64)).map(lambda s: (s[0] * 64 * MIB, s[1] * 64 * MIB))


@given(st.lists(SPAN, max_size=6), st.booleans())
def test_every_byte_has_the_highest_type(spans: list[tuple[int, int]], in_one: bool) -> None:
    items = [f"{size}!{start}" for size, start in spans]
    made = after(f"memmap={','.join(items)}" if in_one else " ".join(f"memmap={i}" for i in items))
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(made))
    for start, end, kind in made:
        for at in (start, (start + end) // 2, end - 1):
            covered = any(s <= at < s + size for size, s in spans)
            assert covered == (kind is Kind.PRAM)
    total = sum(e - s for s, e, kind in made if kind is Kind.PRAM)
    edges = sorted({x for size, s in spans for x in (s, s + size)})
    union = sum(b - a for a, b in itertools.pairwise(edges) if any(s <= a < s + n for n, s in spans))
    assert total == union
