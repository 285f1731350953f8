# SPDX-License-Identifier: Apache-2.0
"""The rungs of soft reserved memory on observations made by hand: each one's good and bad answers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from emupmem.kernel.cmdline import parse_command_line
from emupmem.model import (
    GIB,
    MIB,
    BootLog,
    DaxDevice,
    DeviceKind,
    IomemLine,
    Kind,
    MapEntry,
    MemoryBlock,
    ModuleState,
    Presence,
    Span,
)
from emupmem.verifier.ladder import complete, verdict_of
from emupmem.verifier.observation import Observation, SeenSoft, SeenTrial
from tests.verifier.test_verifier import FIRMWARE, GOOD, broken, menu

ITEM = "1G%5G-1+0xefffffff"
LINE = parse_command_line(f"ro memmap={ITEM} quiet modprobe.blacklist=kmem")
DEVICE = DaxDevice("dax0.0", 5 * GIB, GIB, 2 * MIB, 1, "device_dax")
BLOCKS = tuple(
    MemoryBlock(f"memory{n}", Span(n * 128 * MIB, (n + 1) * 128 * MIB), "online", "Movable")
    for n in range(40, 48)
)
TIERS = (("memory_tier4", (0,)), ("memory_tier22", (1,)))
MODULES = (ModuleState("dax_hmem", Presence.LOADED), ModuleState("device_dax", Presence.LOADED))
DAX = SeenSoft(LINE.soft[0], DeviceKind.DAX, DEVICE, True, modules=MODULES)
MEMORY = replace(
    DAX,
    kind=DeviceKind.MEMORY,
    device=replace(DEVICE, driver="kmem"),
    char=False,
    blocks=BLOCKS,
    node_total=GIB,
    tiers=TIERS,
)


def seen(soft: SeenSoft, **more: object) -> Observation:
    user = (MapEntry(4 * GIB, 5 * GIB, Kind.RAM), MapEntry(5 * GIB, 6 * GIB, Kind.SOFT_RESERVED))
    made = replace(
        GOOD,
        configured=(ITEM,),
        recovery=(ITEM,),
        command_line=LINE,
        entries=menu(f"memmap={ITEM}"),
        log=BootLog(FIRMWARE, user=user),
        iomem=(IomemLine(0, 4 * GIB, 5 * GIB, "System RAM"),),  # Linux 7 has no line for the range
        regions=(),
        soft=(soft,),
    )
    return replace(made, **more)  # type: ignore[arg-type]


def test_a_dax_device_is_well() -> None:
    verdict = verdict_of(seen(DAX))
    assert [(c.name, c.status) for c in verdict.checks] == [
        (n, "ok")
        for n in ("configured", "generated", "booted", "kernel-map", "iomem", "dax-device", "driver")
    ]
    found = {c.name: c.found for c in verdict.checks}
    assert found["kernel-map"] == "0x140000000-0x17fffffff soft reserved"
    assert found["dax-device"] == "dax0.0, 1 GiB, aligned to 2 MiB, node 1 · emulated, volatile"
    assert found["driver"] == "device_dax has /dev/dax0.0"
    assert [(d.dev, d.start, d.size) for d in verdict.devices] == [("/dev/dax0.0", 5 * GIB, GIB)]
    assert verdict.ok
    assert not verdict.nothing_reserved
    assert complete(seen(DAX))


def test_memory_is_well() -> None:
    verdict = verdict_of(seen(MEMORY))
    assert verdict.ok
    found = {c.name: c.found for c in verdict.checks}
    assert found["online"] == "8 blocks, 1 GiB, movable, in node 1, which has 1 GiB in all"
    assert found["tier"] == "node 1 is in memory_tier22, node 0 in memory_tier4"
    shared = replace(MEMORY, tiers=(("memory_tier4", (0, 1)),))
    assert (
        verdict_of(seen(shared)).checks[-1].found
        == "node 1 is in memory_tier4 with node 0: no tier of its own"
    )
    assert verdict_of(seen(replace(MEMORY, tiers=()))).checks[-1].status == "skipped"


def test_both_kinds_have_their_rungs() -> None:
    line = parse_command_line(f"ro memmap=1G!4G,{ITEM} quiet")
    both = ("1G!4G", ITEM)
    assert GOOD.log is not None
    assert GOOD.log.user is not None
    assert GOOD.iomem is not None
    user = (GOOD.log.user[0], MapEntry(5 * GIB, 6 * GIB, Kind.SOFT_RESERVED))
    made = replace(
        GOOD,
        configured=both,
        recovery=both,
        command_line=line,
        entries=menu(f"memmap={','.join(both)}"),
        log=BootLog(FIRMWARE, user=user),
        iomem=GOOD.iomem[:-1],
        soft=(replace(MEMORY, item=line.soft[0]),),
    )
    verdict = verdict_of(made)
    assert verdict.ok, verdict
    assert [c.name for c in verdict.checks][5:] == ["device", "dax", "dax-device", "driver", "online", "tier"]
    assert [d.dev for d in verdict.devices] == ["/dev/pmem0", "/dev/dax0.0"]


@pytest.mark.parametrize(
    ("soft", "name", "found", "hint"),
    [
        (replace(DAX, device=None), "dax-device", "the kernel made none of the range", "hmem"),
        (
            replace(DAX, device=None, modules=(ModuleState("dax_hmem", Presence.AVAILABLE),)),
            "dax-device",
            "the driver dax_hmem is not loaded",
            "sudo modprobe dax_hmem",
        ),
        (
            replace(
                DAX, device=None, modules=(ModuleState("dax_hmem", Presence.BLOCKED, "/etc/modprobe.d/x:1"),)
            ),
            "dax-device",
            "blacklisted in /etc/modprobe.d/x:1",
            "remove that line",
        ),
        (
            replace(DAX, device=None, modules=(ModuleState("dax_hmem", Presence.MISSING),)),
            "dax-device",
            "this kernel has no module dax_hmem",
            "install the package",
        ),
        (
            replace(DAX, device=replace(DEVICE, size=GIB // 2)),
            "dax-device",
            "dax0.0 has 512 MiB instead of 1 GiB",
            "cut",
        ),
        (
            replace(DAX, device=replace(DEVICE, driver="kmem")),
            "driver",
            "dax0.0 has kmem",
            "restart emupmem.service",
        ),
        (
            replace(DAX, device=replace(DEVICE, driver="")),
            "driver",
            "dax0.0 has no driver",
            "restart emupmem.service",
        ),
        (replace(DAX, char=False), "driver", "/dev/dax0.0 is not there", "udevadm"),
        (
            replace(DAX, kind=None, device=replace(DEVICE, driver="")),
            "driver",
            "no driver",
            "apply --replace",
        ),
        (replace(MEMORY, device=DEVICE), "driver", "dax0.0 has device_dax", "restart emupmem.service"),
        (replace(MEMORY, blocks=()), "online", "no memory of it is there", "kmem"),
        (
            replace(MEMORY, blocks=(replace(BLOCKS[0], state="offline"), *BLOCKS[1:])),
            "online",
            "1 of 8 blocks are offline, memory40 first",
            "restart emupmem.service",
        ),
        (
            replace(MEMORY, blocks=(*BLOCKS[:-1], replace(BLOCKS[-1], zones="Normal"))),
            "online",
            "1 of 8 blocks are not movable, memory47 first",
            "restart emupmem.service",
        ),
    ],
)
def test_each_broken_rung_has_one_thing_to_do(soft: SeenSoft, name: str, found: str, hint: str) -> None:
    broken(seen(soft), name, found, hint)
    assert not complete(seen(soft))


def test_the_kernels_map_and_the_kernel_inside() -> None:
    nothing = BootLog(FIRMWARE, user=(MapEntry(4 * GIB, 8 * GIB, Kind.RAM),))
    broken(seen(DAX, log=nothing), "kernel-map", "no soft reserved range there", "apply --replace")
    inside = (IomemLine(1, 5 * GIB, 5 * GIB + MIB, "Kernel code"),)
    broken(seen(DAX, iomem=inside), "iomem", "the kernel sits inside the range", "nokaslr")


def test_kmem_that_came_first_needs_our_word() -> None:
    bare = parse_command_line(f"ro memmap={ITEM} quiet")
    hint = "the next start needs modprobe.blacklist=kmem"
    taken = replace(DAX, device=replace(DEVICE, driver="kmem"))
    broken(seen(taken, command_line=bare), "driver", "dax0.0 has kmem", hint)
    fixed = replace(MEMORY, blocks=tuple(replace(b, zones="Normal") for b in BLOCKS))
    broken(seen(fixed, command_line=bare), "online", "8 of 8 blocks are not movable", hint)


def test_a_trial_has_no_driver_yet() -> None:
    trial = SeenTrial((f"memmap={ITEM}",), False, True, True)
    bare = replace(DAX, kind=None, device=replace(DEVICE, driver=""), char=False)
    verdict = verdict_of(seen(bare, trial=trial, configured=(), entries=menu("")))
    assert verdict.checks[-1].status == "ok"
    assert verdict.checks[-1].found == "dax0.0 gets its driver by emupmem.service, after emupmem confirm"


def test_without_a_record_either_driver_is_well() -> None:
    for driver in ("device_dax", "kmem"):
        verdict = verdict_of(seen(replace(DAX, kind=None, device=replace(DEVICE, driver=driver))))
        assert verdict.ok
        assert "by the kernel's own choice" in verdict.checks[-1].found
