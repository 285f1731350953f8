"""A virtual NVDIMM for QEMU: what a backend can promise, and the arguments that make the device. Pure.

QEMU merges several `-machine` and `-m` options, so the arguments of an existing virtual machine stay as
they are and ours follow them. Sources: docs/nvdimm.txt, softmmu/vl.c, hw/mem/nvdimm.c, backends/hostmem-file.c
of QEMU 7.2 and 10.0, and what these programs did when they were asked.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from xml.etree import ElementTree as ET

from emupmem.model import KIB, MIB, EmupmemError
from emupmem.units import human

ALIGN = 2 * MIB
"""Linux maps persistent memory in pieces of 2 MiB; a guest leaves an uneven rest unused, or refuses it."""

LABEL_LEAST = 128 * KIB
"""What QEMU and the NVDIMM label specification ask for at least."""

DEFAULT_RAM = 128 * MIB
"""QEMU's own default of `-m`."""

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
            words += ["-object", _joined(backend, "qom-type"), "-device", _joined(device, "driver")]
        return words


# The guest's own arguments ---------------------------------------------------------------------------


def escaped(value: str) -> str:
    """A value inside a QEMU option: a comma is written twice."""
    return value.replace(",", ",,")


def _joined(group: dict[str, str], first: str) -> str:
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


# Other forms --------------------------------------------------------------------------------------------


def shell_line(program: str, argv: Sequence[str]) -> str:
    """The command line, quoted for a shell."""
    return shlex.join([program, *argv])


def readconfig(made: Plan) -> str:
    """The same as a file for `-readconfig`. Raises EmupmemError for a value that no such file can hold."""
    groups = [("[machine]", dict(made.machine)), ("[memory]", dict(made.memory))]
    for backend, device in made.pairs:
        groups += [(f'[object "{backend["id"]}"]', backend), (f'[device "{device["id"]}"]', device)]
    lines = []
    for head, group in groups:
        if not group:
            continue
        lines.append(head)
        for key, value in group.items():
            if key == "id":
                continue
            if '"' in value or "\n" in value:
                raise EmupmemError(
                    f"{value!r} cannot be written into a file for -readconfig", "choose another name"
                )
            lines.append(f'  {key} = "{value}"')
    return "\n".join(lines) + "\n"


def libvirt(guest: Guest, wishes: Sequence[Wish], options: Options, made: Plan) -> str:
    """A domain for libvirt with these devices; disks and networks are yours to add.

    Valid by libvirt's schema (domain.rng). Raises EmupmemError for what libvirt cannot say.
    """
    if any(w.backend.kind is Kind.RAM for w in wishes):
        raise EmupmemError("libvirt wants a file behind every NVDIMM", "--backend names it")
    if options.persistence is not None:
        raise EmupmemError("libvirt has no word for --persistence", "its qemu:commandline could hold it")
    ram = options.ram if options.ram is not None else guest.ram if guest.ram is not None else DEFAULT_RAM
    numbers = dict(made.memory)
    top = ET.Element("domain", type="kvm")
    ET.SubElement(top, "name").text = "pmem"
    maximum = qemu_size(numbers["maxmem"], 1) or 0
    ET.SubElement(top, "maxMemory", slots=str(max(len(wishes), 1)), unit="KiB").text = str(maximum // KIB)
    ET.SubElement(top, "memory", unit="KiB").text = str(ram // KIB)
    ET.SubElement(top, "vcpu").text = str(max(len(guest.nodes), 1))
    system = ET.SubElement(top, "os")
    ET.SubElement(
        system, "type", arch="x86_64", machine=options.machine or guest.machine or "q35"
    ).text = "hvm"
    ET.SubElement(ET.SubElement(top, "features"), "acpi")
    numa = ET.SubElement(ET.SubElement(top, "cpu"), "numa")
    for n, size in enumerate(_cells(guest, ram)):
        ET.SubElement(numa, "cell", id=str(n), cpus=str(n), memory=str(size // KIB), unit="KiB")
    devices = ET.SubElement(top, "devices")
    for wish, (backend, _) in zip(wishes, made.pairs, strict=True):
        _libvirt_memory(devices, wish, options, backend)
    ET.indent(top)
    return ET.tostring(top, "unicode") + "\n"


def _cells(guest: Guest, ram: int) -> list[int]:
    """The memory of each NUMA node, in equal parts where the arguments do not tell; libvirt wants one at least."""
    told = [n for n in guest.nodes if n is not None]
    if told and len(told) == len(guest.nodes) and sum(told) == ram:
        return told
    count = max(len(guest.nodes), 1)
    part = ram // count // MIB * MIB
    return [*[part] * (count - 1), ram - part * (count - 1)]


def _libvirt_memory(devices: ET.Element, wish: Wish, options: Options, backend: dict[str, str]) -> None:
    virtio = options.device is Device.VIRTIO
    access = "shared" if options.share else "private"
    memory = ET.SubElement(devices, "memory", model=options.device.value, access=access)
    source = ET.SubElement(memory, "source")
    ET.SubElement(source, "path").text = wish.backend.path
    if not virtio:
        if "align" in backend:
            ET.SubElement(source, "alignsize", unit="KiB").text = str(int(backend["align"]) // KIB)
        if backend.get("pmem") == "on":
            ET.SubElement(source, "pmem")
    target = ET.SubElement(memory, "target")
    ET.SubElement(target, "size", unit="KiB").text = str(wish.size // KIB)
    if not virtio:
        ET.SubElement(target, "node").text = str(wish.node or 0)
        if wish.label:
            label = ET.SubElement(target, "label")
            ET.SubElement(label, "size", unit="KiB").text = str(wish.label // KIB)
        if options.readonly:
            ET.SubElement(target, "readonly")


def parse_version(text: str) -> tuple[int, int]:
    """(7, 2) of `qemu --version`. Raises EmupmemError for another program."""
    found = re.search(r"QEMU emulator version (\d+)\.(\d+)", text)
    if not found:
        raise EmupmemError("that is not QEMU: its --version does not say so", "--qemu names the program")
    return int(found[1]), int(found[2])
