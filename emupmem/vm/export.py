# SPDX-License-Identifier: Apache-2.0
"""The same guest for others: a shell line, a file for -readconfig, libvirt's XML."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from xml.etree import ElementTree as ET

from emupmem.model import KIB, MIB, EmupmemError
from emupmem.vm.arguments import Device, Kind, Options, Plan, Wish
from emupmem.vm.guest import DEFAULT_RAM, Guest, qemu_size

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
