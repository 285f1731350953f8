# SPDX-License-Identifier: Apache-2.0
"""How QEMU writes its options: `a,b=c`, JSON, sizes, and files for -readconfig."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

from emupmem.model import MIB

Pairs = list[tuple[str, str]]
"""The properties of one option, in order; the name is empty for a bare word."""

DISKS = ("hda", "hdb", "hdc", "hdd", "fda", "fdb", "sd", "pflash", "mtdblock")
"""Options whose value is the name of a file that the guest writes to; `hda` also stands for QEMU's bare word."""
LOOKED_AT = (
    *("m", "machine", "M", "object", "device", "numa", "name", "smp", "accel", "readconfig"),
    *("drive", "blockdev", *DISKS),
)
_ALONE = """
h help version mem-prealloc audio-help snapshot usb nographic portrait full-screen win2k-hack no-fd-bootchk no-acpi
no-hpet singlestep one-insn-per-tb preconfig S s enable-kvm enable-hax xen-attach xen-domid-restrict no-reboot
no-shutdown daemonize only-migratable nodefaults no-user-config enable-sync-profile enable-fips perfmap jitdump
async-teardown semihosting old-param show-cursor sdl curses no-frame alt-grab ctrl-grab no-quit nouserconfig
nodefconfig no-kvm no-kvm-irqchip no-kvm-pit rtc-td-hack tdf localtime
"""
ALONE = frozenset(_ALONE.split())
"""Options without a value (qemu-options.hx from 4.1 to 10.1); the word behind all others is theirs."""
SECTIONS = {"memory": "m"}
"""Groups of a file for -readconfig whose option has another name."""


def escaped(value: str) -> str:
    """A value inside a QEMU option: a comma is written twice."""
    return value.replace(",", ",,")


def join_continued(group: dict[str, str], first: str) -> str:
    rest = {k: v for k, v in group.items() if k != first}
    return ",".join([group[first], *(f"{k}={escaped(v)}" for k, v in rest.items())])


def split_option(text: str) -> Pairs:
    """`a,b=c,,d` as [("", "a"), ("b", "c,d")]: QEMU's own rule of commas (util/keyval.c)."""
    found = []
    for part in text.replace(",,", "\0").split(","):
        key, equals, value = part.partition("=")
        found.append((key, value) if equals else ("", key))
    return [(k.replace("\0", ","), v.replace("\0", ",")) for k, v in found]


def qemu_size(text: str, default_unit: int = MIB) -> int | None:
    """Bytes that QEMU reads from a size (`2G`, `512`, `1.5g`); None for what it would refuse."""
    number = r"[0-9]{1,20}(?:\.[0-9]{1,20})?|0[xX][0-9a-fA-F]{1,16}"
    found = re.fullmatch(rf"({number})([bBkKmMgGtTpPeE]?)", text.strip())
    if not found:
        return None
    units = {"b": 1} | {u: 1024 ** (n + 1) for n, u in enumerate("kmgtpe")}
    unit = units[found[2].lower()] if found[2] else default_unit
    count = int(found[1], 16) if found[1].lower().startswith("0x") else Fraction(found[1])
    size = int(count * unit)
    return size if size < 1 << 64 else None


def count_of(text: str) -> int:
    """A number of slots or processors; 0 for what is none."""
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else 0


def every_option(argv: Sequence[str], read: Callable[[str], str]) -> Iterator[tuple[str, Pairs]]:
    """(option, properties) of those options that we look at; QEMU takes `--machine` as well as `-machine`.

    What a file for -readconfig says comes where the file is named; `read` gives its text. A word that belongs to
    no option is a disk, as QEMU takes it.
    """
    for name, value in with_values(argv):
        if name == "readconfig" and value is not None:
            yield from sections(read(value))
        elif name in DISKS and value:
            yield name, [("file", value)]
        elif name in LOOKED_AT and value is not None:
            yield name, _properties(value)


def with_values(argv: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """(option, its value) of all words; the value is None where the last word lacks it, and for options without one."""
    words = iter(argv)
    for word in words:
        if not word.startswith("-"):
            yield "hda", word
            continue
        name = re.sub(r"^--?", "", word)
        yield name, None if name in ALONE else next(words, None)


def sections(text: str) -> Iterator[tuple[str, Pairs]]:
    """The groups of a file for -readconfig as options (qemu_config_foreach, util/qemu-config.c of QEMU 7.2)."""
    group: tuple[str, Pairs] | None = None
    for line in text.splitlines():
        head = re.match(r'\[([^\]" ]+)(?: "([^"]*)")?\]', line)
        if head:
            if group is not None:
                yield group
            group = (SECTIONS.get(head[1], head[1]), [("id", head[2])] if head[2] else [])
        elif group is not None and (found := re.match(r'\s*([^\s=]+)\s*=\s*"([^"]*)"', line)):
            group[1].append((found[1], found[2]))
    if group is not None:
        yield group


def _properties(value: str) -> Pairs:
    """The properties of an option, which may be written as JSON too (libvirt does that)."""
    if not value.startswith("{"):
        return split_option(value)
    try:
        return list(_flat(json.loads(value), ""))
    except (ValueError, RecursionError):
        return []


def _flat(value: dict[str, Any], above: str) -> Iterator[tuple[str, str]]:
    for key, one in value.items():
        if isinstance(one, dict):
            yield from _flat(one, f"{above}{key}.")
        elif not isinstance(one, list):
            yield f"{above}{key}", str(one)
