# SPDX-License-Identifier: Apache-2.0
"""RAM that the kernel took away after the firmware's map: every line is a veto, in the words of all kernels."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from emupmem.kernel.cmdline import parse_command_line
from emupmem.model import GIB, MIB, Request
from emupmem.parser.bootlog import parse_boot_log
from emupmem.planner.places import gone
from emupmem.planner.plan import offers, plan
from emupmem.planner.situation import NoPlan
from emupmem.planner.survey import NoMap, Survey, of_log, of_machine
from tests.cli.runner import Run
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
TRIMMED = (
    OLD
    + """WARNING: BIOS bug: CPU MTRRs don't cover all of memory, losing 3072MB of RAM.
update e820 for mtrr
modified physical RAM map:
 modified: 0000000000000000 - 000000000009f800 (usable)
 modified: 0000000000100000 - 00000000bf800000 (usable)
 modified: 0000000100000000 - 0000000180000000 (usable)
 modified: 0000000180000000 - 0000000240000000 (reserved)
"""
)
"""As a console has it: the lines `e820: update` are of a level that it does not show."""
HARMLESS = (
    "e820: update [mem 0x00000000-0x00000fff] usable ==> reserved",
    "e820: remove [mem 0x000a0000-0x000fffff] usable",
    "e820: remove [mem 0x660000000-0x6801fffff] device reserved",
    "e820: remove [mem 0x140000000-0x1401fffff] reserved",
    "e820: update [mem 0x140000018-0x140011057] usable ==> usable",
    "e820: update [mem 0x140000000-0x17fffffff] usable ==> persistent (type 12)",
    "e820: reserve RAM buffer [mem 0x53e000000-0x53fffffff]",
    "e820: register RAM buffer resource [mem 0x53e000000-0x53fffffff]",
    "efi: Remove mem57: MMIO range=[0x140000000-0x143ffffff] (64MB) from e820 map",
    "update e820_table_kexec for setup_data",
    "acpi/hmat: Memory (0x100000000 length 0x40000000) Flags:0003 Processor Domain:0 Memory Domain:2",
    "ACPI: PMTT 0x00000000BFFD0000 000064 (v01 X)",
    "ACPI: Reserving PMTT table memory at [mem 0x140000000-0x140000063]",
    "ACPI: SRAT: Node 0 PXM 0 [mem 0x540000000-0x93fffffff] hotplug",
    "early_memtest: # of tests: 17",
    "MCE: In-kernel MCE decoding enabled.",
    "mce: [Hardware Error]: Machine check events logged",
    "RAS: Correctable Errors collector initialized.",
    "  0000000100000000 - 0000000140000000 pattern 4c494e5558726c7a",
    "Reserving Intel graphics memory at [mem 0xab800000-0xaf7fffff]",
    "Could not allocate 0x0000000000001000 bytes of mirrored memory",
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
    ("Reserving Intel graphics memory at [mem 0x100000000-0x13fffffff]", 0x140000000),
    ("Reserving Intel graphics memory at 0x0000000100000000-0x000000013fffffff", 0x140000000),
)
UNFIT = (
    ("  4c494e5558726c7a bad mem addr 0x0000000110000000 - 0x0000000110000008 reserved", 0x110000000, 8),
    ("  4c494e5558726c7a bad mem addr 0110000000 - 0110000010 reserved", 0x110000000, 16),
    ("  5555555555555555 bad mem addr 013fffffff8 - 0140000000 reserved", 0x13FFFFFFF8, -1),
    ("Memory failure: 0x110000: recovery action for dirty LRU page: Recovered", 0x110000000, 4096),
    ("MCE 0x110000: recovery action for dirty LRU page: Recovered", 0x110000000, 4096),
    ("MCE 0x110000: dirty LRU page recovery: Recovered", 0x110000000, 4096),
    ("RAS: Soft-offlining pfn: 0x110000", 0x110000000, 4096),
    ("soft offline: 0x110000 page already poisoned", 0x110000000, 4096),
    ("soft offline: 0x110000: hugepage migration failed 1, type 17ffffc0000000", 0x110000000, 4096),
)
WITHOUT_LINE = "".join(x for x in LOG.splitlines(keepends=True) if "ommand line" not in x)
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


@pytest.mark.parametrize(("line", "first", "size"), UNFIT)
def test_cells_that_failed_are_kept_clear_of(line: str, first: int, size: int) -> None:
    """mm/memtest.c prints an exclusive end; the hexadecimal of old kernels has no 0x."""
    text = LOG + line + "\n"
    if size < 0:  # runs backwards: it was not read as it was printed
        with pytest.raises(NoMap):
            survey(text)
        return
    (loss,) = parse_boot_log(text).losses
    assert (loss.start, loss.end - loss.start) == (first, size)
    assert start(text) == 5 * GIB
    assert survey(text).notes[-1].startswith("the kernel took 0x110000000-0x110000")


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
    for change, word, first in (("-1+2", "reserved", 5), ("-1+0xefffffff", "soft reserved", 4)):
        text = LOG.replace("ro quiet", f"ro memmap=1G%4G{change}")
        text += f"e820: update [mem 0x100000000-0x13fffffff] usable ==> {word}\n"
        assert survey(text).situation.losses == ()
        # the word still takes it, but for a reservation: a plan takes the place of that
        assert start(text) == first * GIB
        assert survey(text).reserved == (() if first == 5 else (f"1G%4G{change}",))


LIMITED = (
    "e820: remove [mem 0x180000000-0xfffffffffffffffe] usable",
    "e820 remove range: 0000000180000000 - ffffffffffffffff (usable)",
    "e820: remove [mem 0x180000000-0xfffffffffffffffe] System RAM",
)


@pytest.mark.parametrize("line", LIMITED)
@pytest.mark.parametrize("words", ["mem=6G", "memmap=6G", "memmap=6GiB!4G"])
def test_a_limit_of_the_command_line_is_known_by_the_word(line: str, words: str) -> None:
    text = LOG.replace("ro quiet", f"ro {words}") + line
    assert survey(text).situation.losses == ()
    assert plan(survey(text).situation, Request(size=GIB)).ram_left < 4 * GIB


@pytest.mark.parametrize("line", LIMITED)
@pytest.mark.parametrize("log", [WITHOUT_LINE, LOG])
def test_a_limit_that_no_word_explains_is_a_loss(line: str, log: str) -> None:
    """As in a log that went through grep: what stays is 6 GiB less the hole, not 20."""
    made = plan(survey(log + line).situation, Request(size=GIB))
    assert made.ram_left < 4 * GIB
    assert made.reservations[0].end <= 6 * GIB
    with pytest.raises(NoPlan):
        plan(survey(log + line).situation, Request(size=3 * GIB))


def test_a_limit_does_not_account_for_what_the_mtrrs_lost() -> None:
    with pytest.raises(NoMap, match="does not say which"):
        survey(LOG + LIMITED[0] + "\n" + WARNING.format(1024))


USER = """user: [mem 0x0000000000000000-0x000000000009fbff] usable
user: [mem 0x0000000000100000-0x00000000bfffffff] usable
user: [mem 0x0000000100000000-0x000000017fffffff] {}
user: [mem 0x0000000180000000-0x000000053fffffff] usable
"""


@pytest.mark.parametrize("log", [WITHOUT_LINE, LOG.replace("ro quiet", "ro memmap=2G$>")])
def test_without_the_command_line_the_map_after_it_counts(log: str) -> None:
    found = survey(log + USER.format("reserved"))
    made = plan(found.situation, Request(size=GIB))
    assert made.memmap == "memmap=1G!6G"
    assert made.ram_left < 17 * GIB
    assert "0x100000000-0x17fffffff away: the map after the command line (user:)" in found.notes[-1]
    # what is reserved now is free for the next reservation
    assert start(log + USER.format("persistent (type 12)")) == 4 * GIB


def test_with_the_command_line_the_words_count() -> None:
    """They may be gone at the next start: the tree of the machine tells (`boots`)."""
    assert start(LOG + USER.format("reserved")) == 4 * GIB


def test_mirrored_memory_is_said() -> None:
    found = survey(LOG + "efi: Memory: 8192M/20480M mirrored memory\n")
    why = 'which part of the memory is mirrored is not known here ("Memory: 8192M/20480M mirrored memory")'
    assert found.notes == (why,)


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


def test_the_picture_shows_what_was_lost(run: Run) -> None:
    text = LOG + "e820: update [mem 0x300000000-0x53fffffff] usable ==> reserved\n"
    done = run("suggest", "--size", "1G", "--from", "-", stdin=text.encode())
    picture = next(line for line in done.out.splitlines() if "█" in line)
    assert 20 < picture.count("×") < 60
    assert picture.rstrip().endswith("×")
    assert "× lost: the kernel took it away" in done.out
    assert "×" not in run("suggest", "--size", "1G", "--from", "-", stdin=LOG.encode()).out


def test_ram_that_another_source_denies_does_not_stay(tmp_path: Path, run: Run) -> None:
    """What is kept free for the system is RAM that the kernel has: 2.99 GiB below 4 GiB and 2 GiB above."""
    found = of_log(io.BytesIO(TRIMMED.encode()), "log")
    made = plan(found.situation, Request(GIB))
    assert 3.9 * GIB < made.ram_left < 4 * GIB
    with pytest.raises(NoPlan) as caught:
        plan(found.situation, Request(GIB, min_free=4 * GIB))
    assert 0 < caught.value.largest < GIB
    proposed = plan(found.situation, Request(None))
    assert (proposed.memmap, proposed.ram_left > 2 * GIB) == ("memmap=2G!4G", True)
    log = tmp_path / "log"
    log.write_text(TRIMMED)
    done = run("suggest", "--size", "1G", "--from", str(log), "--svg", str(tmp_path / "svg"))
    assert done.out.startswith("Memory · 4.9 GiB usable"), done
    assert "× lost: the kernel took it away" in done.out
    assert 'class="lost"' in (tmp_path / "svg").read_text()


def test_what_words_of_this_boot_took_is_there_for_the_next_one(tmp_path: Path) -> None:
    machine = build(tmp_path)
    put(machine, "/proc/iomem", "00001000-0009fbff : System RAM\n00100000-bfffffff : System RAM\n")
    put(machine, "/proc/cmdline", "ro mem=3G\n")
    now = of_machine(machine).situation
    later = of_machine(machine, boots=parse_command_line("ro")).situation
    assert (gone(now), gone(later)) == ([], [])
    put(machine, "/proc/cmdline", "ro\n")
    assert gone(of_machine(machine).situation) == [(4 * GIB, 0x540000000)]
