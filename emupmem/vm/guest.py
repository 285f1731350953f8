# SPDX-License-Identifier: Apache-2.0
"""The guest that QEMU's own arguments describe, in words and in the files that -readconfig names."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import field

from emupmem.model import MIB, EmupmemError
from emupmem.record import open_record, record
from emupmem.vm.options import (
    DISKS,
    LOOKED_AT,
    Pairs,
    count_of,
    every_option,
    qemu_size,
    split_option,
    with_values,
)

DEFAULT_RAM = 128 * MIB
"""QEMU's own default of `-m`."""

PLUGGED = ("nvdimm", "pc-dimm", "virtio-pmem", "virtio-mem", "hv-balloon")
"""Devices whose memory lies between the RAM and `maxmem`, by how their drivers' names begin."""
SLOTTED = ("nvdimm", "pc-dimm")
MOST_PROCESSORS = 1 << 16

Reader = Callable[[str], str]


@record
class Guest:
    """What the arguments of a virtual machine say of its memory: bytes; None where they say nothing.

    `nodes` is the memory of each NUMA node, `node_cpus` its processors (`0-1`, empty where it is not told),
    `plugged` the sizes of its memory devices, `bare` a word of `-machine` that has no `=`, `ids` the names of
    its objects and devices, `paths` the files behind its memory objects and disks.
    """

    ram: int | None = None
    slots: int = 0
    maxmem: int = 0
    machine: str = ""
    used_slots: int = 0
    plugged: tuple[int, ...] = ()
    nodes: tuple[int | None, ...] = ()
    ids: frozenset[str] = frozenset()
    name: str = ""
    bare: str = ""
    paths: frozenset[str] = frozenset()
    cpus: int = 1
    node_cpus: tuple[str, ...] = ()
    accelerator: str = ""


@open_record
class _Seen:
    """What was read so far: a later word wins over an earlier one, as in QEMU."""

    size: int | None = None
    machine_size: int | None = None
    slots: int = 0
    maxmem: int = 0
    machine: str = ""
    main: str = ""
    bare: str = ""
    name: str = ""
    cpus: int = 1
    accelerator: str = ""
    sizes: dict[str, int] = field(default_factory=dict)
    plugged: list[tuple[str, str]] = field(default_factory=list)
    nodes: list[Pairs] = field(default_factory=list)
    ids: set[str] = field(default_factory=set)
    paths: set[str] = field(default_factory=set)

    def take(self, option: str, pairs: Pairs) -> None:
        """One option with its properties."""
        named = dict(pairs)
        bare_first = pairs[0][1] if pairs and pairs[0][0] == "" else ""
        if option in ("object", "device") and named.get("id"):
            self.ids.add(named["id"])
        if option == "m":
            self._memory(named, bare_first)
        elif option in ("machine", "M"):
            self._machine(pairs, named.get("type") or bare_first)
        elif option == "object":
            self.sizes[named.get("id", "")] = qemu_size(named.get("size", ""), 1) or 0
            self.paths |= {named["mem-path"]} if named.get("mem-path") else set()
        elif option == "device":
            driver = named.get("driver") or bare_first
            if driver.startswith(PLUGGED) and named.get("memdev"):
                self.plugged.append((driver, named["memdev"]))
        elif option == "numa" and (named.get("type") or bare_first) == "node":
            self.nodes.append(pairs)
        elif option == "name":
            self.name = named.get("guest") or bare_first or self.name
        elif option in ("smp", "smp-opts"):
            self.cpus = _processors(named, bare_first) or self.cpus
        elif option == "accel":
            self.accelerator = named.get("accel") or bare_first or self.accelerator
        else:
            self.paths |= {v for k, v in pairs if k in ("file", "filename", "file.filename")}

    def _memory(self, named: dict[str, str], first: str) -> None:
        size = qemu_size(named.get("size") or first)
        self.size = self.size if size is None else size
        self._more(named.get("slots", ""), named.get("maxmem", ""))

    def _more(self, slots: str, maxmem: str) -> None:
        self.slots = count_of(slots) or self.slots
        self.maxmem = qemu_size(maxmem, 1) or self.maxmem

    def _machine(self, pairs: Pairs, name: str) -> None:
        named = dict(pairs)
        self.machine = name or self.machine
        self.bare = next((v for k, v in pairs[1:] if k == ""), self.bare)
        self.main = named.get("memory-backend") or self.main
        self.accelerator = named.get("accel", self.accelerator).partition(":")[0]
        self.machine_size = qemu_size(named.get("memory.size", ""), 1) or self.machine_size
        self._more(named.get("memory.slots", ""), named.get("memory.max-size", ""))

    @property
    def ram(self) -> int | None:
        """`-m` wins over `-machine memory.size=` wherever it stands; the backend counts where neither is given."""
        if self.size is not None:
            return self.size
        return self.machine_size if self.machine_size is not None else self.sizes.get(self.main) or None


def _nothing_to_read(name: str) -> str:
    raise EmupmemError(f"{name} was not read")


def read_guest(argv: Sequence[str], read: Reader = _nothing_to_read) -> Guest:
    """What the arguments of a virtual machine say of its memory and its devices.

    `read` gives the text of a file for `-readconfig`. Raises EmupmemError for a machine type that has no
    NVDIMMs, and where such a file cannot be read.
    """
    seen = _Seen()
    for option, pairs in every_option(argv, read):
        seen.take(option, pairs)
    if seen.machine and not re.match(r"(pc|q35)(-|$)", seen.machine):
        raise EmupmemError(f"-machine {seen.machine} has no NVDIMMs", "pc and q35 have")
    nodes = [dict(pairs) for pairs in seen.nodes]
    return Guest(
        seen.ram,
        seen.slots,
        seen.maxmem,
        seen.machine,
        sum(driver in SLOTTED for driver, _ in seen.plugged),
        tuple(seen.sizes.get(memory, 0) for _, memory in seen.plugged),
        tuple(seen.sizes.get(n["memdev"]) if "memdev" in n else qemu_size(n.get("mem", "")) for n in nodes),
        frozenset(seen.ids),
        seen.name,
        seen.bare,
        frozenset(seen.paths),
        seen.cpus,
        tuple(",".join(v for k, v in pairs if k == "cpus") for pairs in seen.nodes),
        seen.accelerator,
    )


def _processors(named: dict[str, str], first: str) -> int:
    """How many processors `-smp` gives; 0 where it does not tell."""
    told = named.get("cpus") or first
    if count_of(told):
        return count_of(told)
    parts = [count_of(named.get(k, "")) for k in ("sockets", "dies", "clusters", "cores", "threads")]
    known = [n for n in parts if n]
    return min(math.prod(known), MOST_PROCESSORS) if known else 0


PROGRAM_NAMES = re.compile(r"qemu-system-\w+|qemu-kvm|kvm")
OURS = (
    "--pmem",
    "--pmem-file",
    "--backend",
    "--share",
    "--readonly",
    "--align",
    "--label",
    "--node",
    "--persistence",
    "--ram",
    "--qemu",
    "--shared-backend",
    "--print",
    "--libvirt",
    "--json",
)
"""Options of emupmem that QEMU does not have under the same name."""


def split_program(words: Sequence[str]) -> tuple[str, list[str]]:
    """The name of QEMU where a whole command line is given (empty where it is not), and its arguments."""
    first = words[0] if words else ""
    if PROGRAM_NAMES.fullmatch(first.rpartition("/")[2]):
        return first, list(words[1:])
    return "", list(words)


def misplaced(words: Sequence[str]) -> str:
    """The first of our own options among QEMU's arguments, empty where there is none."""
    return next((w for w in words if w.partition("=")[0] in OURS), "")


def wrong_value(words: Sequence[str]) -> str:
    """What of QEMU's arguments has no value, or -m one that is no size: as an unset variable makes it."""
    for name, value in with_values(words):
        if name not in LOOKED_AT:
            continue
        if value is None or (not value and name not in ("name", *DISKS)):
            return f"-{name} has no value"
        first = split_option(value)[0] if name == "m" else ("", "0")
        if first[0] in ("", "size") and qemu_size(first[1]) is None:
            return f"-{name} {value} has no size that QEMU reads"
    return ""
