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

LOOKED_AT = (
    *("m", "machine", "M", "object", "device", "numa", "name", "smp", "accel", "readconfig"),
    *("drive", "blockdev", "hda", "hdb", "hdc", "hdd"),
)
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
    found = re.fullmatch(rf"({number})([bkKmMgGtTpPeE]?)", text.strip())
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

    What a file for -readconfig says comes where the file is named; `read` gives its text.
    """
    at = 0
    while at < len(argv):
        name = re.sub(r"^--?", "", argv[at]) if argv[at].startswith("-") else ""
        at += 1
        if name not in LOOKED_AT or at >= len(argv):
            continue
        value = argv[at]
        at += 1
        if name == "readconfig":
            yield from sections(read(value))
        else:
            yield name, _properties(value)


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
