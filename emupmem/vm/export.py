# SPDX-License-Identifier: Apache-2.0
"""The same guest for others: a shell line, a file for -readconfig, libvirt's XML."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from itertools import pairwise
from xml.etree import ElementTree as ET

from emupmem.model import KIB, MIB, EmupmemError
from emupmem.units import human
from emupmem.vm.arguments import DevicePlan
from emupmem.vm.guest import DEFAULT_RAM, Guest
from emupmem.vm.options import qemu_size
from emupmem.vm.size import FIXED
from emupmem.vm.wish import Backing, DeviceOptions, DeviceWish, GuestDevice

# Other forms --------------------------------------------------------------------------------------------


def shell_line(argv: Sequence[str]) -> str:
    """The command line, quoted for a shell."""
    return shlex.join(argv)


def readconfig(made: DevicePlan) -> str:
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


def libvirt(guest: Guest, wishes: Sequence[DeviceWish], options: DeviceOptions, made: DevicePlan) -> str:
    """A domain for libvirt with these devices; disks and networks are yours to add.

    Valid by libvirt's schema (domain.rng). Raises EmupmemError for what libvirt cannot say.
    """
    if any(w.backend.kind is Backing.RAM for w in wishes):
        raise EmupmemError("libvirt wants a file behind every NVDIMM", "--backend names it")
    if options.persistence is not None:
        raise EmupmemError("libvirt has no word for --persistence", "its qemu:commandline could hold it")
    ram = options.ram if options.ram is not None else guest.ram if guest.ram is not None else DEFAULT_RAM
    numbers = dict(made.memory)
    top = ET.Element("domain", type="qemu" if guest.accelerator == "tcg" else "kvm")
    ET.SubElement(top, "name").text = guest.name.replace("/", "_") or "pmem"
    maximum = qemu_size(numbers["maxmem"], 1) or 0
    ET.SubElement(top, "maxMemory", slots=str(max(len(wishes), 1)), unit="KiB").text = str(maximum // KIB)
    ET.SubElement(top, "memory", unit="KiB").text = str(ram // KIB)
    cpus = max(guest.cpus, len(guest.nodes))
    ET.SubElement(top, "vcpu").text = str(cpus)
    system = ET.SubElement(top, "os")
    ET.SubElement(
        system, "type", arch="x86_64", machine=options.machine or guest.machine or "q35"
    ).text = "hvm"
    ET.SubElement(ET.SubElement(top, "features"), "acpi")
    numa = ET.SubElement(ET.SubElement(top, "cpu"), "numa")
    for n, (size, mine) in enumerate(zip(_cells(guest, ram), _cell_cpus(guest, cpus), strict=True)):
        ET.SubElement(numa, "cell", id=str(n), cpus=mine, memory=str(size // KIB), unit="KiB")
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


def _cell_cpus(guest: Guest, cpus: int) -> list[str]:
    """The processors of each NUMA node (`0-1`), in equal parts where the arguments do not tell of all."""
    if guest.node_cpus and all(guest.node_cpus):
        return list(guest.node_cpus)
    count = max(len(guest.nodes), 1)
    starts = [cpus * n // count for n in range(count + 1)]
    return [f"{a}-{b - 1}" if b - a > 1 else str(a) for a, b in pairwise(starts)]


def libvirt_notes(wishes: Sequence[DeviceWish], options: DeviceOptions) -> list[str]:
    """What libvirt does otherwise than QEMU by the same words; seen with libvirt 9.0 of Debian 12."""
    notes = []
    if options.device is GuestDevice.VIRTIO:
        notes.append(
            "libvirt 9.0 (Debian 12) defines this domain and cannot start it (“virtio-pmem memory device info is not "
            "handled yet”); 9.1 and newer can"
        )
    for wish in wishes:
        backend = wish.backend
        if backend.size is None:
            notes.append(
                f"{backend.path} is not there, and nothing is made here: truncate -s {wish.size} "
                f"{shlex.quote(backend.path)}"
            )
        if options.device is GuestDevice.NVDIMM and backend.kind not in FIXED:
            where = f"on the disk below {backend.path}" if options.share else "of this machine's RAM"
            notes.append(
                f"libvirt has QEMU allocate an NVDIMM as a whole when it starts: {human(wish.size)} {where}"
            )
    return notes


def libvirt_promises(
    wishes: Sequence[DeviceWish], options: DeviceOptions, promises: Sequence[str]
) -> list[str]:
    """What is promised of the same devices under libvirt, which opens a read-only one for writing."""
    if not options.readonly:
        return list(promises)
    return [
        f"the guest is told that it cannot write to {w.backend.path}; nothing else keeps it from it, because libvirt "
        "opens the file for writing (and needs the right to)"
        for w in wishes
    ]


def _libvirt_memory(
    devices: ET.Element, wish: DeviceWish, options: DeviceOptions, backend: dict[str, str]
) -> None:
    virtio = options.device is GuestDevice.VIRTIO
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
