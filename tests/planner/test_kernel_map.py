# SPDX-License-Identifier: Apache-2.0
"""Every plan is proven by the model of what the kernel makes of it; a difference is an error, never a plan."""

from __future__ import annotations

import pytest

from emupmem.kernel.cmdline import parse_command_line
from emupmem.model import GIB, MIB, EmupmemError, FirmwareMap, Kind, MapEntry, Request, Reservation
from emupmem.planner import plan as planner_plan
from emupmem.planner.kernel_map import prove_plan
from emupmem.planner.plan import offers, plan
from emupmem.planner.situation import NoPlan, Situation
from emupmem.planner.survey import of_log
from tests.cli.runner import Run
from tests.fake import LOG

FIRMWARE = FirmwareMap(
    (
        MapEntry(0, 3 * GIB, Kind.RAM),
        MapEntry(4 * GIB, 8 * GIB, Kind.RAM),
        MapEntry(8 * GIB, 12 * GIB, Kind.RAM),
        MapEntry(12 * GIB, 13 * GIB, Kind.RESERVED),
        MapEntry(16 * GIB, 20 * GIB, Kind.RAM),
    )
)
CHOSEN = (Reservation(4 * GIB, GIB, GIB),)


def situation(words: str = "") -> Situation:
    return Situation(FIRMWARE, command_line=parse_command_line(words) if words else None)


@pytest.mark.parametrize(
    "words",
    [
        "",
        "ro quiet",
        "mem=6G",
        "mem=2G",  # persistent memory above a limit stays
        "memmap=1G$6G memmap=512M@20G memmap=1G#7G",
        "memmap=1G!5G",
        "memmap=1G%6G-1+12",
        "memmap=1G%6G-1",
        "memmap=2G!16G,64K$0x18690000 crashkernel=256M",
    ],
)
def test_what_is_planned_is_what_the_kernel_makes(words: str) -> None:
    prove_plan(situation(words), "memmap=1G!4G", CHOSEN)
    two = (Reservation(17 * GIB, GIB, GIB), Reservation(18 * GIB, GIB, GIB))
    if "16G" not in words:
        prove_plan(situation(words), "memmap=1G!17G,1G!18G", two)


@pytest.mark.parametrize(
    ("memmap", "chosen", "words"),
    [
        ("memmap=1G!5G", CHOSEN, "0x100000000-0x13fffffff of type 1$"),
        ("memmap=2G!4G", CHOSEN, "0x100000000-0x17fffffff of type 12"),
        ("memmap=512M!4G", CHOSEN, "0x100000000-0x11fffffff of type 12; 0x120000000-"),
        ("memmap=1G!4G,1G!6G", CHOSEN, "from 0x180000000 on there is another change"),
        ("memmap=1G!4G,1G!24G", CHOSEN, "from 0x600000000 on there is another change"),
        ("memmap=1G$4G", CHOSEN, "0x100000000-0x13fffffff of type 2"),
        ("memmap=1GiB!4G", CHOSEN, "no range"),  # a limit
        ("memmap=1G!4G,1G@13G", CHOSEN, "from 0x340000000 on there is another change"),
        ("memmap=1G!4G,15G", CHOSEN, "from 0x400000000 on there is another change"),
        ("memmap=1G!7680M", (Reservation(7680 * MIB, GIB, MIB),), "0x1e0000000-0x1ffffffff of type 12; "),
        ("memmap=1G!13G", (Reservation(13 * GIB, GIB, GIB),), "0x340000000-0x37fffffff is not RAM"),
        ("memmap=1G!0xffffffffffffffff", CHOSEN, "would stop"),
        ("", CHOSEN, "0x100000000-0x2ffffffff of type 1$"),
    ],
)
def test_a_difference_is_an_internal_error(memmap: str, chosen: tuple[Reservation, ...], words: str) -> None:
    with pytest.raises(
        EmupmemError, match=f"internal error: the kernel would not make .*({words})"
    ) as caught:
        prove_plan(situation(), memmap, chosen)
    assert "report" in caught.value.hint


def test_words_that_stop_the_kernel_are_named_and_no_internal_error() -> None:
    with pytest.raises(EmupmemError, match=r"^the kernel would stop at memmap=2G%4G-1\+1") as caught:
        plan(situation("memmap=2G%4G-1+1"), Request(size=GIB))
    assert "internal" not in caught.value.message


def test_the_planner_gives_no_plan_that_is_not_proven(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner_plan, "format_memmap", lambda pairs: "memmap=1GiB!4G")
    done = run("suggest", "--size", "1G", "--from", "-", stdin=LOG.encode())
    assert done.status == 1
    assert "Next:" not in done.out
    assert done.err.startswith(
        "emupmem: internal error: the kernel would not make of memmap=1GiB!4G what is planned"
    )


def test_suggest_shows_what_the_kernel_will_make_of_it(run: Run) -> None:
    done = run("suggest", "--size", "1G", "--count", "2", "--from", "-", stdin=LOG.encode())
    assert done.out.count("persistent (type 12)") == 2
    assert "the kernel will have:  0x100000000-0x13fffffff  persistent (type 12)" in done.out
    made = run("suggest", "--size", "1G", "--json", "--from", "-", stdin=LOG.encode()).json["plan"]
    assert made["kernel_map"] == [
        {"start": 0, "size": 0x9FC00, "type": "usable"},
        {"start": 0x9FC00, "size": 0x400, "type": "reserved"},
        {"start": MIB, "size": 3 * GIB - MIB, "type": "usable"},
        {"start": 0xFEFFC000, "size": 0x4000, "type": "reserved"},
        {"start": 4 * GIB, "size": GIB, "type": "persistent (type 12)"},
        {"start": 5 * GIB, "size": 16 * GIB, "type": "usable"},
    ]


def test_the_largest_map_that_a_log_can_have(run: Run) -> None:
    lines = [
        f"BIOS-e820: [mem {i * 128 * MIB:#018x}-{i * 128 * MIB + 64 * MIB - 1:#018x}] usable"
        for i in range(4095)
    ]
    lines.append(f"BIOS-e820: [mem {1 << 40:#018x}-{(1 << 40) + 4 * GIB - 1:#018x}] usable")
    log = (
        f"{LOG.partition('BIOS-prov')[0]}BIOS-provided physical RAM map:\n" + "\n".join(lines) + "\nDMI: x\n"
    )
    assert plan(of_log(log, "log").situation, Request(size=GIB)).memmap == "memmap=1G!1T".replace(
        "1T", "1024G"
    )


@pytest.mark.parametrize(
    "words", ["mem=8G", "memmap=8G", "mem=6G", "mem=8G memmap=7G", "mem=5000M", "mem=100G", "mem=2G"]
)
@pytest.mark.parametrize(("size", "count"), [(None, 1), (GIB, 1), (3 * GIB, 1), (GIB, 4), (12 * GIB, 1)])
def test_a_device_lies_on_one_side_of_a_limit(words: str, size: int | None, count: int) -> None:
    """The kernel takes the RAM above it away before it adds ours: over that border it would make two devices."""
    firmware = of_log(LOG, "log").situation.firmware  # RAM in one piece from 4G to 21G
    there = Situation(firmware, command_line=parse_command_line(words))
    made = plan(there, Request(size=size, count=count, min_free=0))
    for item in parse_command_line(words).items:
        assert not any(r.start < item.size < r.end for r in made.reservations if item.op == "limit")


def test_what_does_not_fit_beside_a_limit() -> None:
    firmware = of_log(LOG, "log").situation.firmware
    there = Situation(firmware, command_line=parse_command_line("mem=10G"))
    with pytest.raises(NoPlan, match="no usable range has room for 12 GiB") as caught:
        plan(there, Request(size=12 * GIB))
    assert caught.value.hint == "the largest size that fits is 11G"
    (offer,) = [o for o in offers(there, Request()) if o.start == 4 * GIB]
    assert offer.at_most == 11 * GIB


def test_what_the_kernel_does_not_have_anyway_is_taken_where_too_little_would_stay() -> None:
    firmware = of_log(LOG, "log").situation.firmware
    there = Situation(firmware, command_line=parse_command_line("mem=8G"))
    assert plan(there, Request(size=GIB)).memmap == "memmap=1G!4G"
    made = plan(there, Request(size=GIB, min_free=6 * GIB))
    assert (made.memmap, made.ram_left > 6 * GIB) == ("memmap=1G!8G", True)
    with pytest.raises(NoPlan) as caught:
        plan(there, Request(size=14 * GIB, min_free=6 * GIB))
    assert caught.value.largest == 13 * GIB
