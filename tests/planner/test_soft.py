# SPDX-License-Identifier: Apache-2.0
"""Plans for the kinds that are soft reserved: where they may lie, when nokaslr is needed, nodes and tiers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from emupmem.kernel.cmdline import parse_command_line
from emupmem.kernel.e820 import SOFT_TYPE, settled_types
from emupmem.model import (
    GIB,
    MIB,
    DeviceKind,
    EmupmemError,
    FirmwareMap,
    KernelRelease,
    Kind,
    MapEntry,
    NodeRange,
    Request,
)
from emupmem.planner.plan import plan, satisfied
from emupmem.planner.situation import NoPlan, Situation
from tests.cli.runner import Run
from tests.fake import LOG, FakeMachine, put

SOFT = [DeviceKind.DAX, DeviceKind.MEMORY]
FIRMWARE = FirmwareMap((MapEntry(MIB, 3 * GIB, Kind.RAM), MapEntry(4 * GIB, 21 * GIB, Kind.RAM)))
TWO = (NodeRange(0, 0, 12 * GIB), NodeRange(1, 12 * GIB, 21 * GIB))
NEW = KernelRelease(6, 12, None, "Linux 6.12")


def situation(words: str = "", **more: object) -> Situation:
    line = parse_command_line(words) if words else None
    return Situation(FIRMWARE, command_line=line, kernel=NEW, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", SOFT)
def test_the_words_are_a_change_of_ram_and_the_kernel_makes_exactly_that(kind: DeviceKind) -> None:
    made = plan(situation(), Request(size=2 * GIB, kind=kind))
    assert made.memmap == "memmap=2G%4G-1+0xefffffff"
    assert [r.kind for r in made.reservations] == [kind]
    rows = settled_types(FIRMWARE, parse_command_line(made.memmap))
    assert (4 * GIB, 6 * GIB, SOFT_TYPE) in rows
    assert not made.needs_nokaslr


@pytest.mark.parametrize(
    ("words", "size", "needed"),
    [
        ("", 4 * GIB, False),  # the kernel stays below 4G, where the range begins
        ("", 5 * GIB, True),  # it may choose a place below 5G
        ("nokaslr", 5 * GIB, False),
        ("memmap=1G%20G-1+12", 5 * GIB, False),
        ("memmap=1M$1G,1M$1025M,1M$1026M,1M$1027M", GIB, True),  # it reads no further after four
        ("memmap=8G%12G-1+0xefffffff", GIB, False),  # the smallest one counts
    ],
)
def test_nokaslr_where_the_kernel_would_choose_a_place_inside(words: str, size: int, needed: bool) -> None:
    made = plan(situation(words), Request(size=size, kind=DeviceKind.DAX, min_free=GIB))
    assert made.needs_nokaslr is needed
    assert made.add_nokaslr is needed
    assert any("nokaslr is added" in w for w in made.warnings) is needed


def test_nothing_is_changed_where_a_limit_takes_the_ram_away() -> None:
    """Type 12 is made of anything, soft reserved memory of RAM only."""
    assert plan(situation("mem=8G"), Request(size=6 * GIB, min_free=GIB)).memmap == "memmap=6G!8G", (
        "in one piece"
    )
    for words in ("mem=8G", "memmap=8G"):
        with pytest.raises(EmupmemError, match="no usable range has room for 6 GiB"):
            plan(situation(words), Request(size=6 * GIB, kind=DeviceKind.DAX, min_free=GIB))
        assert plan(situation(words), Request(size=4 * GIB, kind=DeviceKind.DAX, min_free=GIB)).memmap


def test_a_fifth_range_is_no_matter_of_theirs() -> None:
    words = "memmap=1G!4G,1G!5G,1G!6G"
    made = plan(situation(words), Request(size=GIB, count=2, kind=DeviceKind.DAX))
    assert made.memmap == "memmap=1G%7G-1+0xefffffff,1G%8G-1+0xefffffff"
    with pytest.raises(EmupmemError, match="5 memmap regions in all"):
        plan(situation(words), Request(size=GIB, count=2))


def test_both_kinds_on_one_machine() -> None:
    line = "memmap=1G%4G-1+0xefffffff"
    assert plan(situation(line), Request(size=GIB)).memmap == "memmap=1G!5G"
    assert plan(situation("memmap=1G!4G"), Request(size=GIB, kind=DeviceKind.DAX)).memmap.startswith(
        "memmap=1G%5G"
    )


def test_memory_comes_in_blocks() -> None:
    with pytest.raises(EmupmemError, match="size 100M is not a multiple of 128 MiB"):
        plan(situation(), Request(size=100 * MIB, kind=DeviceKind.MEMORY))
    assert plan(situation(), Request(size=130 * MIB, kind=DeviceKind.DAX)).memmap.startswith(
        "memmap=130M%4G-1"
    )
    with pytest.raises(EmupmemError, match="adds memory in blocks of 2 GiB"):
        plan(situation(block=2 * GIB), Request(size=GIB, kind=DeviceKind.MEMORY))
    made = plan(
        replace(
            situation(block=2 * GIB, nodes=TWO),
            firmware=FirmwareMap((MapEntry(MIB, 3 * GIB, Kind.RAM), MapEntry(5 * GIB, 21 * GIB, Kind.RAM))),
        ),
        Request(size=2 * GIB, kind=DeviceKind.MEMORY),
    )
    assert made.memmap.startswith("memmap=2G%6G-1")


@pytest.mark.parametrize("kind", SOFT)
def test_kernels_before_5_5_make_no_device_of_it(kind: DeviceKind) -> None:
    old = replace(situation(), kernel=KernelRelease(5, 4, None, "Linux 5.4"))
    with pytest.raises(EmupmemError, match=r"Linux 5\.4 makes no device of soft reserved memory"):
        plan(old, Request(size=GIB, kind=kind))
    assert plan(old, Request(size=GIB)).memmap == "memmap=1G!4G"


def test_a_tier_of_its_own_needs_all_of_a_node() -> None:
    whole = plan(situation(nodes=TWO), Request(kind=DeviceKind.MEMORY, numa_node=1))
    assert whole.memmap == "memmap=9G%12G-1+0xefffffff"
    assert not [w for w in whole.warnings if "tier" in w]
    part = plan(situation(nodes=TWO), Request(size=GIB, kind=DeviceKind.MEMORY, numa_node=1))
    assert any("node 1 keeps 8 GiB of its 9 GiB" in w and "--size 9G" in w for w in part.warnings)
    one = plan(situation(nodes=(NodeRange(0, 0, 1 << 40),)), Request(size=GIB, kind=DeviceKind.MEMORY))
    assert any("one NUMA node" in w and "no tier of its own" in w for w in one.warnings)
    assert not [w for w in plan(situation(nodes=TWO), Request(size=GIB)).warnings if "tier" in w]


def test_a_node_with_room_for_memory_only_has_none() -> None:
    there = situation(nodes=(NodeRange(0, 0, 64 * GIB), NodeRange(1, 64 * GIB, 128 * GIB)))
    made = plan(there, Request(size=GIB, kind=DeviceKind.MEMORY))
    assert any("one NUMA node" in w and "no tier of its own" in w for w in made.warnings)
    with pytest.raises(EmupmemError, match="there is no NUMA node 7") as caught:
        plan(there, Request(size=GIB, numa_node=7))
    assert caught.value.hint == "nodes with memory: 0"
    with pytest.raises(NoPlan, match="on NUMA node 1"):
        plan(there, Request(size=GIB, numa_node=1))


def test_what_is_there_is_as_asked_only_in_its_kind() -> None:
    made = plan(situation(), Request(size=GIB, kind=DeviceKind.DAX))
    assert satisfied(situation(), Request(size=GIB, kind=DeviceKind.DAX), made.reservations)
    for kind in (DeviceKind.PMEM, DeviceKind.MEMORY):
        assert not satisfied(situation(), Request(size=GIB, kind=kind), made.reservations)


def test_suggest_shows_the_kinds(run: Run, here: FakeMachine) -> None:
    put(here, "/boot/config-6.12.0-1-amd64", SOFT_CONFIG)
    put(here, "/usr/local/bin/emupmem", "")
    shown = run("suggest", "--as", "memory", "--size", "1G")
    assert "planned: memory of its own" in shown.out
    assert "1 GiB comes back as movable memory" in shown.out
    assert "soft reserved" in shown.out
    assert "sudo emupmem apply --size 1G --as memory" in shown.out
    large = run("suggest", "--as", "dax", "--size", "8G")
    assert (
        "(adds memmap=8G%4G-1+0xefffffff nokaslr modprobe.blacklist=kmem to the kernel command line)"
        in large.out
    )
    made = run("suggest", "--as", "dax", "--size", "1G", "--json").json["plan"]
    assert (made["kind"], made["memmap"]) == ("dax", "memmap=1G%4G-1+0xefffffff")
    assert made["words"] == ["modprobe.blacklist=kmem"]
    assert run("suggest", "--size", "1G", "--json").json["plan"]["words"] == []


def test_suggest_from_a_log(run: Run) -> None:
    shown = run("suggest", "--from", "-", "--as", "memory", "--size", "1G", stdin=LOG.encode())
    assert "the NUMA nodes are not known here" in shown.out + shown.err


SOFT_CONFIG = """CONFIG_EFI_SOFT_RESERVE=y
CONFIG_DEV_DAX=m
CONFIG_DEV_DAX_HMEM=m
CONFIG_DEV_DAX_KMEM=m
CONFIG_MEMORY_HOTPLUG=y
"""


@pytest.mark.parametrize(
    ("option", "kinds"),
    [
        ("CONFIG_EFI_SOFT_RESERVE", SOFT),
        ("CONFIG_DEV_DAX_HMEM", SOFT),
        ("CONFIG_DEV_DAX_KMEM", [DeviceKind.MEMORY]),
        ("CONFIG_MEMORY_HOTPLUG", [DeviceKind.MEMORY]),
    ],
)
def test_the_kernel_that_will_boot_must_have_it(
    run: Run, here: FakeMachine, option: str, kinds: list[DeviceKind]
) -> None:
    config = "".join(line for line in SOFT_CONFIG.splitlines(True) if not line.startswith(f"{option}="))
    put(here, "/boot/config-6.12.0-1-amd64", config)
    put(here, "/usr/local/bin/emupmem", "")
    for kind in SOFT:
        refused = run("suggest", "--as", kind.value, "--size", "1G", "--json").json["refused"]
        assert bool(refused) is (kind in kinds)
        assert not refused or f"is built without {option}" in refused["message"]
    (here.root / "boot/config-6.12.0-1-amd64").unlink()
    told = run("apply", "--as", "dax", "--size", "1G", "--dry-run").err
    assert "no configuration of 6.12.0-1-amd64 is kept here: its drivers are not checked" in told
