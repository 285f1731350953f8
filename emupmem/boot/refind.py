# SPDX-License-Identifier: Apache-2.0
"""rEFInd: one file beside the kernels, refind_linux.conf, has the options of all of them, those to come as well.

Each of its lines is a title and options in double quotes (GetOptionsFile and ReadTokenLine of rEFInd 0.14.2). The first
one is what boots; the others are in the submenu. mkrlconf, which its package runs, makes the file only where there is
none. Where a stanza of refind.conf starts a Linux, which of the two boots cannot be told: that is left alone.
"""

from __future__ import annotations

import re

from emupmem.boot.bls import text as bls_text
from emupmem.boot.bls.entries import is_of_same_root, own_line
from emupmem.boot.bls.files import real_edits
from emupmem.boot.efi import loader_name
from emupmem.boot.entry import BootEntry
from emupmem.boot.foreign import REFIND_CONFIGS
from emupmem.boot.loader import Loader, Standing, Steps, Wanted
from emupmem.kernel.cmdline import parse_command_line
from emupmem.model import UNCHANGED, CommandLine, EmupmemError, FileEdit
from emupmem.system.host import Host

OPTIONS, *_CONFIGS = REFIND_CONFIGS
_LINE = re.compile(r'(?P<head>[ \t]*"(?P<title>[^"\n]*)"[ \t]+")(?P<options>[^"\n]*)(?P<tail>"[ \t\r]*)')
_INCLUDE = re.compile(r"^[ \t]*include[ \t]+[\"']?([^\"'\n]*?)[\"']?[ \t\r]*$", re.MULTILINE | re.IGNORECASE)


def is_for_options(machine: Host) -> bool:
    """Whether rEFInd surely takes the kernel's words from refind_linux.conf."""
    started = not machine.running or "refind" in loader_name(machine).lower()
    return started and machine.exists(OPTIONS) and not any(map(_starts_linux, _texts(machine)))


def _texts(machine: Host) -> list[str]:
    """The files of rEFInd's own configuration: those that include others, and these."""
    found = []
    for name in _CONFIGS:
        text = machine.peek(name)
        parts = [f"{name.rpartition('/')[0]}/{n.lstrip('/')}" for n in _INCLUDE.findall(text)]
        found += [text, *map(machine.peek, parts)]
    return found


def _starts_linux(text: str) -> bool:
    """Whether a stanza that is not disabled has options or an initial disk: a Linux."""
    return any({"options", "initrd"} & words and "disabled" not in words for words in _stanzas(text))


def _stanzas(text: str) -> list[set[str]]:
    """The first words of the lines of each stanza, in lower case as rEFInd compares them; submenus are not read."""
    found: list[set[str]] = []
    depth = 0
    for line in text.lower().split("\n"):
        first, *rest = line.split() or [""]
        if first.startswith("#"):
            continue
        if first == "menuentry" and rest and not depth:
            found.append(set())
            depth = 1
        elif first == "submenuentry" and depth:
            depth += 1
        elif first == "}":
            depth = max(0, depth - 1)
        elif depth == 1:
            found[-1].add(first)
    return found


class Refind(Loader):
    """rEFInd with the options of its kernels in refind_linux.conf."""

    title = "rEFInd"
    back = "in rEFInd's menu press F2 twice on the kernel, delete {memmap}, press Enter"

    def standing(self, machine: Host) -> Standing:
        release = machine.peek("/proc/sys/kernel/osrelease") if machine.running else ""
        own = own_line(machine)
        if not machine.running and not own.words:  # a tree: the first line is what boots
            first = next((f for x in _lines(machine) if (f := _LINE.fullmatch(x))), None)
            own = parse_command_line(first["options"] if first is not None else "")
        entries = tuple(_entry(machine, n, x, release, own) for n, x in enumerate(_lines(machine), 1))
        found = tuple(e for e in entries if e is not None)
        ours = [e for e in found if e.ours]
        if not ours:
            raise EmupmemError(
                f"no line of {OPTIONS} starts this system",
                "look at it; sudo mkrlconf makes it where it is not there",
            )
        items = tuple(i.text for i in ours[0].command_line.reservations)
        return Standing(items, OPTIONS, OPTIONS, found, ours[0])

    def sources(self, machine: Host) -> tuple[str, ...]:
        return (OPTIONS,)

    def files(self, machine: Host) -> tuple[str, ...]:
        return (OPTIONS,)

    def refuse(self, machine: Host) -> None:
        self.steps(machine, Wanted())

    def _check(self, machine: Host) -> tuple[str, ...]:
        warnings = super()._check(machine)
        own = own_line(machine)
        entries = (_entry(machine, n, x, "", own) for n, x in enumerate(_lines(machine), 1))
        first = next((e for e in entries if e is not None), None)
        if first is None or first.ours or not own.words:
            return warnings
        told = f"rEFInd starts “{first.titles[0]}”, the first line of {OPTIONS}, which is another system's"
        return (*warnings, f"{told} and is not changed: choose this one in its menu")

    def steps(self, machine: Host, wanted: Wanted) -> Steps:
        ours = {e.line for e in self.standing(machine).entries if e.ours}
        lines = _lines(machine)
        for number, line in enumerate(lines, 1):
            found = _LINE.fullmatch(line)
            if found is None and line.strip() and not line.lstrip().startswith("#"):
                raise EmupmemError(
                    f"{OPTIONS}:{number} is not a title and options in double quotes",
                    'write it as "Title" "root=… ro …"',
                    state=UNCHANGED,
                )
            if found is None or number not in ours:
                continue
            new = bls_text.reworked(found["options"], wanted.items, wanted.add, wanted.drop)
            bls_text.prove_words(found["options"], new, wanted.items, wanted.add, wanted.drop)
            lines[number - 1] = f"{found['head']}{new}{found['tail']}"
        after = "\n".join(lines).encode("utf-8", "surrogateescape")
        return Steps(wanted, real_edits([FileEdit(OPTIONS, machine.read(OPTIONS), after)]))


def _lines(machine: Host) -> list[str]:
    return machine.text(OPTIONS).split("\n")


def _entry(machine: Host, number: int, line: str, release: str, own: CommandLine) -> BootEntry | None:
    found = _LINE.fullmatch(line)
    if found is None:
        return None
    words = parse_command_line(found["options"]).words
    ours = is_of_same_root(machine, "", found["options"], own)
    return BootEntry(
        (found["title"],), (f"{number}",), (number - 1,), "", words, number, False, ours, release
    )
