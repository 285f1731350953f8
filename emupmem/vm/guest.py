# SPDX-License-Identifier: Apache-2.0
"""The guest that QEMU's own arguments describe."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from emupmem.model import MIB, EmupmemError

DEFAULT_RAM = 128 * MIB
"""QEMU's own default of `-m`."""


@dataclass(frozen=True, slots=True)
class Guest:
    """What the arguments of a virtual machine say of its memory: bytes; None where they say nothing.

    `nodes` is the memory of each NUMA node, `bare` a word of `-machine` that has no `=`, `paths` the files
    behind its memory objects.
    """

    ram: int | None = None
    slots: int = 0
    maxmem: int = 0
    machine: str = ""
    used_slots: int = 0
    plugged: int = 0
    nodes: tuple[int | None, ...] = ()
    ids: frozenset[str] = frozenset()
    name: str = ""
    bare: str = ""
    paths: frozenset[str] = frozenset()


# The guest's own arguments ---------------------------------------------------------------------------


def escaped(value: str) -> str:
    """A value inside a QEMU option: a comma is written twice."""
    return value.replace(",", ",,")


def join_continued(group: dict[str, str], first: str) -> str:
    rest = {k: v for k, v in group.items() if k != first}
    return ",".join([group[first], *(f"{k}={escaped(v)}" for k, v in rest.items())])


def split_option(text: str) -> list[tuple[str, str]]:
    """`a,b=c,,d` as [("", "a"), ("b", "c,d")]: QEMU's own rule of commas (util/keyval.c)."""
    found = []
    for part in text.replace(",,", "\0").split(","):
        key, equals, value = part.partition("=")
        found.append((key, value) if equals else ("", key))
    return [(k.replace("\0", ","), v.replace("\0", ",")) for k, v in found]


def qemu_size(text: str, default_unit: int = MIB) -> int | None:
    """Bytes that QEMU reads from a size (`2G`, `512`, `1.5g`); None for what it would refuse."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?|0[xX][0-9a-fA-F]+)([bkKmMgGtTpPeE]?)", text.strip())
    if not found:
        return None
    units = {"b": 1} | {u: 1024 ** (n + 1) for n, u in enumerate("kmgtpe")}
    unit = units[found[2].lower()] if found[2] else default_unit
    number = int(found[1], 16) if found[1].lower().startswith("0x") else float(found[1])
    return int(number * unit)


def read_guest(argv: Sequence[str]) -> Guest:
    """What the arguments of a virtual machine say of its memory and its devices.

    Raises EmupmemError for a machine type that has no NVDIMMs.
    """
    ram: int | None = None
    slots = maxmem = used = 0
    machine = name = bare = main = ""
    sizes: dict[str, int] = {}
    plugged: list[str] = []
    nodes: list[dict[str, str]] = []
    ids: set[str] = set()
    paths: set[str] = set()
    for option, value in _options(argv):
        pairs = _pairs(value)
        named = dict(pairs)
        first = named.get(
            {"machine": "type", "M": "type", "numa": "type", "device": "driver"}.get(option, ""), ""
        )
        first = first or (pairs[0][1] if pairs and pairs[0][0] == "" else "")
        if named.get("id"):
            ids.add(named["id"])
        if option == "m":
            size = qemu_size(named.get("size") or first)
            ram = ram if size is None else size
            slots = int(named["slots"]) if named.get("slots", "").isdigit() else slots
            maxmem = qemu_size(named.get("maxmem", ""), 1) or maxmem
        elif option in ("machine", "M"):
            machine = first or machine
            bare = next((v for k, v in pairs[1:] if k == ""), bare)
            main = named.get("memory-backend") or main
        elif option == "object":
            sizes[named.get("id", "")] = qemu_size(named.get("size", ""), 1) or 0
            paths |= {named["mem-path"]} if named.get("mem-path") else set()
        elif option == "device" and first in ("nvdimm", "pc-dimm"):
            used += 1
            plugged.append(named.get("memdev", ""))
        elif option == "device" and first.startswith("virtio-pmem"):
            plugged.append(named.get("memdev", ""))
        elif option == "numa" and first == "node":
            nodes.append(named)
        elif option == "name":
            name = named.get("guest") or first or name
    if machine and not re.match(r"(pc|q35)(-|$)", machine):
        raise EmupmemError(f"-machine {machine} has no NVDIMMs", "pc and q35 have")
    return Guest(
        sizes.get(main) or None if ram is None else ram,
        slots,
        maxmem,
        machine,
        used,
        sum(sizes.get(p, 0) for p in plugged),
        tuple(sizes.get(n["memdev"]) if "memdev" in n else qemu_size(n.get("mem", "")) for n in nodes),
        frozenset(ids),
        name,
        bare,
        frozenset(paths),
    )


def _pairs(value: str) -> list[tuple[str, str]]:
    """The properties of an option, which may be written as JSON too (libvirt does that)."""
    if value.startswith("{"):
        try:
            return [(k, str(v)) for k, v in json.loads(value).items() if not isinstance(v, (dict, list))]
        except ValueError:
            return []
    return split_option(value)


def _options(argv: Sequence[str]) -> list[tuple[str, str]]:
    """(option, value) of those options that we look at; QEMU takes `--machine` as well as `-machine`."""
    ours = ("m", "machine", "M", "object", "device", "numa", "name")
    found = []
    at = 0
    while at < len(argv):
        name = re.sub(r"^--?", "", argv[at]) if argv[at].startswith("-") else ""
        if name in ours and at + 1 < len(argv):
            found.append((name, argv[at + 1]))
            at += 1
        at += 1
    return found
