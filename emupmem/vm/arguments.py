# SPDX-License-Identifier: Apache-2.0
"""A virtual NVDIMM for QEMU: what a backend can promise, and the arguments that make the device. Pure.

QEMU merges several `-machine` and `-m` options, so the arguments of an existing virtual machine stay as
they are and ours follow them. Sources: docs/nvdimm.txt, softmmu/vl.c, hw/mem/nvdimm.c, backends/hostmem-file.c
of QEMU 7.2 and 10.0, and what these programs did when they were asked.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from emupmem.model import KIB, MIB, EmupmemError
from emupmem.units import human
from emupmem.vm.guest import DEFAULT_RAM, Guest, escaped, join_continued

ALIGN = 2 * MIB
"""Linux maps persistent memory in pieces of 2 MiB; a guest leaves an uneven rest unused, or refuses it."""

LABEL_LEAST = 128 * KIB
"""What QEMU and the NVDIMM label specification ask for at least."""

OLDEST = (4, 1)
"""The first QEMU with virtio-pmem, and with `nvdimm-persistence` under that name (4.0)."""
READONLY_SINCE = (6, 0)
NO_BARE_WORDS_SINCE = (6, 1)
"""Since then `-machine pc,nvdimm` ends QEMU ("Expected '=' after parameter"): `nvdimm=on` does in every version."""
MAX_SLOTS = 256

NOT_RAW = {b"QFI\xfb": "qcow2", b"KDMV": "vmdk", b"vhdxfile": "vhdx", b"conectix": "vpc", b"QED\0": "qed"}
"""How the files of disk images begin that are no plain row of bytes (block/*.c of QEMU)."""


class Device(StrEnum):
    """What the guest sees."""

    NVDIMM = "nvdimm"
    VIRTIO = "virtio-pmem"


class Persistence(StrEnum):
    """Which flushes the platform promises: `-machine nvdimm-persistence=`."""

    MEM_CTRL = "mem-ctrl"
    CPU = "cpu"


class Kind(StrEnum):
    """What is behind a device."""

    RAM = "memory of QEMU"
    FILE = "an ordinary file"
    VOLATILE_FILE = "a file in memory"
    DAX_FILE = "a DAX file"
    DEVDAX = "a DAX character device"
    BLOCK = "a block device, through the page cache"


@dataclass(frozen=True, slots=True)
class Backend:
    """What is behind a virtual device, as it was found: bytes, None where it is not there yet.

    `emulated` says that the memory below is RAM of this machine; `sync` whether MAP_SYNC mappings work;
    `align` what the device wants mappings to be a multiple of (0: nothing in particular).
    """

    kind: Kind
    path: str = ""
    size: int | None = None
    sync: bool | None = None
    emulated: bool = False
    align: int = 0
    room: int | None = None


@dataclass(frozen=True, slots=True)
class Wish:
    """One device: what is behind it and how it shall be. `size` in bytes, `node` of the guest."""

    backend: Backend
    size: int
    node: int | None = None
    label: int = 0


@dataclass(frozen=True, slots=True)
class Options:
    """What holds for all devices. `share` False keeps what the guest writes from the file."""

    device: Device = Device.NVDIMM
    share: bool = True
    readonly: bool = False
    align: int = 0
    persistence: Persistence | None = None
    pmem: bool = False
    machine: str = ""
    ram: int | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """The arguments to add, as groups (option, properties), and what a person should know of them."""

    machine: tuple[tuple[str, str], ...]
    memory: tuple[tuple[str, str], ...]
    pairs: tuple[tuple[dict[str, str], dict[str, str]], ...]
    promises: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def argv(self) -> list[str]:
        """The arguments, without the name of the program."""
        words: list[str] = []
        for option, group in (("-machine", self.machine), ("-m", self.memory)):
            words += [option, ",".join(f"{k}={escaped(v)}" for k, v in group)] if group else []
        for backend, device in self.pairs:
            words += [
                "-object",
                join_continued(backend, "qom-type"),
                "-device",
                join_continued(device, "driver"),
            ]
        return words


# Decisions ---------------------------------------------------------------------------------------------


def promise(backend: Backend, options: Options) -> str:
    """What the guest's writes survive, in a sentence. Only what the backend can keep is said."""
    if backend.kind is Kind.RAM:
        return "the content ends with QEMU: there is no file behind it"
    if not options.share:
        return f"the content ends with QEMU: share=off keeps what the guest writes from {backend.path}"
    if options.readonly:
        return f"the guest reads {backend.path} and cannot write to it"
    if backend.emulated:
        return f"writes survive the guest, not this machine: {backend.path} is emulated persistent memory, RAM of it"
    if backend.kind is Kind.VOLATILE_FILE:
        return f"writes survive the guest, not this machine: {backend.path} is in its memory"
    if backend.kind in (Kind.FILE, Kind.BLOCK):
        flushes = (
            "whatever the guest flushes"
            if options.device is Device.NVDIMM
            else "unless the guest has flushed it"
        )
        return (
            "writes survive the guest; what this machine has not written back yet is lost when it crashes "
            f"or loses power, {flushes} ({backend.path} is {backend.kind})"
        )
    if backend.kind is Kind.DAX_FILE and not (backend.sync and options.pmem):
        why = "there is no MAP_SYNC" if not backend.sync else "this QEMU has no libpmem"
        return f"writes survive the guest and a crash of this machine mostly, but nothing is sure: {why}"
    if backend.kind is Kind.DEVDAX and not options.pmem:
        return (
            "writes survive the guest; power loss only if CPU caches were flushed: this QEMU has no libpmem"
        )
    return "writes that the guest flushes survive the guest, a crash of this machine and power loss"


def choose_size(backend: Backend, asked: int | None) -> int:
    """Bytes of the device: as asked, or all of the backend. Raises EmupmemError where they do not fit."""
    size = asked if asked is not None else backend.size
    if size is None:
        raise EmupmemError(f"{backend.path} is not there yet: how large shall it be?", "give --pmem SIZE")
    if backend.size is not None and backend.kind in (Kind.DEVDAX, Kind.BLOCK) and size > backend.size:
        raise EmupmemError(f"{backend.path} has {human(backend.size)}, you asked for {human(size)}")
    if backend.size is not None and size != backend.size and backend.kind not in (Kind.DEVDAX, Kind.BLOCK):
        raise EmupmemError(
            f"{backend.path} is there already and has {human(backend.size)} ({backend.size} bytes), you asked "
            f"for {human(size)}",
            "leave --pmem away to take it as it is, or name another file: what is there is never resized",
        )
    if backend.size is None and backend.room is not None and backend.room < size:
        raise EmupmemError(
            f"there are {human(backend.room)} free for {backend.path}, {human(size)} are needed",
            "a guest that writes to a file without room is killed",
        )
    return size


def check(wish: Wish, options: Options, version: tuple[int, int]) -> None:
    """Refuse what QEMU or the guest would fail on, in clear words. Raises EmupmemError."""
    step = max(ALIGN, wish.backend.align)
    if wish.size < step or wish.size % step:
        why = (
            f"{wish.backend.path} maps in pieces of {human(step)}"
            if wish.backend.align > ALIGN
            else "Linux maps it so"
        )
        raise EmupmemError(
            f"{human(wish.size)} ({wish.size} bytes) is not a multiple of {human(step)}: {why}",
            f"{wish.size // step * step} bytes would be" if wish.size > step else "",
        )
    if options.align:
        if options.align & (options.align - 1) or options.align < 4 * KIB:
            raise EmupmemError(f"--align {options.align} is not a power of two of at least 4 KiB")
        if options.align < wish.backend.align:
            raise EmupmemError(
                f"--align {human(options.align)} is less than the {human(wish.backend.align)} of {wish.backend.path}"
            )
    if wish.label:
        if options.device is Device.VIRTIO:
            raise EmupmemError("virtio-pmem has no labels", "--device nvdimm has")
        if wish.label < LABEL_LEAST or wish.label % (4 * KIB):
            raise EmupmemError(
                f"a label area of {wish.label} bytes: at least 128 KiB and a multiple of 4 KiB are needed"
            )
        if wish.label + ALIGN > wish.size:
            raise EmupmemError(f"a label area of {human(wish.label)} leaves nothing of {human(wish.size)}")
    if options.readonly:
        if wish.backend.kind is Kind.RAM:
            raise EmupmemError("a read-only device needs a file", "--backend names it")
        if options.device is Device.VIRTIO:
            raise EmupmemError("virtio-pmem cannot be read-only", "--device nvdimm can")
        if version < READONLY_SINCE:
            raise EmupmemError(
                f"QEMU {version[0]}.{version[1]} has no read-only NVDIMMs", "6.0 and newer have"
            )
        if wish.backend.size is None:
            raise EmupmemError(f"{wish.backend.path} is not there: there is nothing to read")
    if options.device is Device.VIRTIO and options.persistence is not None:
        raise EmupmemError("virtio-pmem knows no nvdimm-persistence", "--device nvdimm does")
    if options.device is Device.VIRTIO and wish.node is not None:
        raise EmupmemError("virtio-pmem belongs to no NUMA node", "--device nvdimm can")


def plan(guest: Guest, wishes: Sequence[Wish], options: Options, version: tuple[int, int]) -> Plan:
    """The arguments for these devices beside those that the guest has already. Raises EmupmemError."""
    if version < OLDEST:
        raise EmupmemError(
            f"QEMU {version[0]}.{version[1]} is too old", f"{OLDEST[0]}.{OLDEST[1]} or newer is needed"
        )
    if guest.bare and version >= NO_BARE_WORDS_SINCE:
        raise EmupmemError(
            f"this QEMU refuses the bare word {guest.bare} of your -machine",
            "leave it away: nvdimm=on is added" if guest.bare == "nvdimm" else f"write {guest.bare}=on",
        )
    for wish in wishes:
        check(wish, options, version)
        if wish.node is not None and wish.node >= max(len(guest.nodes), 1):
            raise EmupmemError(
                f"the guest has no NUMA node {wish.node}", "its -numa node,… options say which there are"
            )
    paths = [w.backend.path for w in wishes if w.backend.path]
    paths += sorted(guest.paths & set(paths))
    twice = next((p for p in paths if paths.count(p) > 1), None)
    if twice and options.share and not options.readonly:
        raise EmupmemError(f"{twice} is behind two devices: they would write over each other")
    ram = options.ram if options.ram is not None else guest.ram if guest.ram is not None else DEFAULT_RAM
    nvdimms = len(wishes) if options.device is Device.NVDIMM else 0
    slots = max(guest.slots, guest.used_slots + nvdimms)
    if slots > MAX_SLOTS:
        raise EmupmemError(f"{slots} memory slots: QEMU has {MAX_SLOTS} at most")
    maxmem = max(guest.maxmem, ram + guest.plugged + sum(w.size for w in wishes))
    memory = [("size", _size(ram))] if options.ram is not None else []
    memory += [("slots", str(slots))] if slots else []
    memory.append(("maxmem", _size(maxmem)))
    machine = [("type", options.machine)] if options.machine else []
    if options.device is Device.NVDIMM:
        machine.append(("nvdimm", "on"))
        if options.persistence is not None:
            machine.append(("nvdimm-persistence", options.persistence.value))
    names = [i for i in (f"vnvdimm{n}" for n in range(len(wishes) + len(guest.ids))) if i not in guest.ids]
    pairs = tuple(_pair(name, wish, options) for name, wish in zip(names, wishes, strict=False))
    promises = tuple(promise(w.backend, options) for w in wishes)
    return Plan(tuple(machine), tuple(memory), pairs, promises, tuple(_notes(guest, wishes, options)))


def _size(size: int) -> str:
    return f"{size // MIB}M" if size % MIB == 0 else f"{size}B"


def _notes(guest: Guest, wishes: Sequence[Wish], options: Options) -> list[str]:
    notes = []
    ordinary = any(w.backend.kind in (Kind.FILE, Kind.BLOCK) and not w.backend.emulated for w in wishes)
    if ordinary and options.device is Device.NVDIMM and options.share and not options.readonly:
        notes.append(
            "an NVDIMM tells the guest that flushed CPU caches are enough, which an ordinary file cannot "
            "keep; --device virtio-pmem passes the guest's flushes on to the file (Linux 5.3 or newer in it)"
        )
    if any(w.label for w in wishes):
        notes.append(
            "a new label area is empty: the guest has a region, and ndctl create-namespace makes the device"
        )
    if options.ram is None and guest.ram is None:
        notes.append(
            "no -m is given after --, nor --ram: QEMU gives the guest 128 MiB, and maxmem counts on it"
        )
    if options.ram is not None and guest.ram not in (None, options.ram):
        notes.append("--ram replaces the -m of the given arguments")
    return notes


def _pair(name: str, wish: Wish, options: Options) -> tuple[dict[str, str], dict[str, str]]:
    backend = wish.backend
    memory = f"{name}-memory"
    made = {
        "qom-type": "memory-backend-ram" if backend.kind is Kind.RAM else "memory-backend-file",
        "id": memory,
    }
    made["size"] = f"{wish.size}B" if wish.size % MIB else f"{wish.size // MIB}M"
    if backend.kind is not Kind.RAM:
        made["mem-path"] = backend.path
        made["share"] = "on" if options.share else "off"
        align = options.align or (backend.align if backend.align > 4 * KIB else 0)
        made |= {"align": str(align)} if align else {}
        made |= {"pmem": "on"} if _durable(backend, options) else {}
        made |= {"readonly": "on"} if options.readonly else {}
    elif options.align:
        made["align"] = str(options.align)
    driver = "nvdimm" if options.device is Device.NVDIMM else "virtio-pmem-pci"
    device = {"driver": driver, "id": name, "memdev": memory}
    device |= {"node": str(wish.node)} if wish.node is not None else {}
    device |= {"label-size": str(wish.label)} if wish.label else {}
    device |= {"unarmed": "on"} if options.readonly else {}
    return made, device


def _durable(backend: Backend, options: Options) -> bool:
    """Whether pmem=on is true: QEMU can flush, and a flush reaches the medium."""
    if not (options.pmem and options.share) or options.readonly:
        return False
    return backend.kind is Kind.DEVDAX or (backend.kind is Kind.DAX_FILE and backend.sync is True)


def parse_version(text: str) -> tuple[int, int]:
    """(7, 2) of `qemu --version`. Raises EmupmemError for another program."""
    found = re.search(r"QEMU emulator version (\d+)\.(\d+)", text)
    if not found:
        raise EmupmemError("that is not QEMU: its --version does not say so", "--qemu names the program")
    return int(found[1]), int(found[2])
