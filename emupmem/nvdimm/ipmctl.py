# SPDX-License-Identifier: Apache-2.0
"""What Intel's ipmctl prints, and what it is asked: nothing here touches a machine.

ipmctl prints three forms, and its versions differ in them: columns apart by blanks (early 1.x), a table
with `|` (later 1.x, 2.x, 3.x), a list of `---DimmID=0x0001---` blocks (with -a or -d), and XML
(`-o nvmxml`). The parsers take each of them. What fails is told in words on standard output, often
with status 0, and differs too: "No DIMMs in the system." became "No PMem modules in the system.".
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from fractions import Fraction

from emupmem.model import GIB, KIB, MIB, TIB, Command, EmupmemError
from emupmem.record import record

DIMM_FIELDS = (
    "Capacity",
    "HealthState",
    "LockState",
    "FWVersion",
    "DimmHandle",
    "SocketID",
    "MemoryCapacity",
    "AppDirectCapacity",
)
MODES = ("appdirect", "appdirect-not-interleaved", "memory")
TOLERANCE = 10
"""Per cent by which ipmctl may change a goal to fit the platform's rules."""

BROKEN = ((2, 0, 0, 3800), (2, 0, 0, 3820))
"""First and last version that write a goal no firmware takes (intel/ipmctl#149)."""

_UNITS = {
    "B": 1,
    "KIB": KIB,
    "MIB": MIB,
    "GIB": GIB,
    "TIB": TIB,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
_NOTHING = re.compile(
    r"^\W*(?:initialization failed\W+|error: )?"
    r"(no (functional |manageable )?(dimms|aep dimms|pmem modules) in the system"
    r"|there are no (regions|goal configs) defined (in the system|on the specified socket)"
    r"|there are no (dimms|aeps|pmem modules) on the specified socket"
    r"|no regions (are )?defined)",
    re.IGNORECASE | re.MULTILINE,
)
_WRONG = re.compile(
    r"(?im)^[^<|\n]*(\bfailed: |\berror\b ?[:(\d]|syntax error|requires root privileges|invalid or unexpected token"
    r"|incorrect (value|property)).*$"
)

Record = dict[str, str]


@record
class PmemModule:
    """A PMem module: bytes, None where ipmctl did not tell."""

    id: str
    capacity: int | None
    health: str
    lock: str = ""
    firmware: str = ""
    handle: int | None = None
    socket: int | None = None
    memory: int | None = None
    app_direct: int | None = None

    @property
    def works(self) -> bool:
        return self.health.lower() not in ("non-functional", "unmanageable", "fatal")


@record
class InterleaveSet:
    """An interleave set, which ndctl calls a region: bytes."""

    iset: int | None
    type: str
    capacity: int | None
    free: int | None
    health: str
    socket: int | None
    dimms: tuple[str, ...]


@record
class Goal:
    """What the firmware shall make of one module at the next boot: bytes."""

    dimm: str
    socket: int | None
    memory: int
    app_direct: int
    status: str = ""

    @property
    def failed(self) -> bool:
        return self.status.lower().startswith("failed")


@record
class WantedGoal:
    """What the user asks of the modules: a mode of MODES, the share of RAM in per cent, one socket or all."""

    mode: str
    memory_percent: int = 0
    socket: int | None = None


# What ipmctl is asked ---------------------------------------------------------------------------------


def show_dimms(socket: int | None = None, fields: bool = True) -> Command:
    """List the modules; without `fields` in the plain way, which every version knows."""
    return _show("-dimm", socket, ("-d", ",".join(DIMM_FIELDS)) if fields else None)


def show_regions(socket: int | None = None, fields: bool = True) -> Command:
    """List the interleave sets."""
    return _show("-region", socket, ("-a",) if fields else None)


def show_goal(socket: int | None = None, fields: bool = True) -> Command:
    """Tell the goal that waits for a reboot."""
    return _show("-goal", socket, ("-a",) if fields else None)


def _show(what: str, socket: int | None, detail: tuple[str, ...] | None) -> Command:
    # With -o nvmxml ipmctl asks nothing: that is fine for what only shows.
    extra = () if detail is None else (*detail, "-u", "B", "-o", "nvmxml")
    return Command(("ipmctl", "show", *extra, what, *_target(socket)))


def _target(socket: int | None) -> tuple[str, ...]:
    return () if socket is None else ("-socket", str(socket))


def create_goal(wanted: WantedGoal) -> Command:
    """Set the goal. Always with -f: without it ipmctl waits for an answer, and we have asked already."""
    properties = [f"MemoryMode={wanted.memory_percent}"] if wanted.memory_percent else []
    if wanted.memory_percent < 100:
        kind = "AppDirectNotInterleaved" if wanted.mode == MODES[1] else "AppDirect"
        properties.append(f"PersistentMemoryType={kind}")
    argv = ("ipmctl", "create", "-f", "-goal", *_target(wanted.socket), *properties)
    return Command(argv, "tell the firmware how to configure the modules at the next boot")


def wanted(mode: str, memory_percent: int | None = None, socket: int | None = None) -> WantedGoal:
    """The request in one form. Raises EmupmemError where the options contradict each other."""
    if mode not in MODES:
        raise EmupmemError(f"there is no mode {mode}", f"there are {', '.join(MODES)}")
    if mode == "memory":
        if memory_percent not in (None, 100):
            raise EmupmemError(
                f"--mode memory makes all of it RAM, not {memory_percent} %",
                f"--mode appdirect --memory-percent {memory_percent} leaves the rest persistent",
            )
        return WantedGoal(mode, 100, socket)
    percent = memory_percent or 0
    if not 0 <= percent <= 100:
        raise EmupmemError(f"{percent} % is not a share", "write a number from 0 to 99")
    if percent == 100:
        raise EmupmemError(
            "with 100 % as RAM nothing is left for App Direct", "--mode memory makes all of it RAM"
        )
    return WantedGoal(mode, percent, socket)


# What ipmctl answers ----------------------------------------------------------------------------------


def ipmctl_version(text: str) -> tuple[int, ...]:
    """(2, 0, 0, 3885) of `… Command Line Interface Version 02.00.00.3885`; empty where there is none."""
    found = re.search(r"\b(\d+)\.(\d+)\.(\d+)\.(\d+)\b", text)
    return tuple(int(part) for part in found.groups()) if found else ()


def is_broken(text: str) -> bool:
    """Whether this version is known to write goals that no firmware takes."""
    return BROKEN[0] <= (ipmctl_version(text) or (0,)) <= BROKEN[1]


def nothing(text: str) -> bool:
    """Whether ipmctl says that there is nothing to show, which is no failure."""
    return bool(_NOTHING.search(_without_tags(text)))


def empty(text: str) -> bool:
    """Whether there is no word in it, or only tags, or the head of a table without rows."""
    lines = [line for line in _without_tags(text).splitlines() if line.strip(" =\t")]
    return not lines or (len(lines) == 1 and bool(_IDS & set(re.split(r"[|\s]+", lines[0]))))


def complaint(text: str) -> str:
    """The line in which ipmctl says what went wrong, empty where it says nothing like that."""
    found = None if nothing(text) else _WRONG.search(_without_tags(text))
    return " ".join(found[0].split()).rstrip(".") if found else ""


def warnings(text: str) -> tuple[str, ...]:
    """What ipmctl wants to be considered, beside what it did."""
    lines = [" ".join(line.split()) for line in _without_tags(text).splitlines()]
    return tuple(
        line for line in lines if line.startswith(("WARNING", "The requested goal", "The amount of mapped"))
    )


def _without_tags(text: str) -> str:
    return html.unescape(re.sub(r"<[^<>]*>", "\n", text)) if text.lstrip().startswith("<") else text


def dimms(text: str) -> tuple[PmemModule, ...]:
    """The modules of `show -dimm` in any form."""
    return tuple(
        PmemModule(
            r["DimmID"],
            size(r.get("Capacity", "")),
            r.get("HealthState", ""),
            r.get("LockState", ""),
            r.get("FWVersion", ""),
            number(r.get("DimmHandle", r["DimmID"])),
            _socket(r),
            size(r.get("MemoryCapacity", "")),
            size(r.get("AppDirectCapacity", "")),
        )
        for r in records(text, "Dimm")
        if "DimmID" in r
    )


def _socket(record: Record) -> int | None:
    """The socket as told, else as the module's handle has it (0xABCD: A is the socket)."""
    told = number(record.get("SocketID", ""))
    handle = number(record.get("DimmHandle", record.get("DimmID", "")))
    return told if told is not None or handle is None else handle >> 12 & 0xF


def sets(text: str) -> tuple[InterleaveSet, ...]:
    """The interleave sets of `show -region` in any form."""
    return tuple(
        InterleaveSet(
            number(r.get("ISetID", "")),
            r.get("PersistentMemoryType", ""),
            size(r.get("Capacity", "")),
            size(r.get("FreeCapacity", "")),
            r.get("HealthState", ""),
            number(r.get("SocketID", "")),
            tuple(re.findall(r"0x[0-9a-fA-F]+", r.get("DimmID", ""))),
        )
        for r in records(text, "Region")
        if "ISetID" in r or "RegionID" in r
    )


def on_socket(found: Iterable[Goal], socket: int | None) -> tuple[Goal, ...]:
    """The goals of one socket (None: of all); those that do not tell their socket count."""
    return tuple(g for g in found if socket is None or g.socket in (None, socket))


def goals(text: str) -> tuple[Goal, ...]:
    """The goal of each module of `show -goal` in any form; `create -goal` prints the same table."""
    return tuple(
        Goal(
            r["DimmID"],
            _socket(r),
            size(r.get("MemorySize", "")) or 0,
            (size(r.get("AppDirect1Size", "")) or 0) + (size(r.get("AppDirect2Size", "")) or 0),
            r.get("Status", ""),
        )
        for r in records(text, "ConfigGoal")
        if "DimmID" in r and ("MemorySize" in r or "AppDirect1Size" in r)
    )


def size(text: str) -> int | None:
    """Bytes of `126.422 GiB`, `135744782336 B` or `1.5 TB`; None of everything else (`N/A`)."""
    found = re.match(r"\s*([\d.]+)\s*([A-Za-z]+)\b", text)
    if not found or found[2].upper() not in _UNITS or found[1].count(".") > 1:
        return None
    return int(Fraction(found[1]) * _UNITS[found[2].upper()]) if re.search(r"\d", found[1]) else None


def number(text: str) -> int | None:
    """A number as ipmctl writes it: `0x0001`, or decimal."""
    word = text.strip()
    if not re.fullmatch(r"0x[0-9a-fA-F]+|\d+", word):
        return None
    return int(word, 16) if word.startswith("0x") else int(word)


def records(text: str, tag: str) -> list[Record]:
    """Name and value of each field, one dict for each module, set or goal (`tag` in XML)."""
    if re.search(rf"<{tag}\b", text):
        return [_xml(body) for body in re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", text, re.DOTALL)]
    if re.search(r"^[ \t]*---\w+=.*---[ \t\r]*$", text, re.MULTILINE):
        return list(_blocks(text.splitlines()))
    return _table(text.splitlines())


def _xml(body: str) -> Record:
    fields = re.findall(r"<(\w+)>([^<]*)</\1>", body)
    return {name: html.unescape(value).strip() for name, value in fields}


def _blocks(lines: Iterable[str]) -> list[Record]:
    found: list[Record] = []
    for line in lines:
        head = re.fullmatch(r"\s*---(\w+)=(.*?)---\s*", line)
        name, equals, value = (head[1], "=", head[2]) if head else line.strip().partition("=")
        if head:
            found.append({})
        if equals and found and re.fullmatch(r"\w+", name):
            found[-1][name] = value.strip()
    return found


def _table(lines: list[str]) -> list[Record]:
    """Rows below a head of names: cells apart by `|`, or by blanks and tabs (1.x).

    Raises EmupmemError for a row that does not fit its head: a module that is left out would be lost.
    """
    head: list[str] = []
    found = []
    for line in lines:
        if not line.strip(" =\t"):
            continue
        if _IDS & set(re.split(r"[|\s]+", line)):
            head = _cells(line, 0) if "|" in line else line.split()
        elif head and re.match(r"\s*(0x[0-9a-fA-F]+|\d+|[0-9a-fA-F]{4}-\S+)(\s|\||$)", line):
            cells = _cells(line, len(head))
            if len(cells) != len(head):
                raise EmupmemError(f"a line in a table of ipmctl cannot be read: {' '.join(line.split())}")
            found.append(dict(zip(head, cells, strict=True)))
    return found


_IDS = {"DimmID", "ISetID", "RegionID"}
_CELL = re.compile(r"[\d.]+ [KMGT]?i?B\b|[^\s,]+(?:, [^\s,]+)*")
"""One cell between blanks: a size with its unit, or words with commas between them (`Unlocked, Frozen`)."""


def _cells(line: str, count: int) -> list[str]:
    """The cells of a row that has `count` of them. Where one has blanks in it, tabs or two blanks are between them."""
    if "|" in line:
        return [c.strip() for c in line.split("|")]
    cells = _CELL.findall(line)
    return cells if len(cells) == count else re.split(r"\t+|\s{2,}", line.strip())


# Decisions ---------------------------------------------------------------------------------------------


def goal_matches(waiting: Iterable[Goal], ask: WantedGoal) -> bool:
    """Whether a goal that waits has the share of RAM that is asked for.

    Interleaved or not is not told by every version, and is not compared.
    """
    there = tuple(waiting)
    memory, persistent = sum(g.memory for g in there), sum(g.app_direct for g in there)
    return bool(there) and _share(memory, memory + persistent, ask.memory_percent)


def is_as_asked(modules: Iterable[PmemModule], there: Iterable[InterleaveSet], ask: WantedGoal) -> bool:
    """Whether the modules are what the goal would make of them, so that no goal is needed."""
    working = [m for m in modules if m.works]
    regions = tuple(there)
    fit = bool(regions) and _kinds_fit(regions, ask, working)
    if any(m.memory is None or m.app_direct is None for m in working):
        return fit and not ask.memory_percent  # the plain list has no such fields: only regions tell then
    memory = sum(m.memory or 0 for m in working)
    total = memory + sum(m.app_direct or 0 for m in working)
    if not total or not _share(memory, total, ask.memory_percent):
        return False
    return fit if ask.memory_percent < 100 else not regions


def _share(memory: int, total: int, percent: int) -> bool:
    if not total or percent in (0, 100):
        return memory == total * percent // 100
    return abs(memory * 100 - percent * total) <= TOLERANCE * total


def _kinds_fit(there: Iterable[InterleaveSet], ask: WantedGoal, working: Iterable[PmemModule]) -> bool:
    """Whether the sets are of the kind asked for. Where each socket has one module, nothing can interleave."""
    kinds = {kind.strip() for s in there for kind in s.type.split(",")}
    if ask.mode == "appdirect-not-interleaved":
        return kinds == {"AppDirectNotInterleaved"}
    sockets = [m.socket for m in working]
    return "AppDirect" in kinds or (bool(kinds) and len(set(sockets)) == len(sockets))
