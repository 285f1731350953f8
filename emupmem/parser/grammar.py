# SPDX-License-Identifier: Apache-2.0
"""One line of a memory map, in the words of every kernel since 2.6."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache

import regex

from emupmem.model import Kind

MAX_LOSSES = 512  # a machine has a dozen


def takes_ram(act: str, words: str) -> bool:
    """Whether such a change takes RAM that a reservation could lie in; what cannot be read does.

    Not `memmap=SIZE%START-1+12`, which makes a reservation.
    """
    if act == "remove":
        return _kind_of(words) in (Kind.RAM, None)
    old, _, new = words.partition("==>")
    # "usable ==> usable" is the boot loader's setup_data, which is of a type that prints as RAM does
    return _kind_of(old) in (Kind.RAM, None) and _kind_of(new) not in (Kind.RAM, Kind.PRAM)


def _kind_of(words: str) -> Kind | None:
    words = words.strip()
    return KINDS.get(words[1:-1] if words.startswith("(") else words)


MAX_ADDRESS = 1 << 52  # x86-64 has no more physical address bits

KINDS = {
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
_WHO = ("BIOS-", "Xen:", "user:", "extended:", "modified:")


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
    ).replace("@", "|".join(regex.escape(words, literal_spaces=True) for words in KINDS)),
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
    # mm/memtest.c (bad cells; the end is exclusive), mm/memory-failure.c (a page frame; MCE before 4.7) and
    # drivers/ras/cec.c, early-quirks.c
    "unfit": (
        r"(?P<text>bad mem addr (?:0x)?(?P<a>[0-9a-f]{8,16}) - (?:0x)?(?P<end>[0-9a-f]{8,16}) reserved"
        r"|(?:Memory failure: |MCE )0x(?P<frame>[0-9a-f]{1,13}):[^\"]*+"
        r"|(?:Soft-offlining pfn: |soft offline: )0x(?P<frame>[0-9a-f]{1,13})(?![0-9a-f])[^\"]*+"
        r"|Reserving Intel graphics (?:stolen )?memory at (?:\[mem )?"
        r"0x(?P<a>[0-9a-f]{1,16})-0x(?P<last>[0-9a-f]{1,16})\]?)"
    ),
    # arch/x86/mm/mem_encrypt.c, arch/x86/coco/tdx/tdx.c
    "confidential": r"Memory Encryption Features active:(?: Intel (TDX)|[A-Z -]* (SEV-SNP))|\b(tdx): Guest detected",
    "mirrored": r"Memory: \d{1,12}M/\d{1,12}M mirrored memory",
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
    "other processor": r"\b(aarch64|arm64|armv\d\w*|riscv64|ppc64\w*|s390x|loongarch64|mips\w*)\b",
    "ubuntu": r"^Ubuntu \S++ (\d+)\.(\d+)\.(\d+)",
    "debian": r"\bDebian (?:\d+:)?(\d+)\.(\d+)(?:\.(\d+))?",
    "counter": r"-\d",
}


@cache
def pattern(name: str) -> regex.Pattern[str]:
    """A pattern, compiled when it is first needed. The kernel prints ASCII: other digits are none."""
    return regex.compile(_PATTERNS[name], regex.ASCII)


def visible(text: str, most: int = 100) -> str:
    """Text for a message: shortened, control characters made visible."""
    shown = text if len(text) <= most else text[: most - 1] + "…"
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in shown)


class BrokenLineError(Exception):
    """A map line of `who` that does not read as the kernel prints it; `cut`: its beginning does."""

    def __init__(self, who: str, why: str, cut: bool = False) -> None:
        super().__init__(who, why)
        self.who = who
        self.why = why
        self.cut = cut


@dataclass(slots=True)
class MapLine:
    """A map line: who printed it, what stands before, and its entry (kind None for a `[gap`).

    `old` is a line as kernels before 3.5 print it.
    """

    who: str
    lead: str
    start: int
    end: int
    kind: Kind | None
    words: str
    old: bool


def map_line(text: str) -> MapLine | None:
    """Read a map line; None if the line is none. Raises _Broken for a damaged one."""
    if not any(who in text for who in _WHO):
        return None
    for found in pattern("who").finditer(text):
        who, at = found[1], found.end()
        rest = text[at : at + 256]
        if _is_entry(who, rest):
            lead = text[: found.start()]
            if lead.rstrip().endswith('"'):  # JSON: the message ends at the next quote
                rest = rest.partition('"')[0].rstrip()
            return MapLine(who, lead, *_entry(who, rest))
    return None


def _is_entry(who: str, rest: str) -> bool:
    """Whether an entry, or the beginning of one, follows `who:`."""
    if rest.startswith(("[m", "[g", "0000")):
        return True
    return rest in ("", "[", "0", "00", "000") and who.startswith("BIOS-")


@lru_cache(maxsize=4096)
def _entry(who: str, rest: str) -> tuple[int, int, Kind | None, str, bool]:
    """(start, end, kind, words, whether before 3.5) of an entry.

    Remembered, because the boots of a machine print the same ones.
    """
    found = pattern("entry").fullmatch(rest)
    if found is None:
        cut = pattern("entry").fullmatch(rest, partial=True) is not None
        raise BrokenLineError(who, "is cut" if cut else "is not as the kernel prints it", cut)
    first, last, new, gap, old_first, old_end, old = found.group("a", "b", "new", "gap", "c", "d", "old")
    words = new or old or ""
    if words in _NEVER_NUMBERS:
        raise BrokenLineError(who, "is cut", cut=True)
    if old_end is not None:
        start, end = int(old_first, 16), int(old_end, 16)  # up to Linux 3.4: the end is exclusive
    else:
        start, end = int(first, 16), int(last, 16) + 1
    if end <= start:
        raise BrokenLineError(who, "ends before it begins")
    if end > MAX_ADDRESS:
        raise BrokenLineError(who, "is beyond 2^52, where no machine has memory")
    kind = None if gap is not None else KINDS.get(words, Kind.UNKNOWN)
    return start, end, kind, words, old_end is not None
