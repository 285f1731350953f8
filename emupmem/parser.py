"""Boot logs and their cousins, text in and values out: the firmware map, and what else a log tells.

A wrong number from here makes a machine unbootable. So whatever does not read exactly as the kernel
prints it (arch/x86/kernel/e820.c e820__print_table, in its three generations) is an error that names
the line, and never a map with a hole in it. All knowledge of inclusive and exclusive ends is here.

The text is read in pieces, and only lines that hold a known phrase are looked at. Deep in a long
log, where no boot began lately, only the phrases that every boot has are searched for.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from itertools import pairwise
from typing import IO

import regex

from emupmem.cmdline import parse_command_line
from emupmem.model import (
    LOW_LIMIT,
    MIB,
    BootLog,
    CommandLine,
    EmupmemError,
    FirmwareMap,
    IomemLine,
    KernelRelease,
    Kind,
    Loss,
    MapEntry,
    NodeRange,
)

Source = str | bytes | IO[str] | IO[bytes]
"""A log: text, bytes, or an open file of either, which need not be seekable."""

_PIECE = 256 << 10
_LONG_LINE = 8 << 10
_AWAKE = 2 << 20
"""Bytes after the beginning of a boot in which everything is looked for: a boot prints less."""
_WATCHED = 300
"""Lines after a map line that are looked at one by one."""
_MAX_ENTRIES = 4096  # the kernel's own table has at most 128 + 3 * 1024
_MAX_ADDRESS = 1 << 52  # x86-64 has no more physical address bits
_U64_MAX = (1 << 64) - 1
_MAX_KEPT = 64  # symptoms
_MAX_LOSSES = 512  # a machine has a dozen
_PRINTK_MAX = 975  # the shortest limit of one printk record, kernel/printk/printk.c LOG_LINE_MAX

_HINT = "on the machine itself leave the log away, or save a whole one: journalctl -k -b -o cat > FILE"
_CUT_HINT = "if the lines are wrapped or cut, save the log as it is printed: journalctl -k -b -o cat > FILE"

_KINDS = {
    "usable": Kind.RAM,
    "System RAM": Kind.RAM,
    "RAM": Kind.RAM,
    "kernel usable RAM": Kind.RAM,
    "reserved": Kind.RESERVED,
    "device reserved": Kind.RESERVED,
    "soft reserved": Kind.SOFT_RESERVED,
    "ACPI data": Kind.ACPI_DATA,
    "ACPI NVS": Kind.ACPI_NVS,
    "unusable": Kind.UNUSABLE,
    "persistent (type 7)": Kind.PMEM,
    "persistent RAM (type 7)": Kind.PMEM,
    "persistent (type 12)": Kind.PRAM,
    "persistent RAM (type 12)": Kind.PRAM,
    "type 7": Kind.PMEM,
    "type 12": Kind.PRAM,
}
_NEVER_NUMBERS = {f"type {n}" for n in range(1, 6)}  # these have words: a number is the rest of a longer one

_SYSFS_KINDS = {
    "system ram": Kind.RAM,
    "reserved": Kind.RESERVED,
    "soft reserved": Kind.SOFT_RESERVED,
    "acpi tables": Kind.ACPI_DATA,
    "acpi non-volatile storage": Kind.ACPI_NVS,
    "unusable memory": Kind.UNUSABLE,
    "persistent memory": Kind.PMEM,
    "persistent memory (legacy)": Kind.PRAM,
}

_FIRMWARE = ("BIOS-e820", "BIOS-e801", "BIOS-88", "Xen")
_WHO = ("BIOS-", "Xen:", "user:", "extended:", "modified:")
_HEADERS = {
    "BIOS-provided": "firmware",
    "extended": "extended",
    "user-defined": "user",
    "modified": "modified",
}

# Every boot prints the first and the last; the second is the beginning of a map without its header.
# Long phrases, because bytes.find skips by their length: these cost less than one short one.
_ASLEEP = (
    b"BIOS-provided physical RAM map:",
    b"[mem 0x0000000000000000-0x0000",
    b"Inode-cache hash table entries:",
)
_PHRASES = (
    b"BIOS-",
    b"physical RAM map:",
    b"Linux version ",
    b"ommand line:",
    b"[mem 0x0000000",
    b" - 0000000",
    b"SRAT: Node ",
    b"misaligned, unable to map",
    b"failed with error -95",
    b".data .bss are not marked",
    b"table full; ignoring",
    b"too many entries; ignoring",
    b"legacy persistent memory ranges",
    b"e820: update [mem",
    b"e820: remove [mem",
    b"e820 update range:",
    b"e820 remove range:",
    b"MTRRs don't cover all",
    b"update e820 for mtrr",
    b"devm_memremap_pages attempted",
    b"Conflicting mapping in same section",
)
_UNPACK = "unpack it first"
_NOT_TEXT = (
    (b"\xff\xfe", "UTF-16 text", "save it as UTF-8"),
    (b"\xfe\xff", "UTF-16 text", "save it as UTF-8"),
    (b"\x1f\x8b", "compressed (gzip)", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "compressed (zstd)", _UNPACK),
    (b"\xfd7zXZ", "compressed (xz)", _UNPACK),
    (b"BZh", "compressed (bzip2)", _UNPACK),
)
# Phrase, and a word that must be in the same line for it to be about memory.
_SYMPTOMS = (
    ("misaligned, unable to map", ""),
    ("failed with error -95", "pmem"),
    (".data .bss are not marked", "E820"),
    ("table full; ignoring", "820"),
    ("too many entries; ignoring", "820"),
    ("failed to register legacy persistent memory ranges", ""),
    ("devm_memremap_pages attempted on mixed region", ""),
    ("Conflicting mapping in same section", ""),
)


# Grammar -------------------------------------------------------------------------------------

_SIZE = r"\d{1,20}(?:\.\d{1,20})?[ \t]++[KMGTPE]?i?B"
_PATTERNS = {
    # Who prints a map line, and where its range begins.
    "who": r"(?<![\w-])(BIOS-e820|BIOS-e801|BIOS-88|Xen|extended|user|modified):[ \t]*+",
    # The rest of the line, in the words of all generations; the sizes were posted, but not merged.
    "entry": (
        rf"\[mem 0x(?P<a>[0-9a-f]{{16}})-0x(?P<b>[0-9a-f]{{16}})\][ \t]++(?:{_SIZE}[ \t]++)?(?P<new>@|type \d{{1,10}})"
        rf"|\[gap 0x(?P<a>[0-9a-f]{{16}})-0x(?P<b>[0-9a-f]{{16}})\](?P<gap>)(?:[ \t]++{_SIZE}[ \t]*+(?:\.\.\.)?)?"
        r"|(?P<c>[0-9a-f]{16}) - (?P<d>[0-9a-f]{16}) (?:\((?P<old>@)\)|(?P<old>type \d{1,10}))"
    ).replace("@", "|".join(regex.escape(words, literal_spaces=True) for words in _KINDS)),
    "header": r"(BIOS-provided|extended|user-defined|modified) physical RAM map:",
    # Where a message begins: stamps, levels, who logged it; a quote in JSON.
    "lead": r"[];>\"]$|\bkernel:$|\(early\)$|:[a-z]+[ ]*+:$|\d\.\d+$|[+-]\d\d:\d\d$|\bMESSAGE=$",
    "banner": r"Linux version \d+\.\d+",
    "command line": r"(?:Command|Kernel command) line:(?: |$)",
    "any range": r"\[(?:mem|gap) 0x[0-9a-f]{16}-|[0-9a-f]{16} - [0-9a-f]{16} ",
    # e820__range_update and e820__range_remove: the end is exclusive up to Linux 3.4, as in the map.
    "taken": (
        r"e820(?:: (?P<act>update|remove) \[mem 0x(?P<a>[0-9a-f]{8,16})-0x(?P<b>[0-9a-f]{8,16})\]"
        r"| (?P<act>update|remove) range: (?P<c>[0-9a-f]{16}) - (?P<d>[0-9a-f]{16}))(?P<rest>[^\"]*+)"
    ),
    "begun": r"e820(?:: (?:update|remove) \[mem| (?:update|remove) range:)(?: 0[0-9a-fx]|[ \t]*+$)",
    "losing": r"losing (\d{1,12})[ ]?MB of RAM",
    "string": r"(?:[^\"\\]|\\.)*+",
    "escape": r"\\x([0-9a-f]{2})",
    "srat": (
        r"SRAT: Node (\d{1,9}) PXM \d{1,10} "
        r"(?:\[mem 0x([0-9a-f]{1,16})-0x([0-9a-f]{1,16})\]|([0-9a-f]{1,16})-([0-9a-f]{1,16}))(.*+)"
    ),
    "efi": r"(?:efi: )?EFI v\d",
    "xen pv": r"Booting (?:paravirtualized )?kernel (?:with PVH extensions )?on Xen(?: PV)?[ \t]*+(?:$|\")",
    "hypervisor": r"Hypervisor detected: ([^\"]*+)",
    "colour": r"\x1b(?:\[[0-9;:]*+(?:[A-Za-z]|$)|$)",
    "record": r"\d+,\d+,\d+,[^;]*+;",
    "numbered": r"\blines? \d",
    "iomem": r"( *+)([0-9a-f]{1,16})-([0-9a-f]{1,16}) : (.*+)",
    "release": r"(?:Linux version )?(\d{1,3})\.(\d{1,4})(?:\.(\d{1,5}))?([^\s]*+)",
    # In the release of a 32-bit kernel: -686-pae, .i686.PAE, -generic-pae
    # A number alone may count builds: 5.14.0-386.el9.x86_64.
    "i386": r"[-._]i[3-6]86(?![a-z0-9])|-[3-6]86(?:-pae|-bigmem|-smp)?$|[-.+](?:pae|bigmem)$",
    "ubuntu": r"^Ubuntu \S++ (\d+)\.(\d+)\.(\d+)",
    "debian": r"\bDebian (?:\d+:)?(\d+)\.(\d+)(?:\.(\d+))?",
    "counter": r"-\d",
}


@cache
def _pattern(name: str) -> regex.Pattern[str]:
    """A pattern, compiled when it is first needed. The kernel prints ASCII: other digits are none."""
    return regex.compile(_PATTERNS[name], regex.ASCII)


def _visible(text: str, most: int = 100) -> str:
    """Text for a message: shortened, control characters made visible."""
    shown = text if len(text) <= most else text[: most - 1] + "…"
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in shown)


class _Broken(Exception):
    """A map line of `who` that does not read as the kernel prints it; `cut`: its beginning does."""

    def __init__(self, who: str, why: str, cut: bool = False) -> None:
        super().__init__(who, why)
        self.who = who
        self.why = why
        self.cut = cut


@dataclass(slots=True)
class _Line:
    """A map line: who printed it, what stands before, and its entry (kind None for a `[gap`)."""

    who: str
    lead: str
    start: int
    end: int
    kind: Kind | None
    words: str


def _map_line(text: str) -> _Line | None:
    """Read a map line; None if the line is none. Raises _Broken for a damaged one."""
    if not any(who in text for who in _WHO):
        return None
    for found in _pattern("who").finditer(text):
        who, at = found[1], found.end()
        rest = text[at : at + 256]
        if _is_entry(who, rest):
            lead = text[: found.start()]
            if lead.rstrip().endswith('"'):  # JSON: the message ends at the next quote
                rest = rest.partition('"')[0].rstrip()
            return _Line(who, lead, *_entry(who, rest))
    return None


def _is_entry(who: str, rest: str) -> bool:
    """Whether an entry, or the beginning of one, follows `who:`."""
    if rest.startswith(("[m", "[g", "0000")):
        return True
    return rest in ("", "[", "0", "00", "000") and who.startswith("BIOS-")


@lru_cache(maxsize=4096)
def _entry(who: str, rest: str) -> tuple[int, int, Kind | None, str]:
    """(start, end, kind, words) of an entry; remembered, because boots of a machine print the same ones."""
    found = _pattern("entry").fullmatch(rest)
    if found is None:
        cut = _pattern("entry").fullmatch(rest, partial=True) is not None
        raise _Broken(who, "is cut" if cut else "is not as the kernel prints it", cut)
    first, last, new, gap, old_first, old_end, old = found.group("a", "b", "new", "gap", "c", "d", "old")
    words = new or old or ""
    if words in _NEVER_NUMBERS:
        raise _Broken(who, "is cut", cut=True)
    if old_end is not None:
        start, end = int(old_first, 16), int(old_end, 16)  # up to Linux 3.4: the end is exclusive
    else:
        start, end = int(first, 16), int(last, 16) + 1
    if end <= start:
        raise _Broken(who, "ends before it begins")
    if end > _MAX_ADDRESS:
        raise _Broken(who, "is beyond 2^52, where no machine has memory")
    kind = None if gap is not None else _KINDS.get(words, Kind.UNKNOWN)
    return start, end, kind, words


# Blocks --------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Block:
    """The lines of one printed map."""

    who: str = ""
    header: int = 0  # line number, 0 where the header was not seen
    pieces: list[MapEntry] = field(default_factory=list)
    gaps: set[int] = field(default_factory=set)  # starts of the pieces that are no entries
    first_text: str = ""
    problem: EmupmemError | None = None
    problem_is_last: bool = False  # it is a cut line, and nothing follows it
    followed: bool = False  # other lines follow the last one
    suspect: tuple[int, str] | None = None  # one of them, which would be a cut line if the map went on
    prefix: str = ""  # what stands before the range in the last line

    @property
    def first_line(self) -> int:
        return self.header or (self.pieces[0].line if self.pieces else 0)

    def blame(self, number: int, text: str, why: str, cut: bool = False) -> None:
        if self.problem is None:
            self.problem = EmupmemError(f'line {number} of the map {why}: "{_visible(text)}"', _CUT_HINT)
            self.problem_is_last = cut

    def add(self, line: _Line, number: int, text: str) -> None:
        if self.problem is None and self.suspect is not None:
            self.blame(*self.suspect, "is cut")
        if self.problem is not None:
            return
        piece = MapEntry(line.start, line.end, line.kind or Kind.UNKNOWN, line.words, number)
        last = self.pieces[-1] if self.pieces else None
        if last is None:
            self.first_text = text
        elif (last.start, last.end, last.words) == (piece.start, piece.end, piece.words):
            return  # printed twice, by the console and the log
        elif piece.start < last.end:
            self.blame(number, text, f"overlaps or runs behind line {last.line}")
            return
        if len(self.pieces) >= _MAX_ENTRIES:
            self.blame(number, text, f"is one of more than {_MAX_ENTRIES}, which no kernel prints")
            return
        self.pieces.append(piece)
        if line.kind is None:
            self.gaps.add(piece.start)

    def looks_cut(self, text: str) -> bool:
        """Whether a line without an entry is the beginning of a map line, or one that lost its beginning."""
        if not self.prefix or not text.strip(" \t>|"):
            return False
        if "0x0" in text or " - 0" in text:
            found = _pattern("any range").search(text)
            if found is not None and _shape(self.prefix).endswith(_shape(text[: found.start()])):
                return True
        return len(text) < len(self.prefix) and _shape(self.prefix).startswith(_shape(text))

    def entries(self) -> tuple[MapEntry, ...]:
        """The entries, if they are all that was printed. Raises EmupmemError, for any doubt."""
        if self.problem is not None and not (self.problem_is_last and self.pieces):
            raise self.problem
        if not self.pieces:
            raise EmupmemError(f"line {self.header} announces a memory map, but no line of it follows", _HINT)
        first = self.pieces[0]
        if first.start >= (MIB if self.header else 1):
            raise EmupmemError(
                f'the beginning of the map is lost: it starts with line {first.line}, "{_visible(self.first_text)}"',
                _HINT,
            )
        if first.start and self.header and first.line != self.header + 1:
            raise EmupmemError(
                f"line {self.header + 1} should be the first of the map, but the map starts with line {first.line}, "
                f'"{_visible(self.first_text)}"',
                _CUT_HINT,
            )
        if self.gaps:
            self._check_gaps()
        return tuple(p for p in self.pieces if p.start not in self.gaps)

    def _check_gaps(self) -> None:
        """Linux 7 prints a line for each hole, so that a lost line shows as a hole without one."""
        if self.pieces[0].start:
            raise EmupmemError(f"a line of the map is lost before line {self.pieces[0].line}", _HINT)
        for last, piece in pairwise(self.pieces):
            if last.end != piece.start:
                raise EmupmemError(
                    f"a line of the map is lost between lines {last.line} and {piece.line}", _HINT
                )


_NO_DIGITS = str.maketrans("123456789", "000000000")


def _shape(text: str) -> str:
    return text.translate(_NO_DIGITS)


@dataclass(slots=True)
class _Boot:
    """What was seen of one boot."""

    banner: str = ""
    banner_line: int = 0
    early: str = ""  # "Command line:"
    late: str = ""  # "Kernel command line:", printed again once more is known
    late_goes_on: bool = False
    cut_lines: set[str] = field(default_factory=set)  # those two, where their ends are lost
    blocks: dict[str, _Block] = field(default_factory=dict)
    earlier: _Block | None = None  # the firmware map before blocks["firmware"]
    differ: EmupmemError | None = None
    efi: bool = False
    past_efi: set[str] = field(default_factory=set)
    hypervisor: str = ""
    nodes: dict[NodeRange, None] = field(default_factory=dict)
    bad_node: str = ""
    symptoms: dict[str, None] = field(default_factory=dict)
    losses: dict[tuple[int, int], Loss] = field(default_factory=dict)
    damaged: str = ""  # a line that should be a loss and cannot be read
    lost: str = ""  # the line that says how much was lost to the MTRRs, or that some was
    lost_bytes: int = 0
    i386: bool = False
    xen_pv: bool = False

    def replace(self, old: _Block) -> None:
        """Compare a finished firmware map with the one before it, and remember it as that."""
        if self.earlier is not None and _ranges(self.earlier) != _ranges(old) and self.differ is None:
            lines = f"the one from line {self.earlier.first_line} and the one from line {old.first_line}"
            self.differ = EmupmemError(
                f"the log has two firmware maps of one boot that differ: {lines}", _HINT
            )
        self.earlier = old

    def is_echo_of(self, other: _Boot) -> bool:
        """Whether this is no boot, but a repeated banner (`cat /proc/version` on the console)."""
        return not self.blocks and self.banner == other.banner and self.early in ("", other.early)


def _ranges(block: _Block) -> list[tuple[int, int, str]]:
    return [(p.start, p.end, p.words) for p in block.pieces]


def _fold(before: _Boot | None, boot: _Boot) -> _Boot:
    if before is None or not boot.is_echo_of(before):
        return boot
    before.symptoms |= dict(list(boot.symptoms.items())[: _MAX_KEPT - len(before.symptoms)])
    before.nodes |= boot.nodes
    return before


# Reading -------------------------------------------------------------------------------------


class _Reader:
    """Takes the lines of interest in order and keeps what they say of the last boot."""

    def __init__(self) -> None:
        self.before: _Boot | None = None
        self.boot = _Boot()
        self.open: _Block | None = None  # the block that the last map line belongs to
        self.watch = 0  # so many lines are taken one by one
        self.lively = False  # a map was seen since this was last asked

    def take(self, number: int, raw: bytearray) -> None:
        """Look at one line."""
        self.watch -= 1
        if len(raw) > _LONG_LINE:
            raw = self._shortened(number, raw)
        text = raw.decode("utf-8", "replace").strip(" \t\r\n\0")
        if "\x1b" in text:
            text = _pattern("colour").sub("", text).strip()
        if not text:
            return
        before = self.open
        if before is not None:
            before.problem_is_last = False
        try:
            line = _map_line(text)
        except _Broken as exc:
            self._block_for(exc.who).blame(number, text, exc.why, exc.cut)
            self.watch = _WATCHED
            return
        if line is not None:
            self._add(line, number, text)
        else:
            self._other(number, text)
        if before is not None and (line is None or self.open is not before):
            before.followed = True

    def _shortened(self, number: int, raw: bytearray) -> bytearray:
        """What is kept of a very long line: what follows a run of NUL, as a crash leaves it in a log."""
        raw = raw.rstrip(b"\0").rpartition(b"\0")[2]
        if b"BIOS-e820: " in raw[_LONG_LINE:]:
            why = f"is somewhere in a line of {len(raw)} bytes"
            self._block_for("BIOS-e820").blame(number, raw[:100].decode("utf-8", "replace"), why)
        return raw[:_LONG_LINE]

    def _add(self, line: _Line, number: int, text: str) -> None:
        block = self._block_for(line.who, line.start)
        block.who = line.who
        block.add(line, number, text)
        block.followed = False
        block.prefix = f"{line.lead}{line.who}: "
        self.watch, self.lively = _WATCHED, True

    def _block_for(self, who: str, start: int = 1) -> _Block:
        """The block that a line of `who` belongs to: a new one where a map begins again."""
        name = "firmware" if who in _FIRMWARE else who
        block = self.boot.blocks.get(name)
        if (
            block is None
            or block.who not in ("", who)
            or (start == 0 and block.pieces and block.pieces[-1].start)
        ):
            block = self._new_block(name, 0)
        self.open = block
        return block

    def _new_block(self, name: str, header: int) -> _Block:
        old = self.boot.blocks.get(name)
        block = self.boot.blocks[name] = _Block(header=header)
        if name == "firmware" and old is not None:
            self.boot.replace(old)
        return block

    def _header(self, name: str, number: int) -> None:
        block = self.boot.blocks.get(name)
        if block is None or block.pieces or block.problem:
            block = self._new_block(name, number)
        block.header = block.header or number
        self.open = block
        self.watch, self.lively = _WATCHED, True

    def _other(self, number: int, text: str) -> None:
        """A line that is no entry of a map."""
        if "physical RAM map:" in text and (found := _pattern("header").search(text)):
            self._header(_HEADERS[found[1]], number)
            return
        block = self.open if self.watch >= 0 else None
        if block is not None and block.problem is None and block.looks_cut(text):
            if not block.followed:
                block.blame(number, text, "is cut", cut=True)
            block.suspect = block.suspect or (number, text)
        elif "Linux version " in text and (said := _said("banner", text)) is not None:
            self._begin(_Boot(said[:500], number))
        elif "ommand line:" in text and (said := _said("command line", text)) is not None:
            self._command_line(said)
        elif "SRAT: Node " in text:
            self._node(number, text)
        else:
            self._fact(number, text)
        for phrase, word in _SYMPTOMS:
            if phrase in text and word in text and len(self.boot.symptoms) < _MAX_KEPT:
                self.boot.symptoms[_visible(text, 200)] = None

    def _begin(self, boot: _Boot) -> None:
        self.before = _fold(self.before, self.boot)
        self.boot = boot
        self.open = None

    def _command_line(self, said: str) -> None:
        key, _, words = said.partition(" line:")
        words = words.strip()
        if key == "Command" and any(b.pieces for b in self.boot.blocks.values()):
            self._begin(_Boot())  # it is printed before the map
        goes_on = words.endswith(" \\")  # Linux 7 prints long ones in pieces
        cut = not goes_on and (words.endswith(">") or len(said) >= _PRINTK_MAX)
        if cut or goes_on:
            words = words.rpartition(" ")[0]  # half a word could be read as something else
        if key == "Command":
            self.boot.early = words
        else:
            self.boot.late = f"{self.boot.late} {words}" if self.boot.late_goes_on else words
            self.boot.late_goes_on = goes_on
        (self.boot.cut_lines.add if cut else self.boot.cut_lines.discard)(key)

    def _node(self, number: int, text: str) -> None:
        found = _pattern("srat").search(text)
        rest = found[6].strip(' \t",}') if found is not None else "?"
        if found is None or rest not in ("", "hotplug", "non-volatile", "hotplug non-volatile"):
            self.boot.bad_node = self.boot.bad_node or f'line {number} is not understood: "{_visible(text)}"'
            return
        if "non-volatile" in rest or len(self.boot.nodes) >= _MAX_ENTRIES:
            return
        start, end = (int(found[2] or found[4], 16), int(found[3] or found[5], 16))
        # Before Linux 3.5 the end was exclusive here as well; memory comes in whole pages.
        end += 1 if found[3] or end & 0xFFF == 0xFFF else 0
        if start < end <= _MAX_ADDRESS:
            self.boot.nodes[NodeRange(int(found[1]), start, end)] = None

    def _loss(self, number: int, text: str) -> None:
        """A line that changes the map after it was printed. Source: e820.c, mtrr/cleanup.c."""
        boot, found = self.boot, _pattern("taken").search(text)
        if found is None:
            if "update e820 for mtrr" in text:
                boot.lost = boot.lost or _visible(text, 200)
            elif _pattern("begun").search(text):
                boot.damaged = boot.damaged or _visible(text, 200)
            return
        start = int(found["a"] or found["c"], 16)
        end = int(found["b"], 16) + 1 if found["b"] else int(found["d"], 16)
        if not _takes_ram(found["act"], end, found["rest"]):
            return
        if end <= start or len(boot.losses) >= _MAX_LOSSES:
            boot.damaged = boot.damaged or _visible(text, 200)
        else:
            boot.losses.setdefault((start, end), Loss(start, end, _visible(found[0].strip(), 120), number))

    def _fact(self, number: int, text: str) -> None:
        boot = self.boot
        if "EFI v" in text and _said("efi", text) is not None:
            boot.efi = True
        elif "DMI: " in text or "last_pfn = " in text:
            if "firmware" in boot.blocks and boot.blocks["firmware"].header:
                boot.past_efi.add("DMI" if "DMI: " in text else "pfn")
        elif "e820" in text and ("update" in text or "remove" in text):
            self._loss(number, text)
        elif "MTRRs don't cover all" in text:
            amount = _pattern("losing").search(text)
            boot.lost, boot.lost_bytes = _visible(text, 200), int(amount[1]) * MIB if amount else _MAX_ADDRESS
        elif " HIGHMEM available." in text or " LOWMEM available." in text or "non-PAE kernel" in text:
            boot.i386 = True  # arch/x86/mm/init_32.c; the notice on NX of arch/x86/mm/setup_nx.c
        elif "on Xen" in text and _pattern("xen pv").search(text):
            boot.xen_pv = True  # arch/x86/xen/enlighten.c xen_banner; guests of their own say Xen HVM or PVH
        elif "Hypervisor detected: " in text and (found := _pattern("hypervisor").search(text)):
            boot.hypervisor = _visible(found[1].strip(), 40)


def _takes_ram(act: str, end: int, words: str) -> bool:
    """Whether such a change takes RAM that a reservation could lie in; what cannot be read does.

    Not those of the command line: `mem=` and a bare `memmap=` remove all from an address on, which the
    planner knows by the words themselves, and `memmap=SIZE%START-1+12` makes a reservation.
    """
    if act == "remove":
        return end < _U64_MAX and _kind_of(words) in (Kind.RAM, None)
    old, _, new = words.partition("==>")
    # "usable ==> usable" is the boot loader's setup_data, which is of a type that prints as RAM does
    return _kind_of(old) in (Kind.RAM, None) and _kind_of(new) not in (Kind.RAM, Kind.PRAM)


def _kind_of(words: str) -> Kind | None:
    words = words.strip()
    return _KINDS.get(words[1:-1] if words.startswith("(") else words)


def _said(name: str, text: str) -> str | None:
    """The message from a phrase on, where it begins with it; escapes of JSON and /dev/kmsg undone."""
    found = _pattern(name).search(text)
    if found is None:
        return None
    lead, said = text[: found.start()].rstrip(" \t"), text[found.start() :]
    if lead and not _pattern("lead").search(lead[-40:]):
        return None
    if lead.endswith('"') and (string := _pattern("string").match(said)):
        try:
            # half of a surrogate pair is no character
            return str(json.loads(f'"{string[0]}"')).encode("utf-8", "replace").decode()
        except ValueError:
            return string[0]
    if _pattern("record").fullmatch(lead):
        return _pattern("escape").sub(lambda m: chr(int(m[1], 16)), said)
    return said


# What it says ----------------------------------------------------------------------------------


def _answer(reader: _Reader, name: str, head: bytes) -> BootLog:
    boot = _fold(reader.before, reader.boot)
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
    return BootLog(
        firmware=firmware,
        problem=problem,
        user=user,
        modified=modified,
        losses=tuple(boot.losses.values()),
        unplaced=_unplaced(boot, firmware) if modified is None else "",
        i386=boot.i386 or _is_i386(boot.banner),
        command_line=_booted_with(boot, warnings),
        linux_version=boot.banner,
        efi=True if boot.efi else (False if late else None),
        xen=boot.xen_pv or boot.hypervisor == "Xen PV" or (block is not None and block.who == "Xen"),
        hypervisor=boot.hypervisor,
        nodes=() if boot.bad_node else tuple(boot.nodes),
        symptoms=tuple(boot.symptoms),
        warnings=tuple(warnings),
    )


def _firmware(boot: _Boot, has_earlier: bool, name: str, head: bytes, warnings: list[str]) -> FirmwareMap:
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
        raise EmupmemError("the map in the log has no usable memory: lines of it are lost", _HINT)
    above = f"memory above {entries[-1].end:#x} may be missing"
    if block.problem is not None:
        warnings.append(f"the log ends inside the map ({block.problem.message}): {above}")
    elif not block.followed and (block.header or boot.banner):
        warnings.append(
            f"the log ends with the map, in line {entries[-1].line}: if it was cut there, {above}"
        )
    return FirmwareMap(entries, name, block.who)


def _unplaced(boot: _Boot, firmware: FirmwareMap | None) -> str:
    """The line that says RAM was lost, where no line and no map says which."""
    if boot.damaged or firmware is None:
        return boot.damaged
    if boot.lost_bytes:
        placed = _ram_in(firmware, boot.losses) >= boot.lost_bytes
    else:
        placed = any(end > MIB for _, end in boot.losses)
    return "" if placed else boot.lost


def _ram_in(firmware: FirmwareMap, spans: Iterable[tuple[int, int]]) -> int:
    """Bytes of the map's RAM that lie in one of the spans."""
    total, done = 0, 0
    for start, end in sorted(spans):
        total += sum(max(0, min(end, s.end) - max(start, done, s.start)) for s in firmware.ram)
        done = max(done, end)
    return total


def _no_map(boot: _Boot, has_earlier: bool, head: bytes) -> EmupmemError:
    if not head:
        return EmupmemError("the log is empty", _HINT)
    for magic, what, remedy in _NOT_TEXT:
        if head.startswith(magic):
            return EmupmemError(f"the log is {what}", remedy)
    if has_earlier:
        where = f", which begins in line {boot.banner_line}," if boot.banner_line else ""
        return EmupmemError(f"the last boot of the log{where} has no firmware map", _HINT)
    if "user" in boot.blocks:
        why = "the log has only the map after the command line (user:), not the firmware's"
        return EmupmemError(why, _HINT)
    return EmupmemError("there is no firmware map (BIOS-e820 lines) in the log", _HINT)


def _later_map(boot: _Boot, name: str, warnings: list[str]) -> tuple[MapEntry, ...] | None:
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


def _booted_with(boot: _Boot, warnings: list[str]) -> CommandLine | None:
    """The command line: the earlier print has what the memory map was made of, but may be cut."""
    text, key = (boot.early, "Command") if boot.early else (boot.late, "Kernel command")
    if key in boot.cut_lines and boot.late.startswith(text) and "Kernel command" not in boot.cut_lines:
        text, key = boot.late, "Kernel command"
    if key in boot.cut_lines:
        warnings.append("the command line in the log is cut: words at its end are not known")
    return parse_command_line(text) if text else None


def parse_boot_log(source: Source, name: str = "") -> BootLog:
    """Read the last boot of a kernel log.

    `source` is text, bytes, or an open file of either, read once in pieces; `name` becomes the
    source of the map. Never raises for what the log says: where it has no map that can be trusted,
    `firmware` is None and `problem` says why, naming the line. A log that ends inside the map gives
    what was printed until then, and a warning.
    """
    stream = io.BytesIO(_encoded(source)) if isinstance(source, str | bytes) else source
    again = stream.tell() if stream.seekable() else None
    log, counted = _read(stream, name, count=again is None)
    if counted:
        return log
    said = (*log.warnings, str(log.problem))
    named = any(_pattern("numbered").search(text) for text in said)
    if again is not None and (named or any(x.end > LOW_LIMIT for x in log.losses)):
        stream.seek(again)  # the lines that are named must be counted
        return _read(stream, name, count=True)[0]
    return _uncounted(log)


def _read(stream: IO[str] | IO[bytes], name: str, count: bool) -> tuple[BootLog, bool]:
    """The log, and whether the line numbers in it are right: counting takes as long as searching."""
    reader = _Reader()
    number, awake, head, counted = 1, _PIECE, b"", True
    unread: tuple[bytearray, int, int] | None = None  # the region before, if it was not looked at
    for region, size in _regions(stream):
        head = head or bytes(region[:8])
        if any(region.find(phrase, 0, size) >= 0 for phrase in _ASLEEP):
            awake = _AWAKE
            if unread is not None:
                _scan(*unread, reader)
        unread = (region, size, number)
        if awake > 0 or reader.watch > 0:
            _scan(region, size, number, reader)
            unread = None
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
        raise log.problem or EmupmemError("there is no firmware map in the log", _HINT)
    return log.firmware


def _regions(stream: IO[str] | IO[bytes]) -> Iterator[tuple[bytearray, int]]:
    """(buffer, bytes in it) again and again: whole lines, but for those that are too long to wait for.

    A region is overwritten when the next but one is asked for.
    """
    buffer, other = bytearray(_PIECE), bytearray(_PIECE)
    have, ended = 0, False
    while not ended:
        have, ended = _fill(stream, buffer, have)
        end = have if ended else buffer.rfind(b"\n", 0, have) + 1
        if not end:
            # A line without an end in sight: cut it behind a NUL, if it has one (see _shortened).
            end = buffer.rfind(b"\0", 0, have) + 1 or have
        if end:
            yield buffer, end
        other[: have - end] = buffer[end:have]
        have -= end
        buffer, other = other, buffer


def _fill(stream: IO[str] | IO[bytes], buffer: bytearray, have: int) -> tuple[int, bool]:
    """Read until the buffer is full or the stream ends: (bytes in the buffer, whether it ended)."""
    into = getattr(stream, "readinto", None)
    with memoryview(buffer) as view:
        while have + 4 <= _PIECE:
            if into is not None:
                got = into(view[have:]) or 0
            else:
                piece = _encoded(stream.read((_PIECE - have) // 4))  # UTF-8 has up to 4 bytes for each
                got = len(piece)
                view[have : have + got] = piece
            if not got:
                return have, True
            have += got
    return have, False


def _encoded(piece: str | bytes) -> bytes:
    return piece.encode("utf-8", "replace") if isinstance(piece, str) else piece


def _scan(region: bytearray, size: int, number: int, reader: _Reader) -> None:
    """Hand the lines to the reader that hold one of the phrases, and those that it watches."""
    at = counted = 0
    nexts = [_find(region, phrase, 0, size) for phrase in _PHRASES]
    while at < size:
        start = at
        if reader.watch <= 0:
            nearest = min(nexts)
            if nearest == size:
                return
            start = max(at, region.rfind(b"\n", at, nearest) + 1)
        end = _find(region, b"\n", start, size)
        number += region.count(b"\n", counted, start)
        counted = start
        reader.take(number, region[start:end])
        at = end + 1
        for i, place in enumerate(nexts):
            if place < at:
                nexts[i] = _find(region, _PHRASES[i], at, size)


def _find(region: bytearray, phrase: bytes, at: int, size: int) -> int:
    found = region.find(phrase, at, size)
    return size if found < 0 else found


# Other sources -------------------------------------------------------------------------------


def parse_sysfs_memmap(entries: Iterable[tuple[int, str, str, str]]) -> FirmwareMap:
    """Read /sys/firmware/memmap: (N, start, end, type) of each entry, the texts as the files have them.

    Ends are inclusive there. Raises EmupmemError for what is no number, overlaps, or lacks the
    memory below 1 MiB or all RAM. Source: drivers/firmware/memmap.c, e820_type_to_string of e820.c.
    """
    made: list[MapEntry] = []
    for index, start, end, words in sorted(entries):
        try:
            span = int(start, 16), int(end, 16) + 1
        except ValueError:
            shown = f"start {_visible(start.strip())!r}, end {_visible(end.strip())!r}"
            raise EmupmemError(f"/sys/firmware/memmap/{index} cannot be read: {shown}") from None
        kind = _SYSFS_KINDS.get(words.strip().lower(), Kind.UNKNOWN)
        made.append(MapEntry(*span, kind, words.strip(), index))
    made.sort(key=lambda e: (e.start, e.end))
    for entry in made:
        if not 0 <= entry.start < entry.end <= _MAX_ADDRESS:
            raise EmupmemError(f"/sys/firmware/memmap/{entry.line} ends before it begins, or beyond 2^52")
    for last, entry in pairwise(made):
        if entry.start < last.end:
            raise EmupmemError(f"/sys/firmware/memmap/{last.line} and {entry.line} overlap")
    if not made or made[0].start >= MIB or not any(e.kind is Kind.RAM for e in made):
        raise EmupmemError("/sys/firmware/memmap is not complete: the first MiB or all RAM is missing")
    return FirmwareMap(tuple(made), "/sys/firmware/memmap", "sysfs")


def parse_iomem(text: str) -> tuple[IomemLine, ...] | None:
    """Read /proc/iomem: every line, ends made exclusive; None where the kernel hides all addresses.

    Without CAP_SYS_ADMIN every address reads 0 (kernel/resource.c r_show). Raises EmupmemError,
    naming the line, for text that is no /proc/iomem.
    """
    lines: list[IomemLine] = []
    for number, text_line in enumerate(text.splitlines(), 1):
        if not text_line.strip():
            continue
        found = _pattern("iomem").fullmatch(text_line)
        if found is None:
            raise EmupmemError(f'line {number} of /proc/iomem is not understood: "{_visible(text_line)}"')
        lines.append(IomemLine(len(found[1]) // 2, int(found[2], 16), int(found[3], 16) + 1, found[4]))
    hidden = all(x.start == 0 and x.end == 1 for x in lines)
    return None if lines and hidden else tuple(lines)


def kernel_release(banner: str, signature: str = "") -> KernelRelease | None:
    """The upstream version of a kernel from its banner; None where the text is none.

    `banner` is `Linux version …` as the log and /proc/version have it, `signature` the text of
    Ubuntu's /proc/version_signature. Debian's stable number stands behind the `#`; Ubuntu's only in
    the signature. `stable` is None where a distribution counts by itself (6.8.0-60, 5.14.0-427.el9).
    """
    found = _pattern("release").match(banner.strip())
    if found is None:
        return None
    major, minor, patch, suffix = int(found[1]), int(found[2]), found[3], found[4]
    build = banner.partition(" #")[2]
    stable: int | None = int(patch) if patch else 0
    text = f"Linux {found[1]}.{found[2]}"
    if "Ubuntu" in build:
        given = _pattern("ubuntu").search(signature)
    elif "Debian" in build:
        given = _pattern("debian").search(build)
    else:
        # A 0 with a counter behind it is frozen by the distribution, or cannot be told from that.
        given = None if stable == 0 and _pattern("counter").match(suffix) else found
    same = given is not None and (int(given[1]), int(given[2])) == (major, minor)
    stable = int(given[3] or 0) if given is not None and same else None
    text = f"{text}.{stable}" if stable is not None else f"Linux {found[0].removeprefix('Linux version ')}"
    release = found[0].removeprefix("Linux version ")
    return KernelRelease(major, minor, stable, text, release, _is_i386(banner))


def _is_i386(banner: str) -> bool:
    """Whether a banner or release is of a 32-bit kernel: by its own name and its compiler's only."""
    release, _, rest = banner.removeprefix("Linux version ").partition(" ")
    compiler = rest.partition(") (")[2][:100] or rest[:100]
    found = _pattern("i386").search
    return found(release.lower()) is not None or compiler.startswith(("i386-", "i486-", "i586-", "i686-"))
