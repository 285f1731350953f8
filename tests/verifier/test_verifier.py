# SPDX-License-Identifier: Apache-2.0
"""The ladder on observations made by hand: each rung's good and bad answers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from emupmem.boot import entry
from emupmem.boot.grub import menu as grub_menu
from emupmem.kernel.cmdline import parse_command_line
from emupmem.model import GIB, MIB, BootLog, FirmwareMap, IomemLine, Kind, MapEntry, ModuleState, Presence
from emupmem.verifier.ladder import LEGACY, complete, verdict_of
from emupmem.verifier.observation import Observation, SeenRegion

FIRMWARE = FirmwareMap((MapEntry(0, 3 * GIB, Kind.RAM), MapEntry(4 * GIB, 8 * GIB, Kind.RAM)))
LINE = parse_command_line("BOOT_IMAGE=/vmlinuz ro memmap=1G!4G quiet")


def menu(words: str) -> tuple[entry.BootEntry, ...]:
    return grub_menu.entries(
        f"menuentry 'Debian' {{\nlinux /vmlinuz-6 ro {words} quiet\n}}\n"
        f"menuentry 'Debian (recovery mode)' {{\nlinux /vmlinuz-6 ro single {words}\n}}\n"
    )


REGION = SeenRegion("region0", GIB, 4 * GIB, "pmem0", GIB, True, 0, "e820", "memory")
GOOD = Observation(
    configured=("1G!4G",),
    variable="GRUB_CMDLINE_LINUX",
    command_line=LINE,
    recovery=("1G!4G",),
    entries=menu("memmap=1G!4G"),
    menu_is_newer=False,
    log=BootLog(FIRMWARE, user=(MapEntry(4 * GIB, 5 * GIB, Kind.PRAM), MapEntry(5 * GIB, 8 * GIB, Kind.RAM))),
    firmware=FIRMWARE,
    iomem=(
        IomemLine(0, 0, 3 * GIB, "System RAM"),
        IomemLine(1, 16 * MIB, 32 * MIB, "Kernel code"),
        IomemLine(0, 4 * GIB, 5 * GIB, LEGACY),
        IomemLine(0, 5 * GIB, 8 * GIB, "System RAM"),
    ),
    regions=(REGION,),
    modules=tuple(ModuleState(n, Presence.LOADED) for n in ("nd_e820", "nd_pmem", "libnvdimm")),
)

ALL = ["configured", "generated", "booted", "kernel-map", "iomem", "device", "dax"]


def statuses(seen: Observation) -> dict[str, str]:
    return {c.name: c.status for c in verdict_of(seen).checks}


def broken(seen: Observation, name: str, found: str, hint: str = "", status: str = "fail") -> None:
    """The named rung breaks with these words, and everything above it is skipped because of it."""
    checks = verdict_of(seen).checks
    at = [c.name for c in checks].index(name)
    assert all(c.status in ("ok", "skipped") for c in checks[:at])
    assert checks[at].status == status
    assert found in checks[at].found
    assert hint in checks[at].hint
    assert [c.found for c in checks[at + 1 :]] == [f"explained by {name}"] * len(checks[at + 1 :])
    assert all(c.explained_by == name for c in checks[at + 1 :])
    assert not verdict_of(seen).ok


def test_all_is_well() -> None:
    verdict = verdict_of(GOOD)
    assert [(c.name, c.status) for c in verdict.checks] == [(n, "ok") for n in ALL]
    assert [(d.dev, d.start, d.size) for d in verdict.devices] == [("/dev/pmem0", 4 * GIB, GIB)]
    assert verdict.ok
    assert not verdict.pending
    assert not verdict.nothing_reserved
    assert "emulated, volatile" in verdict.checks[5].found


def test_nothing_reserved_is_as_planned_too() -> None:
    seen = Observation((), "GRUB_CMDLINE_LINUX", parse_command_line("quiet"), entries=menu(""))
    verdict = verdict_of(seen)
    assert verdict.ok
    assert verdict.nothing_reserved
    assert [c.status for c in verdict.checks] == ["ok"] * 3


def test_configured_but_not_booted_is_a_reboot_pending() -> None:
    seen = replace(GOOD, command_line=parse_command_line("quiet"), menu_is_newer=True)
    broken(seen, "booted", "/proc/cmdline has no reservation", "reboot", "pending")
    assert verdict_of(seen).pending


def test_removed_but_not_rebooted_is_pending_as_well() -> None:
    seen = replace(GOOD, configured=(), recovery=(), entries=menu(""), menu_is_newer=True)
    checks = verdict_of(seen).checks
    assert [(c.name, c.status) for c in checks] == [
        ("configured", "ok"),
        ("generated", "ok"),
        ("booted", "pending"),
    ]
    assert "given back" in checks[-1].hint


def test_started_since_and_still_not_there_is_another_entry() -> None:
    seen = replace(GOOD, command_line=parse_command_line("quiet"), menu_is_newer=False)
    broken(seen, "booted", "no reservation", "by another entry or boot loader")


def test_not_generated() -> None:
    broken(
        replace(GOOD, entries=menu("")), "generated", "no reservation instead of memmap=1G!4G", "apply again"
    )
    left = replace(GOOD, configured=(), recovery=(), command_line=parse_command_line(""))
    assert statuses(left)["generated"] == "fail"


@pytest.mark.parametrize(
    ("user", "found"),
    [
        ((), "no persistent range there"),
        ((MapEntry(4 * GIB, 5 * GIB - MIB, Kind.PRAM),), "0x100000000-0x13fefffff"),
        (
            (
                MapEntry(4 * GIB, 4 * GIB + 512 * MIB, Kind.PRAM),
                MapEntry(4 * GIB + 512 * MIB, 5 * GIB, Kind.PRAM),
            ),
            "0x100000000-0x11fffffff; 0x120000000-0x13fffffff",
        ),
    ],
)
def test_split_or_short_in_the_kernels_map(user: tuple[MapEntry, ...], found: str) -> None:
    broken(replace(GOOD, log=BootLog(FIRMWARE, user=user)), "kernel-map", found, "apply --replace")


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        (".text .data .bss are not marked as E820_TYPE_RAM!", "nokaslr"),
        (
            "nd_pmem namespace0.0: [mem 0x100000000-0x13fefffff flags 0x200] misaligned, unable to map",
            "not aligned",
        ),
        ("e820_pmem e820_pmem: failed to register legacy persistent memory ranges", "plans it again"),
    ],
)
def test_symptoms_in_the_log(line: str, hint: str) -> None:
    assert GOOD.log is not None
    broken(replace(GOOD, log=replace(GOOD.log, symptoms=(line,))), "kernel-map", line, hint)


def test_a_device_over_nothing_is_caught_by_the_firmware_map() -> None:
    line = parse_command_line("memmap=1G!8G")
    user = (MapEntry(8 * GIB, 9 * GIB, Kind.PRAM),)
    seen = replace(
        GOOD,
        configured=("1G!8G",),
        recovery=("1G!8G",),
        command_line=line,
        entries=menu("memmap=1G!8G"),
        log=BootLog(FIRMWARE, user=user),
        iomem=(IomemLine(0, 8 * GIB, 9 * GIB, LEGACY),),
        regions=(replace(REGION, start=8 * GIB),),
    )
    broken(seen, "kernel-map", "it is not RAM in the firmware's map", "plans it again")


def test_a_log_that_lost_the_lines_is_not_a_failure() -> None:
    assert statuses(replace(GOOD, log=BootLog(FIRMWARE)))["kernel-map"] == "skipped"
    assert statuses(replace(GOOD, log=None))["kernel-map"] == "skipped"
    assert verdict_of(replace(GOOD, log=None)).ok


def test_the_kernel_inside_the_range() -> None:
    assert GOOD.iomem is not None
    lines = (*GOOD.iomem, IomemLine(1, 4 * GIB + MIB, 4 * GIB + 20 * MIB, "Kernel code"))
    broken(replace(GOOD, iomem=lines), "iomem", "the kernel sits inside the range: Kernel code", "nokaslr")


def test_a_truncated_range_in_iomem() -> None:
    lines = (IomemLine(0, 4 * GIB, 5 * GIB - 64 * MIB, LEGACY),)
    broken(replace(GOOD, iomem=lines), "iomem", "0x100000000-0x13bffffff")
    broken(replace(GOOD, iomem=()), "iomem", "nothing at 0x100000000-0x13fffffff")


def module_state(name: str, presence: Presence) -> ModuleState:
    return ModuleState(name, presence, "/etc/modprobe.d/x.conf:3" if presence is Presence.BLOCKED else "")


@pytest.mark.parametrize(
    ("module", "state", "found", "hint"),
    [
        (
            "nd_e820",
            Presence.BLOCKED,
            "blacklisted in /etc/modprobe.d/x.conf:3",
            "remove that",
        ),
        ("nd_e820", Presence.MISSING, "has no module nd_e820", "linux-modules-extra"),
        ("nd_e820", Presence.AVAILABLE, "nd_e820 is not loaded", "modprobe nd_e820"),
        ("nd_e820", Presence.LOADED, "made no region", "dmesg"),
    ],
)
def test_no_region(module: str, state: Presence, found: str, hint: str) -> None:
    broken(replace(GOOD, regions=(), modules=(module_state(module, state),)), "device", found, hint)


@pytest.mark.parametrize(
    ("state", "found"),
    [
        (Presence.BLOCKED, "nd_pmem is blacklisted in /etc/modprobe.d/x.conf:3"),
        (Presence.MISSING, "no module nd_pmem"),
        (Presence.AVAILABLE, "nd_pmem is not loaded"),
        (Presence.LOADED, "nd_pmem refused it"),
    ],
)
def test_a_region_without_a_block_device(state: Presence, found: str) -> None:
    bare = replace(REGION, block="", block_size=0, dax=None)
    broken(replace(GOOD, regions=(bare,), modules=(module_state("nd_pmem", state),)), "device", found)


def test_sizes_that_differ() -> None:
    broken(replace(GOOD, regions=(replace(REGION, size=6 * MIB),)), "device", "6 MiB instead of 1 GiB")
    broken(
        replace(GOOD, regions=(replace(REGION, block_size=GIB - 2 * MIB),)),
        "device",
        "has 1022 MiB instead",
        "cold",
    )


def test_what_was_made_of_the_range_is_as_planned() -> None:
    """`nvdimm create` gives a region another mode: its info block takes a part of the range."""
    for claim, block, char, size, device, dax in (
        ("pfn", "pmem0", "", GIB - 16 * MIB, "fsdax with a page map on it, 1008 MiB of it usable", "on"),
        ("btt", "pmem0s", "", GIB - 2 * MIB, "sector, 1022 MiB of it usable", "none: sector has no DAX"),
        ("dax", "", "dax0.0", GIB - 16 * MIB, "devdax, 1008 MiB", "devdax: programs map the device itself"),
    ):
        region = replace(
            REGION, claim=claim, block=block, char=char, block_size=size, dax=claim == "pfn" or None
        )
        seen = replace(GOOD, regions=(region,))
        verdict = verdict_of(seen)
        found = {c.name: (c.status, c.found) for c in verdict.checks}
        assert verdict.ok
        assert complete(seen)
        assert found["device"][0] == "ok"
        assert device in found["device"][1]
        assert found["dax"] == ("ok", dax)
        assert [d.dev for d in verdict.devices] == [f"/dev/{block or char}"]
    half = replace(REGION, claim="pfn", block_size=0)
    broken(replace(GOOD, regions=(half,)), "device", "has 0 B instead")


def test_a_real_module_of_the_same_size_is_not_taken_for_ours() -> None:
    real = replace(REGION, start=None, name="region7", block="pmem7", provider="ACPI.NFIT")
    ours = replace(REGION, start=None)
    verdict = verdict_of(replace(GOOD, regions=(real, ours)))
    assert [d.dev for d in verdict.devices] == ["/dev/pmem0"]


def test_dax_off() -> None:
    broken(
        replace(GOOD, regions=(replace(REGION, dax=False),)),
        "dax",
        "off on /dev/pmem0",
        "ndctl create-namespace",
    )
    assert statuses(replace(GOOD, regions=(replace(REGION, dax=None),)))["dax"] == "skipped"


def test_the_number_of_the_device_is_not_assumed() -> None:
    other = SeenRegion("region0", 2 * GIB, 32 * GIB, "pmem0", 2 * GIB, True, 0)
    ours = replace(REGION, name="region5", block="pmem5")
    verdict = verdict_of(replace(GOOD, regions=(other, ours)))
    assert verdict.ok
    assert [d.dev for d in verdict.devices] == ["/dev/pmem5"]


def test_without_root_it_judges_by_size_and_says_so() -> None:
    line = parse_command_line("memmap=1G!4G,1G!5G")
    hidden = [replace(REGION, start=None), replace(REGION, start=None, name="region1", block="pmem1")]
    seen = replace(
        GOOD,
        configured=("1G!4G", "1G!5G"),
        recovery=("1G!4G", "1G!5G"),
        command_line=line,
        entries=menu("memmap=1G!4G,1G!5G"),
        log=None,
        iomem=None,
        regions=tuple(hidden),
        unseen=(("iomem", "root only"), ("kernel-map", "not permitted")),
    )
    verdict = verdict_of(seen)
    assert verdict.ok
    assert [d.dev for d in verdict.devices] == ["/dev/pmem0", "/dev/pmem1"]
    assert "shown to root only" in verdict.checks[5].found
    assert [c.found for c in verdict.checks if c.status == "skipped"] == ["not permitted", "root only"]
    assert complete(seen)
    assert not complete(replace(seen, regions=tuple(hidden[:1])))


def test_an_unreadable_default_is_not_an_empty_one() -> None:
    seen = replace(GOOD, configured=None, unseen=(("configured", "permission denied"),))
    assert statuses(seen)["configured"] == "skipped"
    assert statuses(seen)["device"] == "ok"
    nothing = Observation(
        None, "GRUB_CMDLINE_LINUX", parse_command_line(""), unseen=(("configured", "denied"),)
    )
    assert verdict_of(nothing).checks[0].found == "denied"
