# SPDX-License-Identifier: Apache-2.0
"""The reader of boot logs: every way a log is printed gives the same map, and every doubt an error."""

from __future__ import annotations

import functools
import io
import json
import os
import random
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from emupmem.kernel.e820 import apply_memmap
from emupmem.model import GIB, KIB, MIB, BootLog, EmupmemError, FirmwareMap, Kind, MapEntry, NodeRange
from emupmem.parser import reader
from emupmem.parser.bootlog import kernel_release, parse_boot_log, read_firmware_map
from emupmem.parser.sources import parse_iomem, parse_sysfs_memmap
from tests import FIXTURES

Entry = tuple[int, int, Kind]
BOOTS = FIXTURES / "boot"

A = {
    Kind.RAM: "(usable)",
    Kind.RESERVED: "(reserved)",
    Kind.ACPI_DATA: "(ACPI data)",
    Kind.ACPI_NVS: "(ACPI NVS)",
    Kind.UNUSABLE: "(unusable)",
    Kind.PMEM: "type 7",
    Kind.PRAM: "type 12",
    Kind.UNKNOWN: "type 20",
}
B = {k: k.value for k in Kind} | {Kind.UNKNOWN: "type 20"}
C = B | {
    Kind.RAM: "System RAM",
    Kind.RESERVED: "device reserved",
    Kind.PMEM: "persistent RAM (type 7)",
    Kind.PRAM: "persistent RAM (type 12)",
}


def era_a(who: str, entries: list[Entry]) -> list[str]:
    return [f" {who}: {s:016x} - {e:016x} {A.get(k, '(reserved)')}" for s, e, k in entries]


def era_b(who: str, entries: list[Entry]) -> list[str]:
    return [f"{who}: [mem {s:#018x}-{e - 1:#018x}] {B[k]}" for s, e, k in entries]


def era_c(who: str, entries: list[Entry]) -> list[str]:
    lines, last = [], 0
    for s, e, k in entries:
        if s > last:
            lines.append(f"{who}: [gap {last:#018x}-{s - 1:#018x}]")
        lines.append(f"{who}: [mem {s:#018x}-{e - 1:#018x}]  {C[k]}")
        last = e
    return lines


def era_c_sizes(who: str, entries: list[Entry]) -> list[str]:
    lines, last = [], 0
    for s, e, k in entries:
        if s > last:
            lines.append(f"{who}: [gap {last:#018x}-{s - 1:#018x}]  768   MB ...")
        words = "kernel usable RAM" if k is Kind.RAM else C[k]
        lines.append(f"{who}: [mem {s:#018x}-{e - 1:#018x}]  {(e - s) / GIB:5.1f} GB {words}")
        last = e
    return lines


ERAS: dict[str, Callable[[str, list[Entry]], list[str]]] = {
    "A": era_a,
    "B": era_b,
    "C": era_c,
    "sizes": era_c_sizes,
}


def _coloured(line: str) -> str:
    head, colon, rest = line.partition(": ")
    return f"\x1b[32m[    0.000000] \x1b[0m\x1b[33m{head}{colon}\x1b[0m{rest}"


DECORATIONS: dict[str, Callable[[str], str]] = {
    "bare": lambda x: x,
    "dmesg": lambda x: f"[    0.000000] {x}",
    "caller": lambda x: f"[    0.000000][    T0] {x}",
    "raw": lambda x: f"<6>[    0.000000] {x}",
    "raw without stamp": lambda x: f"<6>{x}",
    "-x": lambda x: f"kern  :info  : [    0.000000] {x}",
    "-T": lambda x: f"[Sun Nov 22 21:18:19 2026] {x}",
    "-T elsewhere": lambda x: f"[So Mär 22 21:18:19 2026] {x}",
    "iso": lambda x: f"2026-11-22T21:18:19,000000+00:00 {x}",
    "reltime": lambda x: f"[  +0.000000] {x}",
    "delta": lambda x: f"[    0.000003 <    0.000001>] [T3] {x}",
    "-J": lambda x: f'{{"pri":6,"time":     0.000000,"msg":{json.dumps(x)}}},',
    "journal -o json": lambda x: f'{{"_TRANSPORT":"kernel","MESSAGE":{json.dumps(x)},"PRIORITY":"6"}}',
    "colour": _coloured,
    "kmsg": lambda x: f"6,4,0,-;{x}\n SUBSYSTEM=acpi\n DEVICE=+acpi:PNP0A08:00",
    "kmsg with NUL": lambda x: f"\0006,4,0,-;{x}",
    "journal": lambda x: f"May 04 12:22:28 host kernel: {x}",
    "journal in another language": lambda x: f"dez 06 10:45:41 kali kernel: {x}",
    "short-monotonic": lambda x: f"[    0.000000] host kernel: {x}",
    "syslog and stamp": lambda x: f"May  4 12:22:28 host kernel: [    0.000000] {x}",
    "rsyslog iso": lambda x: f"2026-08-09T08:08:43.080727+00:00 host kernel: {x}",
    "serial": lambda x: f"[    0.000000] {x}\r",
    "console": lambda x: f"00.001340 {x}\r\r",
    "old header": lambda x: f"[    0.000000] e820: {x}" if x.endswith("RAM map:") else f"[    0.000000] {x}",
    "quoted": lambda x: f"> > [    0.000000] {x}",
    "early": lambda x: f"(early) [    0.000000] {x}",
    "KernelCI": lambda x: f" 1839 17:54:41.406548  <6>[    0.000000] {x}",
}

HEADER = "BIOS-provided physical RAM map:"
SMALL: list[Entry] = [
    (0, 0x9FC00, Kind.RAM),
    (0x9FC00, 0xA0000, Kind.RESERVED),
    (0xF0000, MIB, Kind.RESERVED),
    (MIB, 0xBFFE0000, Kind.RAM),
    (0xBFFE0000, 0xC0000000, Kind.ACPI_NVS),
    (0xFFFC0000, 4 * GIB, Kind.RESERVED),
    (4 * GIB, 20 * GIB, Kind.RAM),
]


def boot_lines(
    entries: list[Entry],
    era: str = "B",
    who: str = "BIOS-e820",
    header: str = HEADER,
    banner: str = "6.1.0-32-amd64",
) -> list[str]:
    return [
        f"Linux version {banner} (builder@example) (gcc (GCC) 13) #1 SMP",
        "Command line: BOOT_IMAGE=/vmlinuz root=/dev/vda1 ro",
        header,
        *ERAS[era](who, entries),
        "NX (Execute Disable) protection: active",
        "SMBIOS 2.8 present.",
    ]


def text_of(lines: list[str], decoration: str = "dmesg") -> str:
    return "\n".join(map(DECORATIONS[decoration], lines)) + "\n"


def found(log: BootLog) -> list[Entry] | None:
    return None if log.firmware is None else [(e.start, e.end, e.kind) for e in log.firmware.entries]


def problem(log: BootLog) -> str:
    assert log.firmware is None
    assert log.problem is not None
    return log.problem.message


PAGE = 0x1000


@st.composite
def maps(draw: st.DrawFn, kinds: tuple[Kind, ...] = tuple(A)) -> list[Entry]:
    """A map as a kernel would print it: sorted, apart, from 0 on, with some RAM."""
    entries: list[Entry] = [(0, draw(st.integers(1, 160)) * PAGE, Kind.RAM)]
    for _ in range(draw(st.integers(0, 40))):
        start = entries[-1][1] + draw(st.sampled_from([0, 0, PAGE, MIB, GIB, 100 * GIB]))
        size = draw(st.sampled_from([1, KIB, PAGE, 3 * MIB, 5 * GIB, 900 * GIB])) * draw(st.integers(1, 9))
        entries.append((start, start + size, draw(st.sampled_from(kinds))))
    return entries


# All the ways a map is printed -----------------------------------------------------------------


@pytest.mark.parametrize("decoration", DECORATIONS)
@pytest.mark.parametrize("era", ERAS)
def test_every_generation_in_every_decoration(era: str, decoration: str) -> None:
    log = parse_boot_log(text_of(boot_lines(SMALL, era), decoration), "it")
    assert log.problem is None
    assert found(log) == SMALL
    assert log.warnings == ()
    assert log.firmware is not None
    assert (log.firmware.source, log.firmware.who) == ("it", "BIOS-e820")
    assert log.firmware.ram_bytes == 0x9FC00 + 0xBFFE0000 - MIB + 16 * GIB
    assert log.linux_version == "Linux version 6.1.0-32-amd64 (builder@example) (gcc (GCC) 13) #1 SMP"
    assert log.command_line is not None
    assert log.command_line.words == ("BOOT_IMAGE=/vmlinuz", "root=/dev/vda1", "ro")


@given(maps(), st.sampled_from(sorted(ERAS)), st.sampled_from(sorted(DECORATIONS)), st.booleans())
def test_any_map_is_read_as_it_was_printed(
    entries: list[Entry], era: str, decoration: str, whole: bool
) -> None:
    lines = boot_lines(entries, era) if whole else ERAS[era]("BIOS-e820", entries)
    assert found(parse_boot_log(text_of(lines, decoration))) == entries


NOISE = [
    "e820: update [mem 0x00000000-0x00000fff] usable ==> reserved",
    "e820: update [mem 0x00000000-0x00000fff] System RAM ==> device reserved",
    "e820: remove [mem 0x000a0000-0x000fffff] usable",
    "e820: remove [mem 0x40000000-0xfffffffffffffffe] usable",
    "e820 update range: 0000000000000000 - 0000000000010000 (usable) ==> (reserved)",
    "e820 remove range: 00000000000a0000 - 0000000000100000 (usable)",
    "e820: reserve RAM buffer [mem 0x0009fc00-0x0009ffff]",
    "e820: register RAM buffer resource [mem 0xbffe0000-0xbfffffff]",
    "e820: update e820_table_kexec for memmap [mem 0x100000000-0x13fffffff]",
    "efi: Remove mem55: MMIO range=[0xe0000000-0xefffffff] (256MB) from e820 map",
    "efi: mem00: [Conventional Memory|   |  |] range=[0x0000000000000000-0x0000000000000fff] (0MB)",
    "[mem 0xc0000000-0xfebfffff] available for PCI devices",
    "[gap 0xc0000000-0xfebfffff] available for PCI devices",
    "[Firmware Bug]: something else",
    "PM: hibernation: Registered nosave memory: [mem 0x00000000-0x00000fff]",
    "  node   0: [mem 0x0000000000001000-0x000000000009efff]",
    "  DMA      [mem 0x0000000000001000-0x0000000000ffffff]",
    "Initmem setup node 0 [mem 0x0000000000001000-0x00000004ffffffff]",
    "reserve setup_data: [mem 0x0000000000000000-0x0000000000000fff] usable",
    "pci_bus 0000:00: root bus resource [mem 0x00000000000a0000-0x00000000000bffff window]",
    "user: root logged in",
    "in your root= kernel command line option",
    "systemd[1]: user: something",
    "\xff\xfe\x00 rubbish",
]


@given(maps(), st.sampled_from(sorted(ERAS)), st.data())
def test_lines_that_only_look_like_the_map_change_nothing(
    entries: list[Entry], era: str, data: st.DataObject
) -> None:
    lines = boot_lines(entries, era)
    for noise in data.draw(st.lists(st.sampled_from(NOISE), max_size=12)):
        lines.insert(data.draw(st.integers(0, len(lines))), noise)
    assert found(parse_boot_log(text_of(lines))) == entries


def test_grep_alone_is_enough() -> None:
    log = parse_boot_log("$ dmesg | grep BIOS-e820\n" + text_of(era_b("BIOS-e820", SMALL)))
    assert found(log) == SMALL
    assert log.warnings == ()


@pytest.mark.parametrize("who", ["BIOS-e801", "BIOS-88", "Xen"])
def test_other_names_of_the_map(who: str) -> None:
    log = parse_boot_log(text_of(boot_lines(SMALL, who=who)))
    assert found(log) == SMALL
    assert log.firmware is not None
    assert log.firmware.who == who
    assert log.xen == (who == "Xen")


def test_more_than_128_entries_are_in_the_extended_map() -> None:
    entries = [(0, PAGE, Kind.RAM)] + [
        (n * MIB, (n + 1) * MIB, (Kind.RAM, Kind.RESERVED)[n % 2]) for n in range(1, 150)
    ]
    lines = [*boot_lines(entries[:128]), "extended physical RAM map:", *era_b("extended", entries), "x"]
    log = parse_boot_log(text_of(lines))
    assert found(log) == entries
    assert log.firmware is not None
    assert log.firmware.who == "extended"


def test_setup_data_is_no_extended_map() -> None:
    pram = [*SMALL[:-1], (4 * GIB, 20 * GIB, Kind.PRAM)]
    lines = [*boot_lines(SMALL), "extended physical RAM map:", *era_b("reserve setup_data", pram), "x"]
    assert found(parse_boot_log(text_of(lines))) == SMALL


def test_unknown_words_are_an_error() -> None:
    lines = boot_lines(SMALL)
    lines[4] = lines[4].replace("] reserved", "] rather reserved")
    assert problem(parse_boot_log(text_of(lines))) == (
        "line 5 of the map is not as the kernel prints it: "
        '"[    0.000000] BIOS-e820: [mem 0x000000000009fc00-0x000000000009ffff] rather reserved"'
    )


# Every form of input -----------------------------------------------------------------------------


class Trickle(io.RawIOBase):
    """Stdin at its worst: not seekable, a few bytes at a time."""

    def __init__(self, data: bytes, step: int) -> None:
        self.data, self.step = data, step

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = min(self.step, len(buffer))
        got, self.data = self.data[:size], self.data[size:]
        buffer[: len(got)] = got
        return len(got)


def test_text_bytes_and_files() -> None:
    text = text_of(boot_lines(SMALL), "journal in another language") + "Jürgen was here\n"
    data = text.encode()
    for source in (text, data, io.StringIO(text), io.BytesIO(data), Trickle(data, 7)):
        assert found(parse_boot_log(source)) == SMALL  # type: ignore[arg-type]
    assert [(e.start, e.end, e.kind) for e in read_firmware_map(data).entries] == SMALL


def test_a_pipe() -> None:
    code = "import sys; from emupmem.parser.bootlog import *; print(read_firmware_map(sys.stdin.buffer).ram_bytes)"
    data = text_of(boot_lines(SMALL)).encode()
    done = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=True)
    assert int(done.stdout) == sum(e - s for s, e, k in SMALL if k is Kind.RAM)


def test_a_file_is_read_from_where_it_stands() -> None:
    data = text_of(boot_lines(SMALL)).encode()
    stream = io.BytesIO(b"BIOS-e820: [mem rubbish\n" + data)
    stream.readline()
    assert found(parse_boot_log(stream)) == SMALL


def test_lines_are_counted() -> None:
    log = parse_boot_log("\n\n" + text_of(boot_lines(SMALL)))
    assert log.firmware is not None
    assert [e.line for e in log.firmware.entries] == list(range(6, 13))


def _noise(size: int, seed: int = 1) -> bytes:
    block = _block(seed)
    return block * (size // len(block) + 1)


@functools.cache
def _block(seed: int) -> bytes:
    rnd = random.Random(seed)
    words = b"systemd usb audit: type=1400 session opened for root eth0: link up [mem ok] - 00 BIOS".split()
    return b"".join(
        b"Nov 22 10:00:%02d host kernel: [%12.6f] %s\n" % (i % 60, i / 7, b" ".join(rnd.choices(words, k=9)))
        for i in range(2000)
    )


@pytest.mark.slow
@pytest.mark.parametrize("seekable", [True, False])
@pytest.mark.parametrize("header", [True, False])
def test_deep_in_a_long_log(seekable: bool, header: bool) -> None:
    before = _noise(9 * MIB)
    lines = boot_lines(SMALL) if header else era_b("BIOS-e820", SMALL)
    good = before + text_of(lines).encode() + _noise(5 * MIB)
    bad = good.replace(b"-0x000000000009ffff] ", b"-0x000000000009ff", 1)
    open_: Callable[[bytes], Any] = io.BytesIO if seekable else lambda d: Trickle(d, 1 << 20)
    log = parse_boot_log(open_(good))
    assert found(log) == SMALL
    if header:
        assert log.linux_version
        assert log.command_line is not None
    number = before.count(b"\n") + (5 if header else 2)
    assert f"line {number} of the map is " in problem(parse_boot_log(open_(bad)))


def test_a_boot_across_regions_is_whole() -> None:
    boot = text_of(boot_lines(SMALL, banner="6.9.1")).encode()
    for shift in range(0, 1400, 83):
        data = _noise(3 * MIB)[: 3 * MIB + shift].rpartition(b"\n")[0] + b"\n" + b"x" * shift + b"\n" + boot
        log = parse_boot_log(data + _noise(MIB))
        assert found(log) == SMALL
        assert log.linux_version.startswith("Linux version 6.9.1 ")


def test_memory_stays_flat() -> None:
    class Endless(io.RawIOBase):
        def __init__(self, block: bytes, count: int) -> None:
            self.block, self.left = block[: 64 << 10], count

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            self.left -= 1
            if self.left < 0:
                return 0
            size = min(len(buffer), len(self.block))
            buffer[:size] = self.block[:size]
            return size

    for block in (_noise(1), b"\0" * (64 << 10), b"x" * (64 << 10), b"user: 0000[mem 0x0000" * 4000):
        tracemalloc.start()
        parse_boot_log(cast(Any, Endless(block, 300)))  # 20 MB
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4 * MIB


@given(st.binary(max_size=4000))
@example(b"BIOS-e820: [mem 0x" * 50)
@example(b"\n" * 100)
@example(b"\xff\xfeB\0I\0O\0S\0")
def test_rubbish_never_raises(data: bytes) -> None:
    assert parse_boot_log(data).firmware is None


@given(st.data())
def test_rubbish_in_a_log_never_raises(data: st.DataObject) -> None:
    text = text_of(boot_lines(SMALL)).encode()
    at = data.draw(st.integers(0, len(text)))
    hole = data.draw(st.integers(0, 40))
    junk = data.draw(st.binary(max_size=40))
    log = parse_boot_log(text[:at] + junk + text[at + hole :])
    # whatever is left: RAM is only where RAM was
    if log.firmware is not None:
        for span in log.firmware.ram:
            assert any(s <= span.start and span.end <= e for s, e, k in SMALL if k is Kind.RAM)


def test_a_long_run_of_nul_before_the_line() -> None:
    # what a crash leaves in a log file
    text = text_of(boot_lines(SMALL)).encode()
    for size in (100, 20_000, 1_000_000):
        assert found(parse_boot_log(b"\0" * size + text)) == SMALL
        first = text.index(b"BIOS-e820") - 15
        assert found(parse_boot_log(text[:first] + b"\0" * size + text[first:])) == SMALL


def test_a_map_in_one_long_line_is_an_error() -> None:
    text = " ".join(era_b("BIOS-e820", SMALL * 20))
    assert "not as the kernel prints it" in problem(parse_boot_log(text[:4000]))
    assert problem(parse_boot_log("x" * 9000 + text)).startswith(
        "line 1 of the map is somewhere in a line of "
    )


# Broken maps -------------------------------------------------------------------------------------


def replaced(number: int, line: str, era: str = "B") -> BootLog:
    lines = boot_lines(SMALL, era)
    lines[number] = line
    return parse_boot_log(text_of(lines, "bare"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("BIOS-e820: [mem 0x000000000009fc00-0x0000", "is cut"),
        ("BIOS-e820: [mem 0x000000000009fc00-0x000000000009ffff]", "is cut"),
        ("BIOS-e820: [mem 0x000000000009fc00-0x000000000009ffff] reser", "is cut"),
        ("BIOS-e820: [m", "is cut"),
        ("BIOS-e820:", "is cut"),
        ("BIOS-e8", "is cut"),
        ("BIOS-e820: [mem 0x000000000009fc00-0x000000000009ffff] type 1", "is cut"),
        ("820: [mem 0x000000000009fc00-0x000000000009ffff] reserved", "is cut"),
        ("BIOS-e820: [mem 0x9fc00-0x9ffff] reserved", "is not as the kernel prints it"),
        ("BIOS-e820: [mem 0x000000000009FC00-0x000000000009FFFF] reserved", "is not as the kernel prints it"),
        (
            "BIOS-e820: [mem 0x000000000009fc00-0x000000000009ffff] reserved >",
            "is not as the kernel prints it",
        ),
        ("BIOS-e820: [mem 0x000000000009ffff-0x000000000009fc00] reserved", "ends before it begins"),
        ("BIOS-e820: [mem 0x000000000009fc00-0x000000000009fbff] reserved", "ends before it begins"),
        (
            "BIOS-e820: [mem 0x000000000009fc00-0xffffffffffffffff] reserved",
            "is beyond 2^52, where no machine has memory",
        ),
        (
            "BIOS-e820: [mem 0x000000000009fc00-0x0010000000000000] reserved",
            "is beyond 2^52, where no machine has memory",
        ),
        ("BIOS-e820: [mem 0x000000000009f000-0x000000000009ffff] reserved", "overlaps or runs behind line 4"),
        ("BIOS-e820: [mem 0x0000000000001000-0x0000000000001fff] usable", "overlaps or runs behind line 4"),
    ],
)
def test_a_broken_line_is_named(line: str, message: str) -> None:
    assert problem(replaced(4, line)) == f'line 5 of the map {message}: "{line}"'


def test_control_characters_are_shown_and_long_lines_shortened() -> None:
    message = problem(replaced(4, "BIOS-e820: [mem 0x00\x07\x9b" + "y" * 500))
    assert "\\x07\\x9b" in message
    assert len(message) < 200
    assert message.isprintable()


def test_error_has_a_hint() -> None:
    log = replaced(4, "BIOS-e820: [mem 0x000")
    assert log.problem is not None
    assert "journalctl -k -b -o cat" in log.problem.hint
    with pytest.raises(EmupmemError, match="line 5 of the map is cut"):
        read_firmware_map("\n".join([*boot_lines(SMALL)[:4], "BIOS-e820: [mem 0x000", "x"]))


@pytest.mark.parametrize("lost", range(1, 6))
@pytest.mark.parametrize("era", ["A", "B", "C"])
def test_a_lost_beginning(era: str, lost: int) -> None:
    lines = ERAS[era]("BIOS-e820", SMALL)[lost:]
    message = problem(parse_boot_log(text_of(lines)))
    if "[gap" in lines[0] and lost:
        assert "lost" in message
    else:
        assert message.startswith("the beginning of the map is lost: it starts with line 1, ")


def test_a_lost_beginning_behind_the_header() -> None:
    lines = boot_lines(SMALL)
    del lines[3:6]
    assert "the beginning of the map is lost: it starts with line 4" in problem(
        parse_boot_log(text_of(lines))
    )
    # kexec passes a map that begins a little above 0
    entries = [(0x100, 0x9FC00, Kind.RAM), *SMALL[1:]]
    assert found(parse_boot_log(text_of(boot_lines(entries)))) == entries


@pytest.mark.parametrize("gone", range(1, 10))
def test_linux_7_shows_a_lost_line(gone: int) -> None:
    lines = era_c("BIOS-e820", SMALL)
    assert len(lines) == 9 or gone < 9
    if gone >= len(lines) - 1:
        return  # the last one
    del lines[gone]
    log = parse_boot_log(text_of([HEADER, *lines, "x"]))
    assert "a line of the map is lost between lines " in problem(log)


def test_linux_7_shows_a_lost_first_gap() -> None:
    entries = [(PAGE, 640 * KIB, Kind.RAM), *SMALL[2:]]
    lines = [HEADER, *era_c("BIOS-e820", entries), "x"]
    assert found(parse_boot_log(text_of(lines))) == entries
    del lines[1]
    assert problem(parse_boot_log(text_of(lines))) == "a line of the map is lost before line 2"


def test_linux_7_without_its_gap_lines() -> None:
    lines = [x for x in era_c("BIOS-e820", SMALL) if "[gap" not in x]
    assert found(parse_boot_log(text_of(lines))) == SMALL


def test_no_ram_is_an_error() -> None:
    log = parse_boot_log(text_of(boot_lines([(0, MIB, Kind.RESERVED)])))
    assert problem(log) == "the map in the log has no usable memory: lines of it are lost"


def test_a_header_without_lines() -> None:
    assert (
        problem(parse_boot_log(f"{HEADER}\nNX\n"))
        == "line 1 announces a memory map, but no line of it follows"
    )


def test_too_many_entries() -> None:
    entries = [(n * PAGE, (n + 1) * PAGE, Kind.RAM) for n in range(4097)]
    assert "more than 4096, which no kernel prints" in problem(parse_boot_log(text_of(boot_lines(entries))))


def test_too_many_boots(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [(n * PAGE, (n + 1) * PAGE, Kind.RAM) for n in range(2)]
    boots = text_of(boot_lines(entries)) * 5
    monkeypatch.setattr(reader, "MAX_MAP_LINES", 10)
    assert found(parse_boot_log(boots)) == entries
    monkeypatch.setattr(reader, "MAX_MAP_LINES", 9)
    log = parse_boot_log(boots)
    assert "is one of more than 9 in a log of many boots" in problem(log)
    assert log.problem is not None
    assert log.problem.hint == "save the last boot alone: journalctl -k -b -o cat > FILE"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the log is empty"),
        (b"\n", "there is no firmware map (BIOS-e820 lines) in the log"),
        (b"hello\nworld\n", "there is no firmware map (BIOS-e820 lines) in the log"),
        ("BIOS-e820".encode("utf-16"), "the log is UTF-16 text"),
        (b"\x1f\x8b\x08", "the log is compressed (gzip)"),
        (b"\x28\xb5\x2f\xfd0", "the log is compressed (zstd)"),
        (b"\xfd7zXZ\0", "the log is compressed (xz)"),
        (b"BZh9", "the log is compressed (bzip2)"),
        (
            b"Linux version 6.1.0 (a)\nLinux version 6.2.0 (a)\n",
            "the last boot of the log, which begins in line 2, has no firmware map",
        ),
    ],
)
def test_no_map_at_all(data: bytes, message: str) -> None:
    assert problem(parse_boot_log(data)) == message


@pytest.mark.parametrize("era", ["A", "B", "C"])
@pytest.mark.parametrize(
    "decoration",
    [
        "bare",
        *(pytest.param(d, marks=pytest.mark.slow) for d in ("dmesg", "journal", "kmsg with NUL", "colour")),
    ],
)
def test_a_line_that_is_cut_anywhere_is_never_overlooked(era: str, decoration: str) -> None:
    lines = [DECORATIONS[decoration](x) for x in boot_lines(SMALL, era)]
    last = 2 + len(ERAS[era]("BIOS-e820", SMALL))
    for number in range(3, last + 1):
        for at in range(1, len(lines[number])):
            short = lines[number][:at]
            if not short.strip(" \0\x1b") or (decoration == "colour" and at < 6):
                continue  # as good as an empty line
            cut = [*lines[:number], short, *lines[number + 1 :]]
            log = parse_boot_log("\n".join(cut) + "\n")
            assert log.firmware is None, short
            assert f"line {number + 1} " in problem(log), short


@given(maps(), st.sampled_from(sorted(ERAS)), st.data())
def test_a_broken_line_in_two_is_never_overlooked(
    entries: list[Entry], era: str, data: st.DataObject
) -> None:
    lines = boot_lines(entries, era)
    text = text_of(lines, "bare")
    first, end = text.index("BIOS-e820"), text.index("NX ")
    at = data.draw(st.integers(first + 1, end - 2))
    log = parse_boot_log(f"{text[:at]}\n{text[at:]}")
    assert log.firmware is None or found(log) == entries


@given(maps(), st.sampled_from(sorted(ERAS)), st.data())
def test_a_log_that_ends_inside_the_map_says_so(entries: list[Entry], era: str, data: st.DataObject) -> None:
    text = text_of(boot_lines(entries, era))
    at = data.draw(st.integers(0, text.index("NX ")))
    log = parse_boot_log(text[:at])
    if log.firmware is None:
        assert log.problem is not None
        return
    assert found(log) == entries[: len(log.firmware.entries)]
    if found(log) != entries:
        assert any("may be missing" in w for w in log.warnings)


def test_the_end_of_a_log_inside_the_map() -> None:
    lines = boot_lines(SMALL)[:8]
    log = parse_boot_log(text_of(lines))
    assert found(log) == SMALL[:5]
    assert log.warnings == (
        "the log ends with the map, in line 8: if it was cut there, memory above 0xc0000000 may be missing",
    )
    log = parse_boot_log(text_of(lines)[:-14])
    assert found(log) == SMALL[:4]
    (warning,) = log.warnings
    assert warning.startswith("the log ends inside the map (line 8 of the map is cut: ")
    assert warning.endswith("): memory above 0xbffe0000 may be missing")


# Several maps --------------------------------------------------------------------------------------


def test_the_last_boot_counts() -> None:
    bigger = [*SMALL[:-1], (4 * GIB, 36 * GIB, Kind.RAM)]
    text = text_of(boot_lines(SMALL)) + "x\n" + text_of(boot_lines(bigger, "C", banner="7.2.0"))
    log = parse_boot_log(text)
    assert found(log) == bigger
    assert log.linux_version.startswith("Linux version 7.2.0")


def test_a_last_boot_without_a_map_is_an_error() -> None:
    text = text_of(boot_lines(SMALL)) + text_of(["Linux version 6.9.9 (a) #1", "Command line: ro", "NX"])
    assert "which begins in line 13, has no firmware map" in problem(parse_boot_log(text))
    text = text_of(boot_lines(SMALL)) + text_of(["Command line: another=1", "NX"])
    assert problem(parse_boot_log(text)) == "the last boot of the log has no firmware map"


def test_a_broken_last_boot_is_an_error() -> None:
    text = text_of(boot_lines(SMALL)) + text_of(boot_lines(SMALL)).replace("] ACPI", "] AC")
    assert "line 20 of the map is " in problem(parse_boot_log(text))


def test_an_echoed_banner_is_no_boot() -> None:
    lines = boot_lines(SMALL)
    late = "nd_pmem namespace0.0: [mem 0x40000000-0x4fefffff flags 0x200] misaligned, unable to map"
    log = parse_boot_log(text_of([*lines, lines[0], "x", lines[0], late]))
    assert found(log) == SMALL
    assert len(log.symptoms) == 1


def test_boots_without_banners() -> None:
    bigger = [*SMALL[:-1], (4 * GIB, 36 * GIB, Kind.RAM)]
    grep = text_of(era_b("BIOS-e820", SMALL) + era_b("BIOS-e820", bigger), "journal")
    assert found(parse_boot_log(grep)) == bigger
    with_headers = text_of([HEADER, *era_b("BIOS-e820", SMALL), HEADER, *era_b("BIOS-e820", bigger), "x"])
    assert found(parse_boot_log(with_headers)) == bigger


def test_two_maps_of_one_boot() -> None:
    bigger = [*SMALL[:-1], (4 * GIB, 36 * GIB, Kind.RAM)]
    lines = boot_lines(SMALL)
    same = [*lines, HEADER, *era_b("BIOS-e820", SMALL), "x"]
    assert found(parse_boot_log(text_of(same))) == SMALL
    other = [*lines, HEADER, *era_b("BIOS-e820", bigger), "x"]
    assert problem(parse_boot_log(text_of(other))) == (
        "the log has two firmware maps of one boot that differ: the one from line 3 and the one from line 13"
    )


def test_lines_printed_twice() -> None:
    lines = boot_lines(SMALL)
    twice = [x for line in lines for x in (line, line)]
    assert found(parse_boot_log(text_of(twice))) == SMALL
    mixed = [x for line in lines for x in (f"[    0.000000] {line}", f"Nov 22 10:00:00 h kernel: {line}")]
    assert found(parse_boot_log("\n".join(mixed))) == SMALL


# What else a log tells -------------------------------------------------------------------------------


RESERVED: list[Entry] = [*SMALL[:-1], (4 * GIB, 8 * GIB, Kind.PRAM), (8 * GIB, 20 * GIB, Kind.RAM)]


@pytest.mark.parametrize("era", ERAS)
def test_the_map_after_the_command_line(era: str) -> None:
    lines = boot_lines(SMALL, era)
    lines[1] += " memmap=4G!4G"
    lines += ["user-defined physical RAM map:", *ERAS[era]("user", RESERVED)]
    lines += ["modified physical RAM map:", *ERAS[era]("modified", RESERVED[:-1]), "x"]
    log = parse_boot_log(text_of(lines))
    assert found(log) == SMALL
    assert log.firmware is not None
    assert log.user is not None
    assert [(e.start, e.end, e.kind) for e in log.user] == RESERVED
    assert log.modified is not None
    assert len(log.modified) == len(RESERVED) - 1
    assert log.command_line is not None
    made = apply_memmap(log.firmware, log.command_line)
    assert [(e.start, e.end, e.kind) for e in made] == RESERVED


def test_user_alone() -> None:
    log = parse_boot_log("$ dmesg | grep user\n" + text_of(era_b("user", RESERVED)))
    assert problem(log) == "the log has only the map after the command line (user:), not the firmware's"
    assert log.user is not None
    assert len(log.user) == len(RESERVED)


def test_a_broken_user_map_is_left_out() -> None:
    lines = [*boot_lines(SMALL), "user-defined physical RAM map:", *era_b("user", RESERVED), "x"]
    log = parse_boot_log(text_of(lines).replace("] persistent (type 12)", "] persis"))
    assert found(log) == SMALL
    assert log.user is None
    (warning,) = log.warnings
    assert warning.startswith("the user: map of the log is left out: line 20 of the map is cut: ")


def with_lines(*more: str) -> BootLog:
    return parse_boot_log(text_of([*boot_lines(SMALL), *more]))


def test_efi() -> None:
    assert with_lines("efi: EFI v2.70 by EDK II").efi is True
    assert with_lines("EFI v2.31 by Lenovo").efi is True
    assert with_lines("DMI: QEMU Standard PC", "last_pfn = 0x500000 max_arch_pfn = 0x400000000").efi is False
    assert with_lines("DMI: QEMU Standard PC").efi is None
    grep = parse_boot_log(text_of([*era_b("BIOS-e820", SMALL), "DMI: x", "e820: last_pfn = 0x1"]))
    assert grep.efi is None


def test_hypervisors() -> None:
    assert with_lines("Hypervisor detected: KVM").hypervisor == "KVM"
    log = with_lines("Hypervisor detected: Xen PV")
    assert log.xen
    log = with_lines("Hypervisor detected: Xen HVM")
    assert log.hypervisor == "Xen HVM"
    assert not log.xen


@pytest.mark.parametrize(
    ("line", "nodes"),
    [
        ("ACPI: SRAT: Node 1 PXM 1 [mem 0x100000000-0x13fffffff]", (NodeRange(1, 4 * GIB, 5 * GIB),)),
        ("ACPI: SRAT: Node 1 PXM 1 [mem 0x100000000-0x13fffffff] hotplug", (NodeRange(1, 4 * GIB, 5 * GIB),)),
        ("ACPI: SRAT: Node 1 PXM 1 [mem 0x100000000-0x13fffffff] non-volatile", ()),
        ("ACPI: SRAT: Node 1 PXM 1 [mem 0x100000000-0x13fffffff] hotplug non-volatile", ()),
        ("SRAT: Node 0 PXM 0 [mem 0x00000000-0x0009ffff]", (NodeRange(0, 0, 0xA0000),)),
        ("SRAT: Node 0 PXM 0 0-a0000", (NodeRange(0, 0, 0xA0000),)),
        ("SRAT: Node 2 PXM 7 100000-bfffffff", (NodeRange(2, MIB, 3 * GIB),)),
        ("SRAT: PXM 0 -> APIC 0x07 -> Node 0", ()),
    ],
)
def test_numa_nodes(line: str, nodes: tuple[NodeRange, ...]) -> None:
    log = with_lines(line, line)
    assert log.nodes == nodes
    assert log.warnings == ()


def test_a_cut_numa_line_makes_all_nodes_unknown() -> None:
    log = with_lines(
        "ACPI: SRAT: Node 0 PXM 0 [mem 0x00000000-0x0009ffff]", "ACPI: SRAT: Node 1 PXM 1 [mem 0x1000"
    )
    assert log.nodes == ()
    assert log.warnings[0].startswith(
        "the memory of the NUMA nodes is not known: line 14 is not understood: "
    )


SYMPTOMS = [
    ".text .data .bss are not marked as E820_TYPE_RAM!",
    "nd_pmem namespace0.0: [mem 0x40000000-0x4fefffff flags 0x200] misaligned, unable to map",
    "nd_pmem namespace0.0: probe with driver nd_pmem failed with error -95",
    "nd_pmem: probe of namespace0.0 failed with error -95",
    "e820: too many entries; ignoring [mem 0x100000000-0x13fffffff]",
    "E820 table full; ignoring [mem 0x100000000-0x13fffffff]",
    "e820_pmem e820_pmem: failed to register legacy persistent memory ranges",
    "devm_memremap_pages attempted on mixed region [mem 0x100000000-0x13fffffff flags 0x200]",
    "nd_pmem namespace0.0: Conflicting mapping in same section",
]


@pytest.mark.parametrize("line", SYMPTOMS)
def test_symptoms(line: str) -> None:
    assert with_lines("x", line, line).symptoms == (f"[    0.000000] {line}",)
    late = parse_boot_log(text_of(boot_lines(SMALL)).encode() + _noise(MIB) + line.encode())
    assert late.symptoms == (line,)


def test_other_drivers_errors_are_no_symptoms() -> None:
    assert with_lines("foo 0000:00:1f.0: probe failed with error -95").symptoms == ()


# The command line --------------------------------------------------------------------------------------


def words(*lines: str) -> tuple[str, ...] | None:
    log = parse_boot_log(text_of([*lines, HEADER, *era_b("BIOS-e820", SMALL), "x"]))
    return None if log.command_line is None else log.command_line.words


def test_either_command_line() -> None:
    assert words("Command line: ro a") == ("ro", "a")
    assert words("Kernel command line: ro b") == ("ro", "b")
    assert words("Command line: ro a", "Kernel command line: ro a bootconfig.b=1") == ("ro", "a")
    assert words("Command line:") is None
    assert (
        words("dracut-cmdline[300]: Using kernel command line parameters: x", "app: Command line: y") is None
    )


def test_a_pager_cut_the_command_line() -> None:
    log = with_lines(
        "Linux version 6.16.8 (a)", "Command line: ro memmap=1G!4G root=UUID=03b8>", *boot_lines(SMALL)[2:]
    )
    assert log.command_line is not None
    assert log.command_line.words == ("ro", "memmap=1G!4G")
    assert log.warnings == ("the command line in the log is cut: words at its end are not known",)


def test_printk_cuts_the_command_line() -> None:
    long = "Command line: " + "a=1234567 " * 96 + "memmap=12G!4G"
    log = parse_boot_log(text_of([long, *boot_lines(SMALL)[2:]]))
    assert log.command_line is not None
    assert log.command_line.words == ("a=1234567",) * 96  # half a memmap= would be another one
    assert log.warnings == ("the command line in the log is cut: words at its end are not known",)


def test_linux_7_prints_a_long_command_line_in_pieces() -> None:
    early = "Command line: " + "a=1234567 " * 96 + "memmap=12"
    late = [f"Kernel command line: {'a=1234567 ' * 48}\\", f"Kernel command line: {'a=1234567 ' * 48}\\"]
    lines = [early, *boot_lines(SMALL)[2:], *late, "Kernel command line: memmap=12G!4G ro"]
    log = parse_boot_log(text_of(lines))
    assert log.command_line is not None
    assert log.command_line.words[-2:] == ("memmap=12G!4G", "ro")
    assert log.warnings == ()


def test_escapes_are_undone() -> None:
    line = 'Command line: initrd=\\ucode.img dyndbg="file a +p; b" ro'
    for decoration in ("-J", "journal -o json"):
        log = parse_boot_log(text_of([line, *boot_lines(SMALL)[2:]], decoration))
        assert log.command_line is not None
        assert log.command_line.words == ("initrd=\\ucode.img", "dyndbg=file a +p; b", "ro")
    kmsg = text_of([line.replace("\\", "\\x5c"), *boot_lines(SMALL)[2:]], "kmsg")
    log = parse_boot_log(kmsg)
    assert log.command_line is not None
    assert log.command_line.words[0] == "initrd=\\ucode.img"


def test_half_a_character_in_json_is_no_crash() -> None:
    log = parse_boot_log('{"MESSAGE":"Command line: \\ud800 ro"}')
    assert log.command_line is not None
    assert log.command_line.words == ("?", "ro")


# Other sources ---------------------------------------------------------------------------------------------


SYSFS = [
    (10, "0x100000000\n", "0x4ffffffff\n", "System RAM\n"),
    (0, "0x0", "0x9fbff", "System RAM"),
    (2, "0xf0000", "0xfffff", "Reserved"),
    (1, "0x9fc00", "0x9ffff", "reserved"),
    (3, "0x100000", "0xbffdffff", "System RAM"),
    (4, "0xbffe0000", "0xbfffffff", "ACPI Non-volatile Storage"),
    (9, "0xfffc0000", "0xffffffff", "Reserved"),
]


def test_sysfs() -> None:
    made = parse_sysfs_memmap(SYSFS)
    assert [(e.start, e.end, e.kind) for e in made.entries] == SMALL
    assert [e.line for e in made.entries] == [0, 1, 2, 3, 4, 9, 10]
    assert (made.source, made.who) == ("/sys/firmware/memmap", "sysfs")


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("ACPI Tables", Kind.ACPI_DATA),
        ("Unusable memory", Kind.UNUSABLE),
        ("Persistent Memory (legacy)", Kind.PRAM),
        ("Persistent Memory", Kind.PMEM),
        ("Soft Reserved", Kind.SOFT_RESERVED),
        ("Unknown E820 type", Kind.UNKNOWN),
        ("something new", Kind.UNKNOWN),
    ],
)
def test_sysfs_words(words: str, kind: Kind) -> None:
    made = parse_sysfs_memmap([(0, "0x0", "0xfff", "System RAM"), (1, "0x1000", "0x1fff", words)])
    assert (made.entries[1].kind, made.entries[1].words) == (kind, words)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "is not complete"),
        (SYSFS[:1], "is not complete"),
        ([(0, "0x0", "0xfff", "Reserved")], "is not complete"),
        ([(0, "0x0", "", "System RAM")], "memmap/0 cannot be read: start '0x0', end ''"),
        ([(0, "0x1000", "0x0", "System RAM")], "memmap/0 ends before it begins"),
        ([(0, "0x0", "0x10000000000000", "System RAM")], "beyond 2\\^52"),
        ([(0, "-0x1000", "0xfff", "System RAM")], "memmap/0 ends before it begins, or"),
        ([(0, "0x0", "0x1fff", "System RAM"), (1, "0x1000", "0x2fff", "Reserved")], "memmap/0 and 1 overlap"),
        ([(0, "0x0", "0xfff", "System RAM")] * 2, "overlap"),
    ],
)
def test_sysfs_refuses(entries: list[tuple[int, str, str, str]], message: str) -> None:
    with pytest.raises(EmupmemError, match=message):
        parse_sysfs_memmap(entries)


IOMEM = """\
00000000-00000fff : Reserved
00001000-0009fbff : System RAM
40000000-4fffffff : Persistent Memory (legacy)
  40000000-4fffffff : namespace0.0
100000000-4ffffffff : System RAM
  101000000-101e0ffff : Kernel code
    101000000-101000fff : a : b
"""


def test_iomem() -> None:
    lines = parse_iomem(IOMEM)
    assert lines is not None
    assert [(x.depth, x.start, x.end, x.name) for x in lines][3:] == [
        (1, GIB, GIB + 256 * MIB, "namespace0.0"),
        (0, 4 * GIB, 20 * GIB, "System RAM"),
        (1, 4 * GIB + 16 * MIB, 0x101E10000, "Kernel code"),
        (2, 4 * GIB + 16 * MIB, 4 * GIB + 16 * MIB + PAGE, "a : b"),
    ]
    assert parse_iomem("") == ()
    assert parse_iomem("00000000-00000000 : Reserved\n  00000000-00000000 : x\n") is None


def test_iomem_refuses_other_text() -> None:
    with pytest.raises(EmupmemError, match='line 2 of /proc/iomem is not understood: "hello"'):
        parse_iomem("00000000-00000fff : Reserved\nhello\n")


DEBIAN = "Linux version 6.1.0-32-amd64 (debian-kernel@lists.debian.org) (gcc-12 (Debian 12.2.0-14) 12.2.0) "
UBUNTU = "Linux version 6.8.0-60-generic (buildd@x) (x86_64-linux-gnu-gcc-13 (Ubuntu 13.3.0) 13.3.0) #63-Ubuntu SMP"


@pytest.mark.parametrize(
    ("banner", "signature", "version", "text"),
    [
        (DEBIAN + "#1 SMP PREEMPT_DYNAMIC Debian 6.1.129-1 (2025-03-06)", "", (6, 1, 129), "Linux 6.1.129"),
        (DEBIAN + "#1 SMP PREEMPT_DYNAMIC", "", (6, 1, None), "Linux 6.1.0-32-amd64"),
        (
            "Linux version 6.12.38+deb13-amd64 (x) #1 SMP Debian 6.12.38-1 (2025)",
            "",
            (6, 12, 38),
            "Linux 6.12.38",
        ),
        ("Linux version 7.2-amd64 (x) #1 SMP Debian 7.2-1~exp1 (2026)", "", (7, 2, 0), "Linux 7.2.0"),
        (UBUNTU, "", (6, 8, None), "Linux 6.8.0-60-generic"),
        (UBUNTU, "Ubuntu 6.8.0-60.63-generic 6.8.12\n", (6, 8, 12), "Linux 6.8.12"),
        (UBUNTU, "Ubuntu 5.15.0-60.63-generic 5.15.178", (6, 8, None), "Linux 6.8.0-60-generic"),
        ("Linux version 6.6.31-200.fc39.x86_64 (mockbuild@x) (gcc) #1 SMP", "", (6, 6, 31), "Linux 6.6.31"),
        ("Linux version 6.6.4-arch1-1 (linux@archlinux) (gcc) #1 SMP", "", (6, 6, 4), "Linux 6.6.4"),
        ("Linux version 6.9.0-arch1-1 (linux@archlinux) (gcc) #1 SMP", "", (6, 9, 0), "Linux 6.9.0"),
        (
            "Linux version 5.14.0-427.el9.x86_64 (m@x) (gcc) #1 SMP",
            "",
            (5, 14, None),
            "Linux 5.14.0-427.el9.x86_64",
        ),
        ("6.6.31", "", (6, 6, 31), "Linux 6.6.31"),
        ("Linux version 7.1.0 (x)", "", (7, 1, 0), "Linux 7.1.0"),
    ],
)
def test_kernel_release(banner: str, signature: str, version: tuple[int, int, int | None], text: str) -> None:
    made = kernel_release(banner, signature)
    assert made is not None
    assert (made.major, made.minor, made.stable) == version
    assert made.text == text


def test_kernel_release_of_no_banner() -> None:
    assert kernel_release("") is None
    assert kernel_release("what is this 6.1.2") is None


def test_digits_of_other_scripts_are_no_version() -> None:
    assert kernel_release("Linux version 7.\u0663.1") is None
    assert kernel_release("Linux version 7.3.1") is not None


# Logs of our own machines ------------------------------------------------------------------------------------


MACHINES = sorted(p.parent for p in BOOTS.glob("*/dmesg")) if BOOTS.is_dir() else []


def _sysfs(folder: Path) -> FirmwareMap:
    rows = [line.split(maxsplit=2) for line in (folder / "memmap").read_text().splitlines() if line.strip()]
    return parse_sysfs_memmap([(i, *row) for i, row in enumerate(rows)])  # type: ignore[misc]


def _ranges(entries: tuple[MapEntry, ...]) -> list[Entry]:
    return [(e.start, e.end, e.kind) for e in entries]


def _joined(entries: list[Entry]) -> list[Entry]:
    """Up to Linux 6.14 EFI boots split RAM at setup_data, which prints as usable too."""
    out: list[Entry] = []
    for start, end, kind in entries:
        if out and kind is Kind.RAM and out[-1][1:] == (start, kind):
            out[-1] = (out[-1][0], end, kind)
        else:
            out.append((start, end, kind))
    return out


@pytest.mark.parametrize("folder", MACHINES, ids=lambda p: p.name)
def test_own_machines(folder: Path) -> None:
    log = parse_boot_log((folder / "dmesg").read_bytes(), "dmesg")
    assert log.problem is None
    assert log.firmware is not None
    if (folder / "memmap").exists():
        assert _ranges(log.firmware.entries) == _ranges(_sysfs(folder).entries)
    assert log.command_line is not None
    cmdline = (folder / "cmdline").read_text().strip()
    assert log.command_line.text == cmdline
    assert log.efi is ("uefi" in folder.name)
    version = kernel_release(log.linux_version)
    assert version == kernel_release((folder / "version").read_text())
    if log.user is not None:
        assert _ranges(apply_memmap(log.firmware, log.command_line)) == _joined(_ranges(log.user))
    else:
        assert not log.command_line.items
    lines = parse_iomem((folder / "iomem").read_text())
    assert lines
    legacy = [(x.start, x.end) for x in lines if x.name == "Persistent Memory (legacy)"]
    if not log.symptoms:
        assert legacy == [(e.start, e.end) for e in log.user or () if e.kind is Kind.PRAM]


DECORATED = sorted((BOOTS / "decorated").glob("*.log")) if BOOTS.is_dir() else []


@pytest.mark.parametrize("file", DECORATED, ids=lambda p: p.stem)
def test_own_decorations(file: Path) -> None:
    with file.open("rb") as stream:
        log = parse_boot_log(stream, file.name)
    assert log.problem is None
    assert log.firmware is not None
    assert log.linux_version
    plain = next((f for f in DECORATED if f.name.startswith(file.name.split("-")[0])), file)
    assert _ranges(log.firmware.entries) == _ranges(read_firmware_map(plain.read_bytes()).entries)


# Logs of other machines, which stay where they are -------------------------------------------------------------


CORPUS = Path(os.environ["EMUPMEM_CORPUS"]) / "e820" if os.environ.get("EMUPMEM_CORPUS") else None
EXPECTED: dict[str, Any] = json.loads((CORPUS / "expected.json").read_text()) if CORPUS is not None else {}


def _known(entries: list[list[Any]]) -> list[tuple[int, int, str]]:
    return [(start, end + 1, words) for start, end, words in entries]


@pytest.mark.parametrize("name", EXPECTED)
def test_corpus(name: str) -> None:
    assert CORPUS is not None
    known = EXPECTED[name]
    with (CORPUS / name).open("rb") as stream:
        log = parse_boot_log(stream, name)
    wanted = _known((known.get("boots") or [known["e820"] or known.get("xen", [])])[-1])
    user = _known(known["user"])
    if "joined_wraps" in known or not wanted or wanted[0][0]:
        if log.firmware is not None:
            assert log.firmware.who == "BIOS-88"  # which the expectations do not list
        else:
            assert log.problem is not None
    else:
        assert log.firmware is not None, log.problem
        assert [(e.start, e.end, e.words) for e in log.firmware.entries] == wanted
        assert log.firmware.ram_bytes == known["usable_bytes"] or known.get("xen")
    if log.user is not None:
        assert [(e.start, e.end, e.words) for e in log.user] == user
    else:
        assert not user or "joined_wraps" in known
    if log.command_line is not None:
        assert [w for w in log.command_line.words if w.startswith(("mem=", "memmap="))] == known[
            "cmdline_mem"
        ]
    assert bool(log.warnings) == (
        "incomplete_lines" in known or name[:3] in ("026", "038") or ("joined_wraps" in known and bool(user))
    )
