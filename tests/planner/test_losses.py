# SPDX-License-Identifier: Apache-2.0
"""RAM that the kernel took away after the firmware's map: every line is a veto, in the words of all kernels."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from emupmem.model import GIB, MIB, Request
from emupmem.parser.bootlog import parse_boot_log
from emupmem.planner.plan import offers, plan
from emupmem.planner.situation import NoPlan
from emupmem.planner.survey import NoMap, Survey, of_log, of_machine
from tests.fake import LOG, build, put

OLD = """Linux version 4.19.0 (b@h) #1 SMP
BIOS-provided physical RAM map:
 BIOS-e820: 0000000000000000 - 000000000009f800 (usable)
 BIOS-e820: 0000000000100000 - 00000000bf800000 (usable)
 BIOS-e820: 0000000100000000 - 0000000240000000 (usable)
"""
NEW = """Linux version 7.1.0 (b@h) #1 SMP
BIOS-provided physical RAM map:
BIOS-e820: [mem 0x0000000000000000-0x000000000009fbff]  System RAM
BIOS-e820: [gap 0x000000000009fc00-0x00000000000fffff]
BIOS-e820: [mem 0x0000000000100000-0x00000000bfffffff]  System RAM
BIOS-e820: [gap 0x00000000c0000000-0x00000000ffffffff]
BIOS-e820: [mem 0x0000000100000000-0x000000053fffffff]  System RAM
"""
HARMLESS = (
    "e820: update [mem 0x00000000-0x00000fff] usable ==> reserved",
    "e820: remove [mem 0x000a0000-0x000fffff] usable",
    "e820: remove [mem 0x660000000-0x6801fffff] device reserved",
    "e820: remove [mem 0x140000000-0x1401fffff] reserved",
    "e820: update [mem 0x140000018-0x140011057] usable ==> usable",
    "e820: update [mem 0x140000000-0x17fffffff] usable ==> persistent (type 12)",
    "e820: remove [mem 0x200000000-0xfffffffffffffffe] usable",
    "e820 remove range: 0000000200000000 - ffffffffffffffff (usable)",
    "e820: reserve RAM buffer [mem 0x53e000000-0x53fffffff]",
    "e820: register RAM buffer resource [mem 0x53e000000-0x53fffffff]",
    "efi: Remove mem57: MMIO range=[0x140000000-0x143ffffff] (64MB) from e820 map",
    "update e820_table_kexec for setup_data",
)
TAKEN = (
    ("e820 update range: 0000000100000000 - 0000000140000000 (usable) ==> (reserved)", 0x140000000),
    ("e820 update range: 0000000100000000 - 0000000140000000", 0x140000000),  # a mail broke the line
    ("e820 remove range: 0000000100000000 - 0000000140000000 (usable)", 0x140000000),
    ("e820: update [mem 0x100000000-0x13fffffff] usable ==> reserved", 0x140000000),
    ("e820: update [mem 0x100000000-0x13fffffff] usable ==> soft reserved", 0x140000000),
    ("e820: update [mem 0x100000000-0x13fffffff] System RAM ==> device reserved", 0x140000000),
    ("e820: update [mem 0x100000000-0x13fffffff]  System RAM ==>  soft reserved", 0x140000000),
    ("e820: update [mem 0x100000000-0x13fffffff] usable ==> unus", 0x140000000),
    ("e820: remove [mem 0x100000000-0x13fffffff] usable", 0x140000000),
    ("e820: remove [mem 0x100000000-0x13fffffff] System RAM", 0x140000000),
    ("e820: remove [mem 0x100000000-0x13fffffff]", 0x140000000),
)
DECORATED = ("{}", "[    0.155122] {}", "Nov 22 10:00:00 h kernel: {}", '{{"pri":6,"msg":"{}"}}', "> {}")
WARNING = "WARNING: BIOS bug: CPU MTRRs don't cover all of memory, losing {}MB of RAM."
ENTRY = "BIOS-e820: [mem 0x0000000100000000-0x000000053fffffff] usable"


def survey(text: str) -> Survey:
    return of_log(text, "boot.log")


def start(text: str, size: int = GIB) -> int:
    return plan(survey(text).situation, Request(size=size)).reservations[0].start


@pytest.mark.parametrize("line", HARMLESS)
def test_lines_that_take_no_ram_are_no_veto(line: str) -> None:
    assert start(LOG + line) == 4 * GIB
    assert not survey(LOG + line).notes


@pytest.mark.parametrize("decoration", DECORATED)
@pytest.mark.parametrize(("line", "end"), TAKEN)
def test_every_line_that_takes_ram_is_a_veto(line: str, end: int, decoration: str) -> None:
    text = LOG + decoration.format(line) + "\n"
    (loss,) = parse_boot_log(text).losses
    assert (loss.start, loss.end, loss.text) == (4 * GIB, end, line)
    assert start(text) == end


@pytest.mark.parametrize("log", [LOG, OLD, NEW])
def test_the_reason_names_the_line(log: str) -> None:
    text = log + "e820: update [mem 0x100000000-0x53fffffff] usable ==> reserved\n"
    found = survey(text)
    (offer,) = [o for o in offers(found.situation, Request()) if o.start == 4 * GIB]
    number = len(text.splitlines())
    said = f"e820: update [mem 0x100000000-0x53fffffff] usable ==> reserved (line {number})"
    assert (offer.at_most, offer.reason) == (0, f"the kernel took it away: {said}")
    assert found.notes[-1] == f"the kernel took 0x100000000-0x53fffffff away: {said}"
    with pytest.raises(NoPlan, match="no usable range"):
        plan(found.situation, Request(size=GIB))


def test_ram_that_is_lost_does_not_stay_for_the_system() -> None:
    text = LOG + "e820: update [mem 0x100000000-0x43fffffff] usable ==> reserved\n"
    made = plan(survey(text).situation, Request(size=GIB))
    assert made.ram_left == 3 * GIB + 4 * GIB - GIB - 16 * MIB - MIB + 0x9FC00


def test_the_line_number_is_right_deep_in_a_log_and_from_a_pipe() -> None:
    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

    noise = b"Nov 22 10:00:00 h kernel: usb 1-1: reset\n" * 200_000
    text = LOG.encode() + b"e820: update [mem 0x100000000-0x13fffffff] usable ==> reserved\n"
    for kind in (io.BytesIO, Pipe):
        (loss,) = parse_boot_log(kind(noise + text + noise)).losses
        assert loss.line == 200_000 + len(text.splitlines())


def test_far_behind_the_map() -> None:
    noise = "efi: mem00: [Conventional Memory] range=[0x1000-0x2000]\n" * 2000
    assert start(LOG + noise + "e820: update [mem 0x100000000-0x13fffffff] usable ==> reserved\n") == 5 * GIB


def test_only_the_last_boot_counts() -> None:
    assert start(LOG + "e820: update [mem 0x100000000-0x13fffffff] usable ==> reserved\n" + LOG) == 4 * GIB


# Loss without a place ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lines",
    [
        (WARNING.format(3840),),
        ("update e820 for mtrr",),
        ("e820: update [mem 0x00000000-0x00000fff] usable ==> reserved", "update e820 for mtrr"),
        (WARNING.format(3840)[:-20],),
        # a line of the two was lost: 1 GiB of the 2 has a place
        ("e820: update [mem 0x100000000-0x13fffffff] usable ==> reserved", WARNING.format(2048)),
        ("e820: update [mem 0x100000000-0x13",),
        ("e820 update range: 0000000100000000 - 00000001400",),
        ("e820: update [mem",),
        ("e820: update [mem 0x140000000-0x100000000] usable ==> reserved",),
    ],
)
def test_loss_without_a_place_is_refused(lines: tuple[str, ...]) -> None:
    with pytest.raises(NoMap, match="does not say which") as caught:
        survey(LOG + "\n".join(lines) + "\n")
    assert "dmesg" in caught.value.hint


def test_loss_that_the_lines_account_for() -> None:
    line = "e820: update [mem 0x100000000-0x13fffffff] usable ==> reserved\n"
    assert start(LOG + line + WARNING.format(1024)) == 5 * GIB
    assert start(LOG + line + WARNING.format(1024) + "\nupdate e820 for mtrr\n") == 5 * GIB
    low = "e820: update [mem 0xb0000000-0xffffffff] usable ==> reserved\n"
    assert start(LOG + low + WARNING.format(256)) == 4 * GIB


def test_with_the_modified_map_nothing_is_unknown() -> None:
    modified = (
        LOG[LOG.index("BIOS-prov") :].replace("BIOS-e820", "modified").replace("BIOS-prov", "modified prov")
    )
    modified = modified.replace("modified provided", "modified").replace(
        "0x0000000100000000", "0x0000000140000000"
    )
    found = survey(LOG + WARNING.format(1024) + "\n" + modified)
    assert plan(found.situation, Request(size=GIB)).reservations[0].start == 5 * GIB
    assert found.notes == (
        "the kernel's modified map does not call 0x100000000-0x13fffffff RAM: nothing is planned there",
    )
    line = "e820: update [mem 0x100000000-0x13fffffff] usable ==> reserved\n"
    assert len(survey(LOG + line + WARNING.format(1024) + "\n" + modified).notes) == 1  # said once


# The command line's own, and the live machine ----------------------------------------------------------


def test_what_the_command_line_asked_for_is_no_loss() -> None:
    """memmap=…% prints the same line; removed from the next command line it takes nothing any more."""
    text = LOG.replace("ro quiet", "ro memmap=1G%4G-1+0xefffffff")
    text += "e820: update [mem 0x100000000-0x13fffffff] usable ==> soft reserved\n"
    assert survey(text).situation.losses == ()
    assert start(text) == 5 * GIB  # the word still takes it


def test_an_existing_reservation_does_not_veto_its_replacement() -> None:
    text = LOG.replace("ro quiet", "ro memmap=4G!4G")
    text += "user: [mem 0x0000000100000000-0x00000001ffffffff] persistent (type 12)\n"
    assert start(text) == 4 * GIB


def test_the_live_log_counts(tmp_path: Path) -> None:
    machine = build(tmp_path)
    put(machine, "/log", LOG + "e820: update [mem 0x100000000-0x13fffffff] usable ==> reserved\n")
    assert plan(of_machine(machine).situation, Request(size=GIB)).reservations[0].start == 5 * GIB
    put(machine, "/log", LOG + WARNING.format(1024))
    with pytest.raises(NoMap):
        of_machine(machine)
