# SPDX-License-Identifier: Apache-2.0
"""Boot logs and their cousins, text in and values out: the firmware map, and what else a log tells.

A wrong number from here makes a machine unbootable. So whatever does not read exactly as the kernel
prints it (arch/x86/kernel/e820.c e820__print_table, in its three generations) is an error that names
the line, and never a map with a hole in it. All knowledge of inclusive and exclusive ends is here.

The text is read in pieces, and only lines that hold a known phrase are looked at. Deep in a long
log, where no boot began lately, only the phrases that every boot has are searched for.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import replace
from typing import IO

from emupmem.kernel.cmdline import U64, parse_command_line
from emupmem.model import (
    LOW_LIMIT,
    MIB,
    BootLog,
    CommandLine,
    EmupmemError,
    FirmwareMap,
    KernelRelease,
    Kind,
    MapEntry,
)
from emupmem.parser.blocks import WHOLE_LOG_HINT, Boot, fold
from emupmem.parser.grammar import pattern
from emupmem.parser.reader import LogReader
from emupmem.parser.scan import ASLEEP, PIECE, encoded, regions_of_interest, scan

Source = str | bytes | IO[str] | IO[bytes]
"""A log: text, bytes, or an open file of either, which need not be seekable."""
_AWAKE = 2 << 20
"""Bytes after the beginning of a boot in which everything is looked for: a boot prints less."""
_UNPACK = "unpack it first"
_NOT_TEXT = (
    (b"\xff\xfe", "UTF-16 text", "save it as UTF-8"),
    (b"\xfe\xff", "UTF-16 text", "save it as UTF-8"),
    (b"\x1f\x8b", "compressed (gzip)", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "compressed (zstd)", _UNPACK),
    (b"\xfd7zXZ", "compressed (xz)", _UNPACK),
    (b"BZh", "compressed (bzip2)", _UNPACK),
)


# What it says ----------------------------------------------------------------------------------


def _answer(reader: LogReader, name: str, head: bytes) -> BootLog:
    boot = fold(reader.before, reader.boot)
    warnings: list[str] = []
    firmware, problem = None, None
    try:
        firmware = _firmware(boot, reader.before is not None, name, head, warnings)
    except EmupmemError as exc:
        problem = exc
    late = bool(boot.blocks) and boot.past_efi == {"DMI", "pfn"}
    if boot.bad_node:
        warnings.append(f"the memory of the NUMA nodes is not known: {boot.bad_node}")
    block = boot.blocks.get("firmware")
    user, modified = _later_map(boot, "user", warnings), _later_map(boot, "modified", warnings)
    line, line_known = _booted_with(boot, warnings)
    if boot.mirrored:
        warnings.append(f'which part of the memory is mirrored is not known here ("{boot.mirrored}")')
    return BootLog(
        firmware=firmware,
        problem=problem,
        user=user,
        modified=modified,
        losses=tuple(boot.losses.values()),
        unplaced=_unplaced(boot, firmware) if modified is None else "",
        i386=boot.i386 or _is_i386(boot.banner),
        old_words=block is not None and block.old_words,
        confidential=boot.confidential,
        command_line=line,
        line_known=line_known,
        linux_version=boot.banner,
        efi=True if boot.efi else (False if late else None),
        xen=boot.xen_pv or boot.hypervisor == "Xen PV" or (block is not None and block.who == "Xen"),
        hypervisor=boot.hypervisor,
        nodes=() if boot.bad_node else tuple(boot.nodes),
        symptoms=tuple(boot.symptoms),
        warnings=tuple(warnings),
    )


def _firmware(boot: Boot, has_earlier: bool, name: str, head: bytes, warnings: list[str]) -> FirmwareMap:
    """The firmware map of a boot. Raises EmupmemError, see parse_boot_log."""
    block = boot.blocks.get("firmware")
    extended = boot.blocks.get("extended")
    if extended is not None and (extended.pieces or extended.problem):
        block = extended  # more than 128 entries: the other block has the first 128 only
    if block is None:
        raise _no_map(boot, has_earlier, head)
    entries = block.entries()
    if boot.differ is None and block is boot.blocks.get("firmware"):
        boot.replace(block)
    if boot.differ is not None and boot.banner:
        raise boot.differ
    if not any(e.kind is Kind.RAM for e in entries):
        raise EmupmemError("the map in the log has no usable memory: lines of it are lost", WHOLE_LOG_HINT)
    above = f"memory above {entries[-1].end:#x} may be missing"
    if block.problem is not None:
        warnings.append(f"the log ends inside the map ({block.problem.message}): {above}")
    elif not block.followed and (block.header or boot.banner):
        warnings.append(
            f"the log ends with the map, in line {entries[-1].line}: if it was cut there, {above}"
        )
    return FirmwareMap(entries, name, block.who)


def _unplaced(boot: Boot, firmware: FirmwareMap | None) -> str:
    """The line that says RAM was lost, where no line and no map says which."""
    if boot.damaged or firmware is None:
        return boot.damaged
    taken = [(start, end) for start, end in boot.losses if end < U64]  # beyond is a limit, see survey
    if not boot.lost_bytes:
        return "" if any(end > MIB for _, end in taken) else boot.lost
    return "" if _ram_in(firmware, taken) >= boot.lost_bytes else boot.lost


def _ram_in(firmware: FirmwareMap, spans: Iterable[tuple[int, int]]) -> int:
    """Bytes of the map's RAM that lie in one of the spans."""
    total, done = 0, 0
    for start, end in sorted(spans):
        total += sum(max(0, min(end, s.end) - max(start, done, s.start)) for s in firmware.ram)
        done = max(done, end)
    return total


def _no_map(boot: Boot, has_earlier: bool, head: bytes) -> EmupmemError:
    if not head:
        return EmupmemError("the log is empty", WHOLE_LOG_HINT)
    for magic, what, remedy in _NOT_TEXT:
        if head.startswith(magic):
            return EmupmemError(f"the log is {what}", remedy)
    other = pattern("other processor").search(boot.banner)
    if other is not None:
        return EmupmemError(
            f"the log is of another processor ({other[1]})", "memmap=SIZE!OFFSET exists on x86-64 only"
        )
    if has_earlier:
        where = f", which begins in line {boot.banner_line}," if boot.banner_line else ""
        return EmupmemError(f"the last boot of the log{where} has no firmware map", WHOLE_LOG_HINT)
    if "user" in boot.blocks:
        why = "the log has only the map after the command line (user:), not the firmware's"
        return EmupmemError(why, WHOLE_LOG_HINT)
    return EmupmemError("there is no firmware map (BIOS-e820 lines) in the log", WHOLE_LOG_HINT)


def _later_map(boot: Boot, name: str, warnings: list[str]) -> tuple[MapEntry, ...] | None:
    block = boot.blocks.get(name)
    if block is None:
        return None
    try:
        if block.problem is not None:
            raise block.problem
        return block.entries()
    except EmupmemError as exc:
        warnings.append(f"the {name}: map of the log is left out: {exc.message}")
        return None


def _booted_with(boot: Boot, warnings: list[str]) -> tuple[CommandLine | None, bool]:
    """The command line, and whether all of it is there.

    The earlier print has what the memory map was made of, but may be cut.
    """
    text, key = (boot.early, "Command") if boot.early else (boot.late, "Kernel command")
    if key in boot.cut_lines and boot.late.startswith(text) and "Kernel command" not in boot.cut_lines:
        text, key = boot.late, "Kernel command"
    if key in boot.cut_lines:
        warnings.append("the command line in the log is cut: words at its end are not known")
    return (parse_command_line(text) if text else None), bool(text) and key not in boot.cut_lines


def parse_boot_log(source: Source, name: str = "") -> BootLog:
    """Read the last boot of a kernel log.

    `source` is text, bytes, or an open file of either, read once in pieces; `name` becomes the
    source of the map. Never raises for what the log says: where it has no map that can be trusted,
    `firmware` is None and `problem` says why, naming the line. A log that ends inside the map gives
    what was printed until then, and a warning.
    """
    stream = io.BytesIO(encoded(source)) if isinstance(source, str | bytes) else source
    again = stream.tell() if stream.seekable() else None
    log, counted = _read(stream, name, count=again is None)
    if counted:
        return log
    said = (*log.warnings, str(log.problem))
    named = any(pattern("numbered").search(text) for text in said)
    if again is not None and (named or any(x.end > LOW_LIMIT for x in log.losses)):
        stream.seek(again)  # the lines that are named must be counted
        return _read(stream, name, count=True)[0]
    return _uncounted(log)


def _read(stream: IO[str] | IO[bytes], name: str, count: bool) -> tuple[BootLog, bool]:
    """The log, and whether the line numbers in it are right: counting takes as long as searching."""
    reader = LogReader()
    number, awake, head, counted = 1, PIECE, b"", True
    unread: tuple[bytearray, int, int] | None = None  # the region before, if it was not looked at
    for region, size in regions_of_interest(stream):
        head = head or bytes(region[:8])
        if any(region.find(phrase, 0, size) >= 0 for phrase in ASLEEP):
            awake = _AWAKE
            if unread is not None:
                scan(*unread, reader)
        unread = (region, size, number)
        if awake > 0 or reader.watch > 0:
            scan(region, size, number, reader)
            unread = None
        if reader.enough:
            break
        if reader.lively:
            awake, reader.lively = _AWAKE, False
        awake -= size
        if count or awake > 0:
            number += region.count(b"\n", 0, size)
        else:
            counted = False
    return _answer(reader, name, head), counted


def _uncounted(log: BootLog) -> BootLog:
    """The log without line numbers, where they are unknown."""

    def plain(entries: Iterable[MapEntry]) -> tuple[MapEntry, ...]:
        return tuple(replace(e, line=0) for e in entries)

    firmware = log.firmware and replace(log.firmware, entries=plain(log.firmware.entries))
    user, modified = log.user and plain(log.user), log.modified and plain(log.modified)
    losses = tuple(replace(x, line=0) for x in log.losses)
    return replace(log, firmware=firmware, user=user, modified=modified, losses=losses)


def read_firmware_map(source: Source, name: str = "") -> FirmwareMap:
    """The firmware map of the last boot of a log, as parse_boot_log; raises its problem instead."""
    log = parse_boot_log(source, name)
    if log.firmware is None:
        raise log.problem or EmupmemError("there is no firmware map in the log", WHOLE_LOG_HINT)
    return log.firmware


def kernel_release(banner: str, signature: str = "") -> KernelRelease | None:
    """The upstream version of a kernel from its banner; None where the text is none.

    `banner` is `Linux version …` as the log and /proc/version have it, `signature` the text of
    Ubuntu's /proc/version_signature. Debian's stable number stands behind the `#`; Ubuntu's only in
    the signature. `stable` is None where a distribution counts by itself (6.8.0-60, 5.14.0-427.el9).
    """
    found = pattern("release").match(banner.strip())
    if found is None:
        return None
    major, minor, patch, suffix = int(found[1]), int(found[2]), found[3], found[4]
    build = banner.partition(" #")[2]
    stable: int | None = int(patch) if patch else 0
    text = f"Linux {found[1]}.{found[2]}"
    if "Ubuntu" in build:
        given = pattern("ubuntu").search(signature)
    elif "Debian" in build:
        given = pattern("debian").search(build)
    else:
        # A 0 with a counter behind it is frozen by the distribution, or cannot be told from that.
        given = None if stable == 0 and pattern("counter").match(suffix) else found
    same = given is not None and (int(given[1]), int(given[2])) == (major, minor)
    stable = int(given[3] or 0) if given is not None and same else None
    text = f"{text}.{stable}" if stable is not None else f"Linux {found[0].removeprefix('Linux version ')}"
    release = found[0].removeprefix("Linux version ")
    return KernelRelease(major, minor, stable, text, release, _is_i386(banner))


def _is_i386(banner: str) -> bool:
    """Whether a banner or release is of a 32-bit kernel: by its own name and its compiler's only."""
    release, _, rest = banner.removeprefix("Linux version ").partition(" ")
    compiler = rest.partition(") (")[2][:100] or rest[:100]
    found = pattern("i386").search
    return found(release.lower()) is not None or compiler.startswith(("i386-", "i486-", "i586-", "i686-"))
