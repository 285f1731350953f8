# SPDX-License-Identifier: Apache-2.0
"""Planner and verifier on what our own virtual machines printed (tests/fixtures/boot)."""

from __future__ import annotations

from pathlib import Path

import pytest

from emupmem.kernel.cmdline import parse_command_line
from emupmem.model import GIB, Request
from emupmem.parser.bootlog import parse_boot_log
from emupmem.parser.sources import parse_iomem, parse_sysfs_memmap
from emupmem.planner import survey
from emupmem.planner.plan import plan
from emupmem.verifier.ladder import verdict_of
from emupmem.verifier.observation import Observation, SeenRegion
from tests import FIXTURES

BOOTS = FIXTURES / "boot"
MACHINES = {p.parent.name: p.parent for p in sorted(BOOTS.glob("*/dmesg"))}


def values(folder: Path) -> dict[str, str]:
    lines = [line.partition("=") for line in (folder / "nd").read_text().splitlines()]
    return {key: value for key, eq, value in lines if eq and key.startswith("/sys/")}


def regions(folder: Path) -> tuple[SeenRegion, ...]:
    """The regions of a dump; /dev/pmemN belongs to regionN."""
    found, dump = [], values(folder)
    for key, size in dump.items():
        if key.startswith("/sys/bus/nd/devices/region") and key.endswith("/size"):
            name = key.split("/")[-2]
            block = f"pmem{name.removeprefix('region')}"
            sectors = dump.get(f"/sys/block/{block}/size")
            found.append(
                SeenRegion(
                    name,
                    int(size),
                    int(dump[f"/sys/bus/nd/devices/{name}/resource"], 16),
                    block if sectors else "",
                    int(sectors or 0) * 512,
                    dump.get(f"/sys/block/{block}/queue/dax") == "1" if sectors else None,
                    None,
                )
            )
    return tuple(found)


def observation(folder: Path) -> Observation:
    """What verify would have seen on that machine, its GRUB left aside."""
    rows = [line.split(maxsplit=2) for line in (folder / "memmap").read_text().splitlines()]
    line = parse_command_line((folder / "cmdline").read_text())
    return Observation(
        configured=tuple(i.text for i in line.reservations),
        variable="GRUB_CMDLINE_LINUX",
        command_line=line,
        log=parse_boot_log((folder / "dmesg").read_bytes(), "dmesg"),
        firmware=parse_sysfs_memmap([(n, a, b, c) for n, (a, b, c) in enumerate(rows)]),
        iomem=parse_iomem((folder / "iomem").read_text()),
        regions=regions(folder),
    )


def test_all_three_kernels_are_here() -> None:
    for kernel in ("6.1", "6.12", "7.2"):
        for what in ("bios", "uefi", "bios-memmap", "uefi-memmap", "bios-two", "bios-numa", "source-example"):
            assert f"{kernel}-{what}" in MACHINES


GOOD = [
    n for n in MACHINES if n.split("-", 1)[1] in ("bios-memmap", "uefi-memmap", "bios-two", "source-example")
]


@pytest.mark.parametrize("name", GOOD)
def test_a_good_reservation_is_proven_from_the_kernel_up(name: str) -> None:
    verdict = verdict_of(observation(MACHINES[name]))
    assert [(c.name, c.status) for c in verdict.checks if c.name != "generated"] == [
        (rung, "ok") for rung in ("configured", "booted", "kernel-map", "iomem", "device", "dax")
    ], verdict.checks
    assert [d.dev for d in verdict.devices] == ["/dev/pmem0", "/dev/pmem1"][: 2 if "two" in name else 1]


@pytest.mark.parametrize(
    ("name", "rung", "words"),
    [
        ("6.12-bios-straddling", "kernel-map", "a part of it is not RAM in the firmware's map"),
        ("6.12-bios-nothing", "kernel-map", "it is not RAM in the firmware's map"),
        ("6.1-bios-misaligned", "kernel-map", "misaligned, unable to map"),
        ("6.12-bios-five", "kernel-map", "not marked as E820_TYPE_RAM"),
    ],
)
def test_what_looks_right_and_is_not(name: str, rung: str, words: str) -> None:
    verdict = verdict_of(observation(MACHINES[name]))
    first = next(c for c in verdict.checks if c.status == "fail")
    assert (first.name, words in first.found) == (rung, True), first
    assert first.hint


def test_the_kernel_inside_a_range_shows_in_iomem_without_a_log() -> None:
    from dataclasses import replace

    seen = replace(observation(MACHINES["6.12-bios-five"]), log=None)
    first = next(c for c in verdict_of(seen).checks if c.status == "fail")
    assert first.name == "iomem"
    assert "the kernel sits inside the range" in first.found


def test_a_mangled_item_is_no_reservation() -> None:
    seen = observation(MACHINES["6.12-bios-limit"])
    assert seen.configured == ()
    assert verdict_of(seen).nothing_reserved


@pytest.mark.parametrize("name", [n for n in MACHINES if n.endswith(("-bios", "-uefi", "-memmap", "-two"))])
def test_planning_gives_the_same_with_and_without_a_reservation(name: str) -> None:
    with (MACHINES[name] / "dmesg").open("rb") as file:
        found = survey.of_log(file, name)
    made = plan(found.situation, Request(GIB))
    assert made.memmap == "memmap=1G!4G"
    assert not made.add_nokaslr
    assert made.warnings == ()
    assert found.situation.efi is ("uefi" in name)


@pytest.mark.parametrize("kernel", ["6.1", "6.12", "7.2"])
def test_the_source_example(kernel: str) -> None:
    with (MACHINES[f"{kernel}-source-example"] / "dmesg").open("rb") as file:
        found = survey.of_log(file, "log")
    made = plan(found.situation, Request(16 * GIB))
    assert made.memmap == "memmap=16G!4G"
    assert (made.reservations[0].start, made.reservations[0].end - 1) == (0x100000000, 0x4FFFFFFFF)


@pytest.mark.parametrize("kernel", ["6.1", "6.12", "7.2"])
def test_numa_nodes_come_from_srat_lines(kernel: str) -> None:
    with (MACHINES[f"{kernel}-bios-numa"] / "dmesg").open("rb") as file:
        situation = survey.of_log(file, "log").situation
    border = next(n.start for n in situation.nodes if n.node == 1)
    low = plan(situation, Request(numa_node=0, size=512 << 20)).reservations[0]
    high = plan(situation, Request(numa_node=1, size=GIB)).reservations[0]
    assert low.end <= border <= high.start
    assert (low.numa_node, high.numa_node) == (0, 1)
