# SPDX-License-Identifier: Apache-2.0
"""A virtual NVDIMM for QEMU: what a backend can promise, and the arguments that make the device. Pure.

QEMU merges several `-machine` and `-m` options, so the arguments of an existing virtual machine stay as
they are and ours follow them. Sources: docs/nvdimm.txt, softmmu/vl.c, hw/mem/nvdimm.c, backends/hostmem-file.c
of QEMU 7.2 and 10.0, and what these programs did when they were asked.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from emupmem.model import MIB, EmupmemError
from emupmem.record import record
from emupmem.vm import size as vm_size
from emupmem.vm.guest import DEFAULT_RAM, Guest
from emupmem.vm.options import escaped, join_continued
from emupmem.vm.wish import Backend, Backing, DeviceOptions, DeviceWish, GuestDevice

OLDEST = (4, 1)
"""The first QEMU with virtio-pmem, and with `nvdimm-persistence` under that name (4.0)."""
NO_BARE_WORDS_SINCE = (6, 1)
"""Since then `-machine pc,nvdimm` ends QEMU ("Expected '=' after parameter"): `nvdimm=on` does in every version."""
MAX_SLOTS = 256

LABELS = (
    "a label area that is empty counts as none: the guest has one raw device without DAX there, and ndctl "
    "create-namespace fails until labels are written: in the guest sudo emupmem nvdimm destroy namespace0.0 "
    "(or ndctl disable-region, init-labels, enable-region)"
)
"""Seen with ndctl 76 and Linux 6.1."""

NOT_RAW = {b"QFI\xfb": "qcow2", b"KDMV": "vmdk", b"vhdxfile": "vhdx", b"conectix": "vpc", b"QED\0": "qed"}
"""How the files of disk images begin that are no plain row of bytes (block/*.c of QEMU)."""


@record
class DevicePlan:
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


def promise(backend: Backend, options: DeviceOptions) -> str:
    """What the guest's writes survive, in a sentence. Only what the backend can keep is said."""
    if backend.kind is Backing.RAM:
        return "the content is lost when QEMU exits: there is no file behind it"
    if not options.share:
        return (
            f"the content is lost when QEMU exits: share=off keeps what the guest writes from {backend.path}"
        )
    if options.readonly:
        return f"the guest reads {backend.path} and cannot write to it"
    if backend.emulated:
        return f"writes survive the guest, not this machine: {backend.path} is emulated persistent memory, RAM of it"
    if backend.kind is Backing.VOLATILE_FILE:
        return f"writes survive the guest, not this machine: {backend.path} is in its memory"
    if backend.kind in (Backing.FILE, Backing.BLOCK):
        flushes = (
            "whatever the guest flushes"
            if options.device is GuestDevice.NVDIMM
            else "unless the guest has flushed it"
        )
        return (
            "writes survive the guest; what this machine has not written back yet is lost when it crashes "
            f"or loses power, {flushes} ({backend.path} is {backend.kind})"
        )
    if backend.kind is Backing.DAX_FILE and not (backend.sync and options.pmem):
        why = "there is no MAP_SYNC" if not backend.sync else "this QEMU has no libpmem"
        return f"writes survive the guest and a crash of this machine mostly, but nothing is sure: {why}"
    if backend.kind is Backing.DEVDAX and not options.pmem:
        return (
            "writes survive the guest; power loss only if CPU caches were flushed: this QEMU has no libpmem"
        )
    return "writes that the guest flushes survive the guest, a crash of this machine and power loss"


def plan_devices(
    guest: Guest, wishes: Sequence[DeviceWish], options: DeviceOptions, version: tuple[int, int]
) -> DevicePlan:
    """The arguments for these devices beside those that the guest has already. Raises EmupmemError."""
    if version < OLDEST:
        raise EmupmemError(
            f"QEMU {version[0]}.{version[1]} is too old", f"{OLDEST[0]}.{OLDEST[1]} or newer is needed"
        )
    if guest.bare and version >= NO_BARE_WORDS_SINCE:
        raise EmupmemError(
            f"this QEMU refuses the bare word {guest.bare} of your -machine",
            "omit it: nvdimm=on is added" if guest.bare == "nvdimm" else f"write {guest.bare}=on",
        )
    for wish in wishes:
        vm_size.check_wish(wish, options, version)
        if wish.node is not None and wish.node >= max(len(guest.nodes), 1):
            raise EmupmemError(
                f"the guest has no NUMA node {wish.node}", "its -numa node,… options say which there are"
            )
    _refuse_twice(guest, wishes, options)
    ram = options.ram if options.ram is not None else guest.ram if guest.ram is not None else DEFAULT_RAM
    nvdimms = len(wishes) if options.device is GuestDevice.NVDIMM else 0
    slots = max(guest.slots, guest.used_slots + nvdimms)
    if slots > MAX_SLOTS:
        raise EmupmemError(f"{slots} memory slots: QEMU has {MAX_SLOTS} at most")
    room = sum(w.size + vm_size.padding(w, options) for w in wishes)
    # QEMU takes a multiple of its page size only, and rounds the RAM up to one.
    maxmem = max(guest.maxmem, -(-(ram + sum(guest.plugged) + room) // MIB) * MIB)
    memory = [("size", _size(ram))] if options.ram is not None else []
    memory += [("slots", str(slots))] if slots else []
    memory.append(("maxmem", _size(maxmem)))
    machine = [("type", options.machine)] if options.machine else []
    if options.device is GuestDevice.NVDIMM:
        machine.append(("nvdimm", "on"))
        if options.persistence is not None:
            machine.append(("nvdimm-persistence", options.persistence.value))
    names = [
        name
        for name in (f"vnvdimm{n}" for n in range(len(wishes) + len(guest.ids)))
        if not {name, _memory_of(name)} & guest.ids
    ]
    pairs = tuple(_pair(name, wish, options) for name, wish in zip(names, wishes, strict=False))
    promises = tuple(promise(w.backend, options) for w in wishes)
    return DevicePlan(tuple(machine), tuple(memory), pairs, promises, tuple(_notes(guest, wishes, options)))


def _refuse_twice(guest: Guest, wishes: Sequence[DeviceWish], options: DeviceOptions) -> None:
    """Raise EmupmemError where two devices, or a disk of the guest, would write over each other."""
    if not options.share or options.readonly:
        return
    seen = set(guest.paths)
    for backend in (w.backend for w in wishes if w.backend.path):
        one = backend.identity or backend.path
        if one in seen:
            raise EmupmemError(
                f"{backend.path} is behind two devices or disks of the guest: they would write over each other"
            )
        seen.add(one)


def _memory_of(name: str) -> str:
    """The name of the object behind a device."""
    return f"{name}-memory"


def _size(size: int) -> str:
    return f"{size // MIB}M" if size % MIB == 0 else f"{size}B"


def _notes(guest: Guest, wishes: Sequence[DeviceWish], options: DeviceOptions) -> list[str]:
    notes = []
    ordinary = any(w.backend.kind in (Backing.FILE, Backing.BLOCK) and not w.backend.emulated for w in wishes)
    if ordinary and options.device is GuestDevice.NVDIMM and options.share and not options.readonly:
        notes.append(
            "an NVDIMM tells the guest that flushed CPU caches are enough, which an ordinary file cannot "
            "keep; --device virtio-pmem passes the guest's flushes on to the file (Linux 5.3 or newer in it)"
        )
    if any(w.label for w in wishes):
        notes += [vm_size.label_note(w, options) for w in wishes if w.label]
        notes.append(LABELS)
    odd = any(size % vm_size.REGION_STEP for size in guest.plugged)
    if odd and any(w.label and w.backend.kind is Backing.RAM for w in wishes):
        notes.append(
            "a memory device of the guest's own has no multiple of 16 MiB: the next region may begin where ndctl "
            "makes no fsdax or devdax; with --backend PATH it begins at a multiple"
        )
    if options.ram is None and guest.ram is None:
        notes.append(
            "no -m is given after --, nor --ram: QEMU gives the guest 128 MiB, and maxmem counts on it"
        )
    if options.ram is not None and guest.ram not in (None, options.ram):
        notes.append("--ram replaces the -m of the given arguments")
    return notes


def _pair(name: str, wish: DeviceWish, options: DeviceOptions) -> tuple[dict[str, str], dict[str, str]]:
    backend = wish.backend
    memory = _memory_of(name)
    made = {
        "qom-type": "memory-backend-ram" if backend.kind is Backing.RAM else "memory-backend-file",
        "id": memory,
    }
    made["size"] = f"{wish.size}B" if wish.size % MIB else f"{wish.size // MIB}M"
    if backend.kind is not Backing.RAM:
        made["mem-path"] = backend.path
        made["share"] = "on" if options.share else "off"
        align = vm_size.alignment(wish, options)
        made |= {"align": str(align)} if align else {}
        made |= {"pmem": "on"} if _durable(backend, options) else {}
        made |= {"readonly": "on"} if options.readonly else {}
    driver = "nvdimm" if options.device is GuestDevice.NVDIMM else "virtio-pmem-pci"
    device = {"driver": driver, "id": name, "memdev": memory}
    device |= {"node": str(wish.node)} if wish.node is not None else {}
    device |= {"label-size": str(wish.label)} if wish.label else {}
    device |= {"unarmed": "on"} if options.readonly else {}
    return made, device


def _durable(backend: Backend, options: DeviceOptions) -> bool:
    """Whether pmem=on is true: QEMU can flush, and a flush reaches the medium."""
    if not (options.pmem and options.share) or options.readonly:
        return False
    return backend.kind is Backing.DEVDAX or (backend.kind is Backing.DAX_FILE and backend.sync is True)


def parse_version(text: str) -> tuple[int, int]:
    """(7, 2) of `qemu --version`. Raises EmupmemError for another program."""
    found = re.search(r"QEMU emulator version (\d+)\.(\d+)", text)
    if not found:
        raise EmupmemError("that is not QEMU: its --version does not say so", "--qemu names the program")
    return int(found[1]), int(found[2])
